"""A random Llama of 60 thousand parameters and a byte-level tokenizer, for tests of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from halfbyte import checkpoint
from halfbyte.models import Decoder, DecoderConfig

BOS, EOS = "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """tokenizer.json with ids 0 <s>, 1 </s>, then one id for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0, EOS: 1} | {letter: 2 + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_model(seed: int = 0, **changes) -> Decoder:
    """An fp32 Decoder with random weights, unquantized, without a tokenizer."""
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig.from_dict(CONFIG | changes))
    model.source = "tiny"
    return model.eval()


def tiny_folder(folder: Path, **changes) -> Path:
    """A tiny model with its tokenizer as a folder on disk."""
    checkpoint.save(tiny_model(**changes), folder)
    return write_tokenizer(folder)


def tiny_rows(count: int, seed: int = 1) -> list[dict]:
    """Tokenized rows of 5 to 40 ids, the first third masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, 41, (), generator=generator))
        ids = torch.randint(2, 258, (length,), generator=generator).tolist()
        masked = length // 3
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows
