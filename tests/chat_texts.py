"""Chat templates in the manner of well-known families, tokenizers small enough to make, texts."""

from __future__ import annotations

from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TAGGED = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# The tag inside a macro and a captured block, where the text so far says nothing about where it is.
CHATML_TAGGED_IN_MACRO = """\
{%- macro said(content) %}{% generation %}{{ content }}<|im_end|>{% endgeneration %}{% endmacro %}
{%- for message in messages %}
    {%- set turn %}{{ '<|im_start|>' + message.role + '\n' }}
        {%- if message.role == 'assistant' %}{{ said(message.content) }}
        {%- else %}{{ message.content }}<|im_end|>{% endif %}{% endset %}
    {{- turn + '\n' }}
{%- endfor %}"""
CHATML_WITHOUT_PROMPT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Mistral Nemo's way: the system prompt goes into the last question.
MISTRAL = """\
{%- if messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = none, messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if loop.last or (loop.index0 == turns | length - 2 and turns[-1].role != 'user') %}
            {{- '[INST] ' + (system + '\n\n' if system else '') + message.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message.content + '[/INST]' }}
        {%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
# Qwen 3's way: only the answers after the last question keep their thoughts.
QWEN3 = """\
{%- set ns = namespace(multi_step=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if ns.multi_step and message.role == 'user' %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content, thought = message.content, '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
PLAIN_WORDS = (
    "{% for m in messages %}### {{ m.role | title }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:{% endif %}"
)
TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}{{ tool | tojson(indent=2) }}{{ '\n' }}{% endfor %}
    {{- strftime_now('%Y') }}<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'end' %}{% break %}{% endif %}
    {{- message.role }}: {{ message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {%- for key, value in call.arguments.items() | sort %}
            {{- ' ' ~ key ~ '=' ~ value | tojson }}
        {%- endfor %}
    {%- endfor %}
    {%- if message.content is defined and message.content is string %} text{% endif %}
    {%- set seen = dict(a=1, **{'b': 2}) %} {{ seen | tojson(sort_keys=true) }}
    {%- if message.thinking is defined %} {{ message.reasoning_content }}{% endif %}
{% endfor %}"""

TEMPLATES = {
    "chatml": CHATML,
    "chatml_tagged": CHATML_TAGGED,
    "llama3": LLAMA3,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "qwen3": QWEN3,
    "plain_words": PLAIN_WORDS,
}

CHAT = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "¿Qué tal? 👩‍👩‍👧 你好"},
    {"role": "assistant", "content": "Bien,  gracias:\n    42\n"},
    {"role": "user", "content": "Again"},
    {"role": "assistant", "content": "再见 🎉"},
]

TEXTS = [
    "",
    " ",
    "Hello, world! It's 2024-11-30; I'LL pay $1,234.56 for 10 of them.",
    "  two  spaces\t\ttabs\n\n\nlines   \r\n end ",
    "def f(x):\n    return x ** 2  # ünïcödé\n",
    "Привет, мир! Ёлка стоит 123 рубля.",
    "你好,世界。机器学习很有趣!日本語のテキスト、한국어 텍스트도.",
    "مرحبا بالعالم ١٢٣ שלום עולם हिन्दी पाठ ไทย",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪 and maths ∑∫√ ½ ²",
    "e\u0301 composed and \u00e9 not; \u200b zero width; \u00a0 no-break",
    "<|im_start|>user\nhi<|im_end|> <s>x</s> <|endoftext|>",
]

SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|user|>",
    "<|system|>",
    "<|assistant|>",
]


def byte_level_backend():
    """A byte-level BPE of 600 tokens whose post-processor adds <s> and trims offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    numbers = " ".join(str(7919 * i) for i in range(200))
    backend.train_from_iterator([*TEXTS, *TEXTS, numbers, Path(__file__).read_text()], trainer)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return backend


def sentencepiece_backend(metaspace: bool = False):
    """Characters, a few words and byte fallback, spelled as Llama 2's (or newer) tokenizer.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdehilnorstuw", "▁▁", "th", "▁th", "he", "▁the", "re", "in", "é"]
    merges = [("▁", "▁"), ("t", "h"), ("▁", "th"), ("h", "e"), ("▁th", "e"), ("r", "e")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = decoders.Strip(" ", 1, 0)
    metaspaces = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    backend.decoder = decoders.Sequence(metaspaces if metaspace else [*steps, strip])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in pieces[:3]])
    return backend
