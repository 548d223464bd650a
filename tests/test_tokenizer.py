"""Tokenizers, chat templates, masks and the detokenizer, against transformers and by hand."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import pickle
import threading
import time
import warnings
from itertools import groupby
from pathlib import Path

import chat_texts as texts
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.errors import CheckpointError, UnsupportedModelError
from halfbyte.tokenizer import Detokenizer, Tokenizer

SMOLLM2 = "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers to compare with")


@pytest.fixture(scope="session")
def stories(shared) -> Path:
    return shared / "models" / "stories260K"


@pytest.fixture(scope="session")
def stories_tokenizer(stories) -> Tokenizer:
    return Tokenizer.from_folder(stories)


@pytest.fixture(scope="session")
def smollm2_folder(shared, tmp_path_factory) -> Path:
    """SmolLM2's tokenizer files as the converter beside the checkout writes them."""
    spec = importlib.util.spec_from_file_location("gguf_to_hf", shared / "tools" / "gguf_to_hf.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    read_all = tool.read

    def read_embedding_only(path):
        meta, infos, buffer, base = read_all(path)
        return meta, [info for info in infos if info[0] == "token_embd.weight"], buffer, base

    tool.read = read_embedding_only
    folder = tmp_path_factory.mktemp("smollm2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        tool.main(str(shared / "models" / SMOLLM2), str(folder))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf(shared) -> Tokenizer:
    return Tokenizer.from_gguf(shared / "models" / SMOLLM2)


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(texts.byte_level_backend(), SPECIAL)


@pytest.fixture(scope="session")
def samples(shared) -> list[str]:
    """Real text: the first 20,000 characters of each file, and the multilingual lines."""
    files = sorted((shared / "data" / "text").glob("*.txt.gz"))
    assert files
    read = [gzip.decompress(path.read_bytes()).decode("utf-8")[:20_000] for path in files]
    return read + texts.TEXTS


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer.backend, SPECIAL, {"default": template})


def peer(transformers, backend, template: str | None = None):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **SPECIAL
    )


def masked_runs(tokenizer: Tokenizer, messages, **variables) -> list[str]:
    """The text of each run of tokens that count, with special tokens."""
    ids, mask = tokenizer.chat_ids_and_mask(messages, **variables)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    groups = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    runs = [[token_id for token_id, _ in group] for counted, group in groups if counted]
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


# ---- ids ----


def test_smollm2_ids_and_text_equal_transformers(transformers, smollm2_folder, samples):
    ours = Tokenizer.from_folder(smollm2_folder)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    assert ours.vocab_size == len(theirs) == 49152
    for text in samples:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_smollm2_from_gguf_equals_its_folder(transformers, smollm2_gguf, smollm2_folder, samples):
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    for text in samples:
        ids = theirs.encode(text)
        assert smollm2_gguf.encode(text, add_special_tokens=True) == ids
        assert smollm2_gguf.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert smollm2_gguf.vocab_size == 49152
    assert smollm2_gguf.chat_template == theirs.chat_template
    assert smollm2_gguf.bos_token_id == theirs.bos_token_id == 1
    assert smollm2_gguf.eos_token_id == theirs.eos_token_id == 2
    assert smollm2_gguf.pad_token == theirs.pad_token


def test_stories_ids_and_text_equal_transformers(transformers, stories, samples):
    ours = Tokenizer.from_folder(stories)
    theirs = transformers.AutoTokenizer.from_pretrained(stories)
    for text in samples:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=True) == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode("a", add_special_tokens=True)[0] == ours.bos_token_id == 1
    assert ours.pad_token is None and ours.pad_token_id is None


def test_truncation_and_padding_in_the_file_do_not_count(byte_level, tmp_path):
    backend = copy.deepcopy(byte_level.backend)
    backend.enable_truncation(4)
    backend.enable_padding(length=50, pad_id=1, pad_token="</s>")
    backend.save(str(tmp_path / "tokenizer.json"))
    text = texts.TEXTS[2]
    assert Tokenizer.from_folder(tmp_path).encode(text) == byte_level.encode(text)


def test_ids_past_the_vocabulary_decode_to_nothing(byte_level):
    ids = byte_level.encode("abc")
    past = byte_level.vocab_size + 7
    assert byte_level.decode([past, *ids, past]) == "abc"


def test_deepcopy_and_pickle(byte_level):
    for twin in (copy.deepcopy(byte_level), pickle.loads(pickle.dumps(byte_level))):
        assert twin.encode(texts.TEXTS[6]) == byte_level.encode(texts.TEXTS[6])
        assert twin.eos_token == "</s>"


# ---- folders ----


def write_folder(folder: Path, backend=None, **files) -> Path:
    (backend or texts.byte_level_backend()).save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


OBJECT = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}},
        {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"__type": "AddedToken"} | OBJECT}},
        {"special_tokens_map": {"bos_token": "<s>", "eos_token": OBJECT}},
        {"tokenizer_config": {"eos_token": "<s>"}, "special_tokens_map": {"eos_token": "</s>"}},
        {
            "tokenizer_config": {
                "eos_token": "</s>",
                "added_tokens_decoder": {"1": OBJECT | {"special": True}},
            },
            "special_tokens_map": {"eos_token": "<s>"},
        },
    ],
    ids=["strings", "objects", "map", "map over config", "decoder over map"],
)
def test_special_tokens_in_every_spelling(transformers, tmp_path, files):
    folder = write_folder(tmp_path, **files)
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert (ours.eos_token, ours.eos_token_id) == ("</s>", 1)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token == theirs.bos_token


def test_added_tokens_of_the_config_are_matched_whole(transformers, tmp_path):
    size = texts.byte_level_backend().get_vocab_size()
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False}
    added = {str(size): {"content": "<tool>", "special": False} | flags}
    folder = write_folder(tmp_path, tokenizer_config={"added_tokens_decoder": added})
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    text = "a<tool>  b"
    assert size in ours.encode(text)
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_added_tokens_json(tmp_path):
    size = texts.byte_level_backend().get_vocab_size()
    folder = write_folder(tmp_path, added_tokens={"<tool>": size, "<s>": 0})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("<tool><s>") == [size, 0]
    assert 0 in tokenizer.special_ids


def test_an_added_token_with_another_id_is_refused(tmp_path):
    folder = write_folder(tmp_path, added_tokens={"<tool>": 7000})
    with pytest.raises(CheckpointError, match=r"'<tool>' is listed with id 7000.*gives it id"):
        Tokenizer.from_folder(folder)


