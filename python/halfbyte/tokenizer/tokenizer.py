"""The tokenizer of a model: a `tokenizers` backend, its special tokens and chat templates."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import CheckpointError
from halfbyte.tokenizer import folder as files
from halfbyte.tokenizer import gguf
from halfbyte.tokenizer.chat_template import ChatTemplate, Span, compile_template
from halfbyte.tokenizer.detokenizer import BYTE_TOKEN, decoder_steps

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

Messages = Sequence[Mapping[str, Any]]

# Characters from which other Python threads run while a text is encoded, as they do beside batches.
LONG = 1 << 14

# Byte-level vocabularies write bytes as letters: those that print as they are, others from 256 on.
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(byte): byte for byte in PRINTED}
BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(PRINTED)))}

NO_TEMPLATE = (
    "the model has no chat template, so how its turns are written is not known. hint: load the "
    "model's instruct version, put its chat_template.jinja beside tokenizer.json, set "
    "model.tokenizer.chat_template, or complete plain text (halfbyte chat --raw)"
)


class Tokenizer:
    """Text to token ids and back, with the same results as transformers' tokenizers.

    backend: the `tokenizers.Tokenizer`. special_tokens: role ("bos_token", "eos_token",
    "pad_token", ..) to text. chat_templates: name to jinja2 source; "default" is the model's own.
    config: tokenizer_config.json, kept for `save`. Nothing is ever added to the vocabulary: a
    special token that it lacks has no id.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.config = dict(config or {})
        self._mark_special()

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder: tokenizer.json and what lies beside it.

        Raises CheckpointError, naming the file, when one is missing, damaged or contradicts others.
        """
        folder = Path(path)
        backend = files.read_backend(folder)
        config = files.read_json(folder / files.CONFIG, missing={})
        files.add_listed_tokens(backend, folder, config)
        special_tokens = files.read_special_tokens(folder, config)
        return cls(backend, special_tokens, files.read_chat_templates(folder, config), config)

    @classmethod
    def from_gguf(cls, source: GGUFReader | str | Path) -> Tokenizer:
        """The tokenizer in a GGUF file, given by path or opened.

        SentencePiece BPE (Llama 2, Mistral) and byte-level BPE of Llama 3, Qwen 2 and 3, SmolLM,
        Mistral Nemo and GPT-2. Raises UnsupportedModelError for other kinds, CheckpointError for a
        damaged file.
        """
        reader = gguf.open_reader(str(source)) if isinstance(source, str | Path) else source
        vocabulary = gguf.Vocabulary(reader)
        special_tokens = gguf.read_special_tokens(vocabulary)
        templates = gguf.read_chat_templates(vocabulary)
        return cls(gguf.build_backend(vocabulary), special_tokens, templates)

    def _mark_special(self) -> None:
        """A special token may stand in the vocabulary as any other; text must match it whole."""
        from tokenizers import AddedToken

        known = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        missing = [text for text in self.special_tokens.values() if text not in known]
        inside = [text for text in missing if self.backend.token_to_id(text) is not None]
        self.backend.add_tokens([AddedToken(t, normalized=False, special=True) for t in inside])

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; special tokens written in it become their ids.

        add_special_tokens: also put bos (and eos) around it where the tokenizer's post-processor
        says so; like transformers, a tokenizer.json is not overruled by the config's add_bos_token.
        Raises UnicodeEncodeError, a ValueError, for surrogates, which tokenizers call no str.
        """
        text.encode()
        if len(text) < LONG:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids past the vocabulary are nothing, bytes that are no text U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @cached_property
    def letter(self) -> list[int]:
        """Ids to decode others behind where these are not the first, which loses its space."""
        return self.encode("a")[-1:]

    def piece(self, token_id: int, first: bool = False) -> str:
        """The text of one token amid others; first: at a text's begin, where a space is dropped."""
        before = self.decode(self.letter, skip_special_tokens=False)
        amid = self.decode([*self.letter, token_id], skip_special_tokens=False)[len(before) :]
        if first and amid == " " + (alone := self.decode([token_id], skip_special_tokens=False)):
            return alone
        return amid

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """The bytes that one token adds to a text, be they no whole character."""
        token = self.backend.id_to_token(token_id) or ""
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self._is_byte_level and all(letter in BYTES for letter in token):
            return bytes(BYTES[letter] for letter in token)
        return self.piece(token_id, first).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return any(step["type"] == "ByteLevel" for step in decoder_steps(self.decoder_config()))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` skips."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.backend.token_to_id(text)

    @property
    def chat_template(self) -> str | None:
        """The jinja2 source of the model's own template."""
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, source: str) -> None:
        self.chat_templates["default"] = source

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the text the model was trained on.

        messages: dicts with "role" and "content". add_generation_prompt: end with what opens the
        assistant's turn. chat_template: the name of one of `chat_templates`, or a jinja2 source.
        variables: seen by the template (`tools` as JSON schemas, `documents`, `enable_thinking`).
        Raises CheckpointError when there is no template, ValueError or TypeError for messages that
        it refuses.
        """
        template = self._template(chat_template, variables)
        return template.render(messages, add_generation_prompt, **self.special_tokens | variables)

    def chat_ids(
        self, messages: Messages, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of `apply_chat_template`, which writes bos itself where it is wanted."""
        return self.encode(self.apply_chat_template(messages, add_generation_prompt, **variables))

    def chat_ids_and_mask(
        self, messages: Messages, chat_template: str | None = None, **variables: Any
    ) -> tuple[list[int], list[int]]:
        """Token ids of a finished conversation, and 1 for those the assistant is to produce.

        The assistant's tokens are those between the template's `{% generation %}` tags, or else
        its turns up to and with their end token. Raises ValueError where that cannot be told.
        """
        template = self._template(chat_template, variables)
        added = self.backend.get_added_tokens_decoder()
        ends = [token.content for token in added.values()]
        given = self.special_tokens | variables
        text, spans = template.assistant_spans(messages, ends, **given)
        encoding = self._untrimmed.encode(text, add_special_tokens=False)
        return encoding.ids, _mask(encoding, spans, added.keys())

    @cached_property
    def _untrimmed(self) -> Backend:
        """A byte-level post-processor takes spaces out of the offsets, so that masks miss them."""
        if self.backend.post_processor is None:
            return self.backend
        bare = copy.deepcopy(self.backend)
        bare.post_processor = None
        return bare

    def _template(self, chosen: str | None, variables: Mapping[str, Any]) -> ChatTemplate:
        if chosen is None and variables.get("tools") and "tool_use" in self.chat_templates:
            chosen = "tool_use"
        source = self.chat_templates.get(chosen or "default", chosen)
        if source is None:
            others = sorted(self.chat_templates)
            named = f". It has the named templates {others}, to give as chat_template" * bool(
                others
            )
            raise CheckpointError(NO_TEMPLATE + named)
        return compile_template(source)

    def decoder_config(self) -> dict[str, Any] | None:
        """How tokens become text, as tokenizer.json writes it; None joins them with spaces."""
        decoder = self.backend.decoder
        return None if decoder is None else json.loads(decoder.__getstate__())

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat templates.

        The templates are both .jinja files, which transformers 5 reads, and inside the config,
        which older versions read.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(out / files.TOKENIZER))
        defaults = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config = defaults | {"clean_up_tokenization_spaces": False} | self.config
        for role, text in self.special_tokens.items():
            if files.content(config.get(role)) != text:
                config[role] = text
        config["chat_template"] = files.write_chat_templates(out, self.chat_templates)
        kept = {key: value for key, value in config.items() if value is not None}
        text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
        (out / files.CONFIG).write_text(text, encoding="utf-8")


def _mask(encoding: Encoding, spans: Sequence[Span], added: Iterable[int]) -> list[int]:
    """1 for the tokens from the first to the last that share a character with a span."""
    mask = [0] * len(encoding.ids)
    whole = set(added)
    for start, end in spans:
        inside = [
            index
            for index, (left, right) in enumerate(encoding.offsets)
            if left < end
            and right > start
            # An added token that takes the space after it belongs to the prompt.
            and (left >= start or encoding.ids[index] not in whole)
        ]
        if inside:
            first, last = inside[0], inside[-1] + 1
            mask[first:last] = [1] * (last - first)
    return mask
