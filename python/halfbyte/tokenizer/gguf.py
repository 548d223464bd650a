"""The tokenizer inside a GGUF file, rebuilt in the form the model's own tokenizer.json has.

GGUF names a vocabulary's kind ("llama" for SentencePiece BPE, "gpt2" for byte-level BPE) and, for
the latter, the rule that splits text into words; neither normalizer nor decoder is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from halfbyte.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer as Backend

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"
QWEN2_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class WordRule(NamedTuple):
    """How a byte-level vocabulary's text is cut before merging.

    split: a pattern; None is GPT-2's own. digits: every digit stands alone. nfc: text is composed
    first. whole_words: a word in the vocabulary is not merged up. adds_bos: unless the file says.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


LLAMA3 = WordRule(LLAMA3_SPLIT, whole_words=True, adds_bos=True)
QWEN2 = WordRule(QWEN2_SPLIT, nfc=True)
WORD_RULES = {
    "gpt-2": WordRule(),
    "smollm": WordRule(digits=True),
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": WordRule(TEKKEN_SPLIT, whole_words=True, adds_bos=True),
}


class Vocabulary:
    """The tokenizer.* metadata of one GGUF file."""

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader
        self.tokens: list[str] = self.required("ggml.tokens")
        self.types: list[int] = self.get("ggml.token_type") or [NORMAL] * len(self.tokens)
        if len(self.types) != len(self.tokens):
            raise CheckpointError(
                f"GGUF tokenizer: expected a type for each of {len(self.tokens)} tokens, "
                f"got {len(self.types)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(f"tokenizer.{key}")
        return default if field is None else field.contents()

    def required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(
                f"GGUF tokenizer: expected tokenizer.{key}, which this file lacks. "
                "hint: convert the model again, or use its Hugging Face folder"
            )
        return value

    def ids(self) -> dict[str, int]:
        """Token to id, without the fillers that only pad the embedding."""
        pairs = zip(self.tokens, self.types, strict=True)
        return {token: i for i, (token, kind) in enumerate(pairs) if kind != UNUSED}

    def of_type(self, kind: int) -> list[str]:
        return [t for t, found in zip(self.tokens, self.types, strict=True) if found == kind]

    def token(self, key: str) -> str | None:
        token_id = self.get(f"ggml.{key}")
        if token_id is None:
            return None
        if token_id >= len(self.tokens):
            raise CheckpointError(
                f"GGUF tokenizer: tokenizer.ggml.{key} is {token_id}, "
                f"but there are {len(self.tokens)} tokens"
            )
        return self.tokens[token_id]


def open_reader(path: str) -> GGUFReader:
    """The opened file; CheckpointError when it is not a GGUF file."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{path}: expected a GGUF file, got: {error}") from error


def build_backend(vocabulary: Vocabulary) -> Backend:
    """The tokenizer with its added tokens, and bos and eos as the file asks for."""
    kind = vocabulary.required("ggml.model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level(vocabulary)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(vocabulary), True
    else:
        raise UnsupportedModelError(
            f"GGUF tokenizer: expected the kind llama or gpt2, got {kind!r}. "
            "hint: use the model's Hugging Face folder"
        )
    _add_tokens(backend, vocabulary)
    _add_post_processor(backend, vocabulary, adds_bos)
    return backend


def _byte_level(vocabulary: Vocabulary) -> tuple[Backend, bool]:
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    rule = _word_rule(vocabulary)
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.required("ggml.merges")]
    model = models.BPE(
        vocab=vocabulary.ids(), merges=merges, ignore_merges=rule.whole_words, fuse_unk=False
    )
    backend = Backend(model)
    steps: list[Any] = []
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    if rule.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    own_words = rule.split is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend, rule.adds_bos


def _word_rule(vocabulary: Vocabulary) -> WordRule:
    name = vocabulary.get("ggml.pre")
    if name not in WORD_RULES:
        raise UnsupportedModelError(
            f"GGUF tokenizer: expected one of the pre-tokenizers {sorted(WORD_RULES)}, "
            f"got {name!r}. hint: use the model's Hugging Face folder"
        )
    return WORD_RULES[name]


def _sentencepiece(vocabulary: Vocabulary) -> Backend:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    prefix = vocabulary.get("ggml.add_space_prefix", True)
    model = models.BPE(
        vocab=vocabulary.ids(),
        merges=merges_from_scores(vocabulary),
        unk_token=vocabulary.token("unknown_token_id") or vocabulary.tokens[0],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def merges_from_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every pair that makes a normal token, the best-scored token first.

    SentencePiece merges the pair whose result scores highest; BPE merges the pair listed first.
    """
    scores: Sequence[float] = vocabulary.required("ggml.scores")
    normal = {
        token: token_id
        for token_id, token in enumerate(vocabulary.tokens)
        if vocabulary.types[token_id] == NORMAL
    }
    ranked = sorted(normal, key=lambda token: (-scores[normal[token]], normal[token]))
    return [pair for token in ranked for pair in _pairs(token, normal)]


def _pairs(token: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    found = [(left, right) for left, right in cuts if left in ids and right in ids]
    return sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _add_tokens(backend: Backend, vocabulary: Vocabulary) -> None:
    from tokenizers import AddedToken

    for kind in (CONTROL, USER_DEFINED):
        texts = vocabulary.of_type(kind)
        special = kind == CONTROL
        backend.add_tokens([AddedToken(t, normalized=False, special=special) for t in texts])


def _add_post_processor(backend: Backend, vocabulary: Vocabulary, adds_bos: bool) -> None:
    from tokenizers import processors

    before = _edge_token(vocabulary, "bos", adds_bos)
    after = _edge_token(vocabulary, "eos", False)
    if not before and not after:
        return
    around = [*before, "$A", *after]
    backend.post_processor = processors.TemplateProcessing(
        single=around,
        pair=[*around, *before, "$B", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in before + after],
    )


def _edge_token(vocabulary: Vocabulary, role: str, default: bool) -> list[str]:
    wanted = vocabulary.get(f"ggml.add_{role}_token", default)
    token = vocabulary.token(f"{role}_token_id") if wanted else None
    return [token] if token is not None else []


def read_special_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    """Role ("bos_token", ..) to text."""
    found = {role: vocabulary.token(key) for role, key in ROLES.items()}
    return {role: token for role, token in found.items() if token is not None}


def read_chat_templates(vocabulary: Vocabulary) -> dict[str, str]:
    """Name to source; the model's own template is "default"."""
    names = vocabulary.get("chat_templates") or []
    named = {name: vocabulary.get(f"chat_template.{name}") for name in names}
    templates = {"default": vocabulary.get("chat_template"), **named}
    return {name: source for name, source in templates.items() if source}