def test_other_threads_run_while_a_long_text_is_encoded(byte_level):
    text, ticks, done = "a bc " * 200_000, [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    ticking = threading.Thread(target=tick)
    ticking.start()
    begun = time.perf_counter()
    ids = byte_level.encode(text)
    ended = time.perf_counter()
    done.set()
    ticking.join()
    assert ids == byte_level.backend.encode(text, add_special_tokens=False).ids
    # Holding the interpreter it would let the other thread in at its two ends alone.
    assert sum(begun < at < ended for at in ticks) > 5


def test_text_that_is_no_unicode_is_said_to_be_none(byte_level):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        byte_level.encode("a\ud800")


def test_a_special_token_is_never_added_to_the_vocabulary(tmp_path):
    config = {"pad_token": "[PAD]", "eos_token": "</s>"}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id is None
    assert tokenizer.vocab_size == texts.byte_level_backend().get_vocab_size()


def test_a_special_token_of_the_plain_vocabulary_is_matched_whole(transformers, tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({"<s>": 0, **{x: i + 1 for i, x in enumerate(letters)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = write_folder(tmp_path, backend, tokenizer_config={"bos_token": "<s>"})
    ours = Tokenizer.from_folder(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.encode("<s>a") == theirs.encode("<s>a")
    assert ours.encode("<s>")[0] == 0 and ours.decode(ours.encode("<s>a")) == "a"


def test_templates_in_files_win_over_the_config(tmp_path):
    inline = [{"name": "default", "template": "old"}, {"name": "rag", "template": "RAG"}]
    folder = write_folder(tmp_path, tokenizer_config={"chat_template": inline})
    assert Tokenizer.from_folder(folder).chat_templates == {"default": "old", "rag": "RAG"}
    (folder / "chat_template.jinja").write_text("new\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools!")
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.chat_template == "new\n"
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat, chat_template="rag") == "RAG"
    assert tokenizer.apply_chat_template(chat, tools=[{"name": "f"}]) == "tools!"
    assert tokenizer.apply_chat_template(chat) == "new"


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00")
    with pytest.raises(CheckpointError, match=r"SentencePiece.*hint: transformers converts it"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "voc')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_config.json", "{", "expected JSON"),
        ("tokenizer_config.json", "[" * 100_000, "expected JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object, got list"),
        ("tokenizer_config.json", '{"chat_template": [{"name": 1}]}', "expected text or a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added tokens"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": "x"}}', "added tokens"),
        ("special_tokens_map.json", "nope", "special_tokens_map.json: expected JSON"),
        ("added_tokens.json", '{"a": "b"}', "added tokens"),
        ("chat_template.jinja", "\udcff", "chat_template.jinja: expected UTF-8"),
    ],
)
def test_damaged_side_files(tmp_path, name, content, said):
    folder = write_folder(tmp_path)
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.from_folder(folder)


def test_save_is_read_back_by_us_and_transformers(transformers, tmp_path):
    config = {"bos_token": "<s>", "add_bos_token": True, "model_max_length": 77, "mine": [1]}
    source = write_folder(
        tmp_path, tokenizer_config=config, special_tokens_map={"eos_token": "</s>"}
    )
    first = Tokenizer.from_folder(source)
    first.chat_template = texts.CHATML + "\n"
    first.save(tmp_path / "a" / "b")
    again = Tokenizer.from_folder(tmp_path / "a" / "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a" / "b")
    saved = json.loads((tmp_path / "a" / "b" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == texts.CHATML + "\n" and saved["mine"] == [1]
    assert again.special_tokens == first.special_tokens == SPECIAL
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    expected = first.apply_chat_template(texts.CHAT)
    assert again.apply_chat_template(texts.CHAT) == expected
    assert (
        theirs.apply_chat_template(texts.CHAT, tokenize=False, add_generation_prompt=True)
        == expected
    )
    for text in texts.TEXTS:
        ids = first.encode(text, add_special_tokens=True)
        assert again.encode(text, add_special_tokens=True) == theirs.encode(text) == ids


def test_save_writes_named_templates_but_never_outside(byte_level, tmp_path):
    templates = {"default": "d", "tool_use": "t", "../evil": "e"}
    Tokenizer(byte_level.backend, SPECIAL, templates).save(tmp_path / "out")
    assert Tokenizer.from_folder(tmp_path / "out").chat_templates == templates
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jinja")}
    assert written == {"out/chat_template.jinja", "out/additional_chat_templates/tool_use.jinja"}


# ---- GGUF ----


def write_gguf(path: Path, **fields) -> Path:
    """A GGUF file with a tokenizer only; a dot in a field's name is written __."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = "tokenizer." + name.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_fields(pre: str) -> dict:
    backend = texts.byte_level_backend()
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml__model": "gpt2",
        "ggml__pre": pre,
        "ggml__tokens": [*tokens, "<think>", "[PAD]"],
        "ggml__token_type": [3 if t in texts.SPECIALS else 1 for t in tokens] + [4, 5],
        "ggml__merges": [" ".join(merge) for merge in model["merges"]],
        "ggml__bos_token_id": 0,
        "ggml__eos_token_id": 1,
    }


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2", "smollm"])
def test_gguf_byte_level_splits_words_like_transformers(transformers, tmp_path, pre):
    path = write_gguf(tmp_path / "m.gguf", ggml__add_bos_token=False, **byte_level_fields(pre))
    ours = Tokenizer.from_gguf(path)
    if pre == "smollm":
        theirs = hub_smollm_rule()
    else:
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(
            tmp_path, gguf_file="m.gguf"
        ).backend_tokenizer
    for text in [*texts.TEXTS, "1234567 don't I'LL\n\n  x", "</think> <think>\nhm"]:
        # transformers leaves out the composing that the model's own tokenizer.json has, and adds
        # <|endoftext|> to a vocabulary without it.
        if (pre == "qwen2" and "\u0301" in text) or "<|endoftext|>" in text:
            continue
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.encode("[PAD]") != [ours.vocab_size]


def hub_smollm_rule():
    from tokenizers import AddedToken, pre_tokenizers

    backend = texts.byte_level_backend()
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    return backend


def test_gguf_qwen2_composes_text(tmp_path):
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", **byte_level_fields("qwen2")))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_gguf_bos_follows_the_file_or_the_family(tmp_path):
    def starts(name: str, **more) -> list[int]:
        fields = byte_level_fields(name) | more
        tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", **fields))
        return tokenizer.encode("", add_special_tokens=True)

    assert starts("llama-bpe") == [0] and starts("qwen2") == []
    assert starts("llama-bpe", ggml__add_bos_token=False) == []
    assert starts("qwen2", ggml__add_bos_token=True, ggml__add_eos_token=True) == [0, 1]


def test_gguf_chat_templates(tmp_path):
    fields = byte_level_fields("qwen2") | {
        "chat_template": texts.CHATML,
        "chat_templates": ["rag"],
        "chat_template__rag": "RAG",
    }
    tokenizer = Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", **fields))
    assert tokenizer.chat_templates == {"default": texts.CHATML, "rag": "RAG"}


def test_gguf_sentencepiece_equals_its_tokenizer_json(stories, samples, tmp_path):
    model = json.loads((stories / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    path = write_gguf(
        tmp_path / "m.gguf",
        ggml__model="llama",
        ggml__tokens=tokens,
        ggml__scores=[0.0] * 259 + [float(259 - i) for i in range(259, len(tokens))],
        ggml__token_type=kinds,
        ggml__bos_token_id=1,
        ggml__eos_token_id=2,
        ggml__unknown_token_id=0,
    )
    ours, original = Tokenizer.from_gguf(path), Tokenizer.from_folder(stories)
    for text in samples:
        if "<unk>" in text:
            continue
        ids = original.encode(text, add_special_tokens=True)
        assert ours.encode(text, add_special_tokens=True) == ids
        assert ours.decode(ids) == original.decode(ids)


def test_gguf_without_prefix_space(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"]
    path = write_gguf(
        tmp_path / "m.gguf",
        ggml__model="llama",
        ggml__tokens=pieces,
        ggml__scores=[0.0, 0.0, 0.0, -3.0, -4.0, -5.0, -2.0, -1.0],
        ggml__token_type=[2, 3, 3, 1, 1, 1, 1, 1],
        ggml__bos_token_id=1,
        ggml__add_space_prefix=False,
        ggml__add_bos_token=False,
    )
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.encode("ab a", add_special_tokens=True) == [7, 6]
    # "ab" scores above "▁a", so it is merged first.
    assert tokenizer.encode(" ab") == [3, 7]
    assert tokenizer.decode([3, 7]) == " ab"


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"ggml__pre": "viking"}, UnsupportedModelError, "pre-tokenizers.*got 'viking'"),
        ({"ggml__pre": None}, UnsupportedModelError, "got None"),
        ({"ggml__model": "bert"}, UnsupportedModelError, "llama or gpt2, got 'bert'"),
        ({"ggml__merges": None}, CheckpointError, "tokenizer.ggml.merges"),
        ({"ggml__tokens": None}, CheckpointError, "tokenizer.ggml.tokens"),
        ({"ggml__token_type": [1, 1]}, CheckpointError, "a type for each of"),
        ({"ggml__bos_token_id": 9999}, CheckpointError, "bos_token_id is 9999"),
    ],
)
def test_gguf_that_cannot_be_read(tmp_path, change, error, said):
    fields = byte_level_fields("qwen2") | change
    kept = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(error, match=said):
        Tokenizer.from_gguf(write_gguf(tmp_path / "m.gguf", **kept))


def test_gguf_that_is_none(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04 not a model at all" * 9)
    with pytest.raises(CheckpointError, match=r"m\.gguf: expected a GGUF file"):
        Tokenizer.from_gguf(tmp_path / "m.gguf")
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_gguf(tmp_path / "none.gguf")


# ---- chat templates ----


@pytest.mark.parametrize("name", texts.TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("turns", [slice(1, 2), slice(0, 4), slice(0, 5)])
def test_rendering_equals_transformers(transformers, byte_level, name, prompt, turns):
    template = texts.TEMPLATES[name]
    ours = with_template(byte_level, template)
    theirs = peer(transformers, byte_level.backend, template)
    chat = texts.CHAT[turns]
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert ours.apply_chat_template(chat, prompt) == text
    ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
    assert ours.chat_ids(chat, prompt) == ids


def test_smollm2_chat_equals_transformers(transformers, smollm2_gguf, smollm2_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    for chat in (texts.CHAT, texts.CHAT[1:], texts.CHAT[:4]):
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert smollm2_gguf.chat_ids(chat) == ids


def test_tools_json_loop_controls_and_reasoning(transformers, byte_level):
    chat = [
        {"role": "user", "content": "<é> & 'q'", "thinking": "why"},
        {"role": "skip", "content": "unseen"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"arguments": {"b": [1, 2.5, None, True], "a": {"k": "<ü>"}}}],
        },
        {"role": "tool", "content": ["parts", {"type": "text", "text": "x"}]},
        {"role": "end", "content": "unseen"},
        {"role": "user", "content": "unseen"},
    ]
    tools = [{"name": "f", "parameters": {"x": "<int>"}, "required": ("x", "y")}]
    theirs = peer(transformers, byte_level.backend, texts.TOOLS)
    expected = theirs.apply_chat_template(chat, tools=tools, tokenize=False)
    text = with_template(byte_level, texts.TOOLS).apply_chat_template(chat, False, tools=tools)
    assert text == expected
    assert "unseen" not in text and '"<int>"' in text and "k" in text


def test_template_variables(transformers, byte_level):
    ours = with_template(byte_level, texts.QWEN3)
    theirs = peer(transformers, byte_level.backend, texts.QWEN3)
    for thinking in (True, False):
        text = theirs.apply_chat_template(
            texts.CHAT[:2], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert ours.apply_chat_template(texts.CHAT[:2], enable_thinking=thinking) == text
        assert text.endswith("</think>\n\n") != thinking


def test_the_callers_messages_are_not_touched(byte_level):
    chat = copy.deepcopy(texts.CHAT)
    template = "{% for m in messages %}{{ m.update({'role': 'x'}) }}{% endfor %}"
    with pytest.raises(ValueError, match="refuses"):
        with_template(byte_level, template).apply_chat_template(chat)
    with_template(byte_level, texts.QWEN3).chat_ids_and_mask(chat)
    assert chat == texts.CHAT


def test_what_the_template_refuses_is_said(byte_level):
    tokenizer = with_template(byte_level, texts.LLAMA2)
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match="refuses these messages: .*must alternate"):
        tokenizer.apply_chat_template(twice)
    with pytest.raises(ValueError, match="refuses these messages"):
        with_template(byte_level, texts.CHATML).apply_chat_template([{"role": "user"}])


@pytest.mark.parametrize(
    ("messages", "error", "said"),
    [
        ([], ValueError, "at least one"),
        ("hello", TypeError, "expected a list of dicts, got str"),
        ({"role": "user"}, TypeError, "expected a list of dicts, got dict"),
        (["hello"], TypeError, "message 0: expected a dict"),
        ([{"content": "x"}], ValueError, "message 0: expected a role"),
        ([{"role": "user", "content": object()}], TypeError, "got builtins.object"),
        ([{"role": "user", "content": b"x"}], TypeError, "got builtins.bytes"),
    ],
)
def test_malformed_messages(byte_level, messages, error, said):
    with pytest.raises(error, match=said):
        with_template(byte_level, texts.CHATML).apply_chat_template(messages)


def test_without_a_template_the_error_says_what_to_do(byte_level):
    tokenizer = Tokenizer(byte_level.backend, SPECIAL)
    assert tokenizer.chat_template is None
    with pytest.raises(CheckpointError, match=r"no chat template.*hint: .*instruct.*--raw"):
        tokenizer.chat_ids(texts.CHAT)
    only_named = Tokenizer(byte_level.backend, SPECIAL, {"rag": "x"})
    with pytest.raises(CheckpointError, match=r"named templates \['rag'\]"):
        only_named.chat_ids(texts.CHAT)


def test_a_template_that_is_not_jinja(byte_level):
    with pytest.raises(CheckpointError, match="chat template, line 2: expected jinja2"):
        with_template(byte_level, "ok\n{% for %}").chat_ids(texts.CHAT)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__func__.__globals__ }}",
        "{{ dict.__class__.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ joiner.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ ('%s' | attr('format')).__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].pop('role') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(byte_level, attack):
    """No way out, or at most jinja2's harmless refusal text; the messages stay as they were."""
    try:
        text = with_template(byte_level, attack).apply_chat_template(texts.CHAT)
    except (ValueError, CheckpointError):
        return
    assert not any(word in text for word in ("<class", "built-in", "__", "module", "root:"))


# ---- which tokens are the assistant's ----

BIEN = "Bien,  gracias:\n    42\n"
EXPECTED_RUNS = {
    "chatml": [BIEN + "<|im_end|>", "再见 🎉<|im_end|>"],
    "chatml_tagged": [BIEN + "<|im_end|>", "再见 🎉<|im_end|>"],
    "llama3": [BIEN.strip() + "<|eot_id|>", "再见 🎉<|eot_id|>"],
    # The space before the answer is a token of its own here, and so is not the assistant's.
    "llama2": [" " + BIEN.strip() + " </s>", " 再见 🎉 </s>"],
    "mistral": [" " + BIEN.strip() + "</s>", " 再见 🎉</s>"],
    "zephyr": [BIEN + "</s>", "再见 🎉</s>"],
    "qwen3": [BIEN + "<|im_end|>", "<think>\n\n</think>\n\n再见 🎉<|im_end|>"],
    "plain_words": [" " + BIEN + "\n\n", " 再见 🎉\n\n"],
}


@pytest.mark.parametrize("name", texts.TEMPLATES)
def test_the_assistants_turns_with_their_end_tokens(byte_level, name):
    runs = masked_runs(with_template(byte_level, texts.TEMPLATES[name]), texts.CHAT)
    assert [run.lstrip(" ") for run in runs] == [run.lstrip(" ") for run in EXPECTED_RUNS[name]]


def test_smollm2_turns(smollm2_gguf):
    assert masked_runs(smollm2_gguf, texts.CHAT) == EXPECTED_RUNS["chatml"]


def test_a_template_without_generation_prompt_does_not_train_the_header(byte_level):
    tokenizer = with_template(byte_level, texts.CHATML_WITHOUT_PROMPT)
    assert masked_runs(tokenizer, texts.CHAT) == EXPECTED_RUNS["chatml"]


def test_tags_inside_macros_and_blocks(byte_level):
    tokenizer = with_template(byte_level, texts.CHATML_TAGGED_IN_MACRO)
    plain = with_template(byte_level, texts.CHATML)
    assert tokenizer.apply_chat_template(texts.CHAT, False) == plain.apply_chat_template(
        texts.CHAT, False
    )
    assert masked_runs(tokenizer, texts.CHAT) == EXPECTED_RUNS["chatml"]


def test_mask_equals_transformers_on_a_tagged_template(transformers, byte_level, smollm2_gguf):
    for tokenizer in (byte_level, smollm2_gguf):
        theirs = peer(transformers, copy.deepcopy(tokenizer.backend), texts.CHATML_TAGGED)
        # transformers reads offsets that a byte-level post-processor trims.
        theirs.backend_tokenizer.post_processor = None
        ours = with_template(tokenizer, texts.CHATML_TAGGED)
        for chat in (texts.CHAT, texts.CHAT[1:3], texts.CHAT * 3):
            found = theirs.apply_chat_template(
                chat, return_assistant_tokens_mask=True, return_dict=True
            )
            ids, mask = ours.chat_ids_and_mask(chat)
            assert ids == found["input_ids"] and mask == found["assistant_masks"]


def test_a_chat_without_assistant_trains_nothing(byte_level):
    for template in (texts.CHATML, texts.CHATML_TAGGED):
        _, mask = with_template(byte_level, template).chat_ids_and_mask(texts.CHAT[:2])
        assert not any(mask)


def test_an_assistant_that_starts_or_says_nothing(byte_level):
    chat = [
        {"role": "assistant", "content": "I begin"},
        {"role": "user", "content": "hm"},
        {"role": "assistant", "content": ""},
    ]
    tokenizer = with_template(byte_level, texts.CHATML)
    assert masked_runs(tokenizer, chat) == ["I begin<|im_end|>", "<|im_end|>"]


def test_thoughts_that_the_template_drops_are_not_looked_for(byte_level):
    chat = copy.deepcopy(texts.CHAT)
    chat[2]["content"] = "<think>\nhm\n</think>\n\nBien"
    chat[4]["content"] = "<think>\nso\n</think>\n\nAdios"
    tokenizer = with_template(byte_level, texts.QWEN3)
    assert masked_runs(tokenizer, chat) == [
        "Bien<|im_end|>",
        "<think>\nso\n</think>\n\nAdios<|im_end|>",
    ]


def test_repeated_content_is_not_confused(byte_level):
    chat = [{"role": role, "content": "probe"} for role in ("user", "assistant") * 3]
    for template, end in ((texts.CHATML, "<|im_end|>"), (texts.MISTRAL, "</s>")):
        runs = masked_runs(with_template(byte_level, template), chat)
        assert [run.strip() for run in runs] == ["probe" + end] * 3


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }};{% endfor %}",
        "{% for m in messages %}{{ 'ES: ' if m.content.startswith('Bien') }}{{ m.content }};"
        "{% endfor %}",
        "{% for m in messages %}{{ m.content }};{{ m.content }};{% endfor %}",
        "{{ messages[2].content | length }}{% for m in messages %}{{ m.content }};{% endfor %}",
    ],
    ids=["changed", "header by content", "twice", "counted before"],
)
def test_a_turn_that_cannot_be_found_is_an_error_not_a_guess(byte_level, template):
    with pytest.raises(ValueError, match=r"message 2: .*generation %\}"):
        with_template(byte_level, template).chat_ids_and_mask(texts.CHAT)


def test_spaces_at_the_end_of_an_answer_count(byte_level):
    """The offsets of such a token are empty where a byte-level post-processor trims them."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    )
    chat = [{"role": "assistant", "content": "     f(x)   "}]
    assert masked_runs(with_template(byte_level, template), chat) == ["     f(x)   "]


def test_a_template_that_works_on_the_tagged_text(byte_level):
    """Trimming what holds a tag goes another way when the tag is marked."""
    template = (
        "{% for m in messages %}{% set turn %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endset %}<|user|>{{ turn | trim }}{{ eos_token }}{% endfor %}"
    )
    chat = [{"role": "user", "content": " q "}, {"role": "assistant", "content": " a b "}]
    assert masked_runs(with_template(byte_level, template), chat) == ["a b</s>"]


def test_marks_in_the_users_text_do_not_move_the_mask(byte_level):
    chat = [
        {"role": "user", "content": "\ufdd0x\ufdd1" + "".join(map(chr, range(0xFDD0, 0xFDE0)))},
        {"role": "assistant", "content": "\ufdd1y\ufdd0"},
    ]
    tokenizer = with_template(byte_level, texts.CHATML_TAGGED)
    assert masked_runs(tokenizer, chat) == ["\ufdd1y\ufdd0<|im_end|>"]
    chat[0]["content"] = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert masked_runs(tokenizer, chat) == ["\ufdd1y\ufdd0<|im_end|>"]


def test_an_added_token_that_takes_the_space_after_it_stays_with_the_prompt():
    from tokenizers import AddedToken

    backend = texts.byte_level_backend()
    backend.add_special_tokens([AddedToken("<|assistant|>", rstrip=True, special=True)])
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer(backend, SPECIAL, {"default": template})
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "  two"}]
    assert masked_runs(tokenizer, chat) == ["two</s>"]


words = st.text(st.sampled_from("ab \n\t.42é你🎉-")) | st.text(max_size=8)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=3)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(turns)
def test_masks_by_turn_and_by_tag_agree(byte_level, pairs):
    chat = [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    by_tag = with_template(byte_level, texts.CHATML_TAGGED).chat_ids_and_mask(chat)
    assert with_template(byte_level, texts.CHATML).chat_ids_and_mask(chat) == by_tag
    assert with_template(byte_level, texts.CHATML_WITHOUT_PROMPT).chat_ids_and_mask(chat) == by_tag


# ---- detokenizer ----


def pieces(tokenizer: Tokenizer, ids, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]


def check_stream(tokenizer: Tokenizer, ids, skip: bool) -> None:
    given_out = pieces(tokenizer, ids, skip)
    for piece in given_out:
        piece.encode("utf-8")
    assert "".join(given_out) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.fixture(scope="session")
def streamed(byte_level) -> dict[str, Tokenizer]:
    from tokenizers import decoders

    looks_ahead = texts.byte_level_backend()
    looks_ahead.decoder = decoders.BPEDecoder(suffix="e")
    joined = texts.byte_level_backend()
    joined.decoder = None
    return {
        "byte-level": byte_level,
        "prefix space": Tokenizer(texts.sentencepiece_backend()),
        "metaspace": Tokenizer(texts.sentencepiece_backend(metaspace=True)),
        "looks ahead": Tokenizer(looks_ahead),
        "no decoder": Tokenizer(joined),
    }


KINDS = ["byte-level", "prefix space", "metaspace", "looks ahead", "no decoder"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_random_ids_join_to_the_full_text(streamed, kind, data):
    tokenizer = streamed[kind]
    any_id = st.integers(0, tokenizer.vocab_size + 2)
    # Byte tokens and the first special ones, often: they make and break characters.
    ids = data.draw(st.lists(any_id | st.integers(0, 270), max_size=24))
    check_stream(tokenizer, ids, data.draw(st.booleans()))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_pieces_of_any_text_join_to_the_full_text(streamed, kind, data):
    tokenizer = streamed[kind]
    text = data.draw(st.text() | st.sampled_from(texts.TEXTS))
    check_stream(tokenizer, tokenizer.encode(text), data.draw(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_with_real_vocabularies(stories_tokenizer, smollm2_gguf, data):
    for tokenizer in (stories_tokenizer, smollm2_gguf):
        any_id = st.integers(0, tokenizer.vocab_size - 1)
        ids = data.draw(st.lists(any_id | st.integers(0, 300), max_size=20))
        check_stream(tokenizer, ids, data.draw(st.booleans()))


def test_text_comes_as_soon_as_it_is_certain(streamed):
    byte_level = streamed["byte-level"]
    ids = byte_level.encode("the cat 🎉 sat")
    given_out = pieces(byte_level, ids)
    assert given_out[-1] == ""
    whole = [i for i, token_id in enumerate(ids) if "\ufffd" not in byte_level.decode([token_id])]
    assert all(given_out[i] for i in whole)
    assert any(piece.endswith("🎉") for piece in given_out)
    spaced = streamed["prefix space"]
    given_out = pieces(spaced, spaced.encode("the rain in the south"))
    assert given_out[0] == "the" and all(given_out[:-1])


def test_half_a_character_is_given_out_only_at_the_end(byte_level):
    ids = byte_level.encode("\U0001f9ff")
    assert len(ids) > 1
    given_out = pieces(byte_level, ids[:-1])
    assert given_out[:-1] == [""] * (len(ids) - 1) and set(given_out[-1]) == {"\ufffd"}


def test_a_detokenizer_starts_over_after_its_flush(streamed):
    tokenizer = streamed["prefix space"]
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode("the rain")
    first = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    second = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert first == second == "the rain"


@pytest.mark.parametrize("kind", ["byte-level", "prefix space", "metaspace"])
def test_what_goes_on_keeps_its_space(streamed, kind):
    tokenizer = streamed[kind]
    text, rest = "the", " rain €é in"
    ids = tokenizer.encode(text + rest)[len(tokenizer.encode(text)) :]
    detokenizer = Detokenizer(tokenizer, continues=True)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == rest
    first = tokenizer.backend.id_to_token(ids[0])
    assert tokenizer.piece(ids[0]) == first.replace("\u2581", " ").replace("Ġ", " ")


@pytest.mark.parametrize("kind", ["byte-level", "prefix space", "metaspace"])
def test_the_bytes_of_tokens_are_those_of_the_text(streamed, kind):
    tokenizer = streamed[kind]
    text = "the rain €é \U0001f9ff in\n"
    ids = tokenizer.encode(text)
    found = [tokenizer.token_bytes(token, place == 0) for place, token in enumerate(ids)]
    assert b"".join(found).decode() == tokenizer.decode(ids) == text


def test_detokenizer_is_fast_on_long_text(smollm2_gguf):
    ids = smollm2_gguf.encode("word " * 4000)
    check_stream(smollm2_gguf, ids, True)
