"""Ids to text, one id at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.tokenizer.tokenizer import Tokenizer

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
REPLACEMENT = "\ufffd"
# Decoders whose text does not change when more tokens follow, but for a character's missing bytes.
STEADY = {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}


class Detokenizer:
    """Text pieces of a growing list of ids, each valid Unicode, none ever taken back.

    The pieces and the flush joined are exactly `tokenizer.decode` of all ids; where these go on
    with a text, `continues`, the space stays which SentencePiece drops from the first one. Held
    back is only what may still change: the bytes of an unfinished character and, for byte-fallback
    vocabularies, a run of byte tokens, which decodes as a whole. A decoder of a kind that looks
    ahead gives its whole text at the flush.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        steps = list(decoder_steps(tokenizer.decoder_config()))
        self._steady = all(_is_steady(step) for step in steps)
        self._byte_fallback = any(step["type"] == "ByteFallback" for step in steps)
        self._context: list[int] = tokenizer.letter if continues else []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain; "" if there is none yet."""
        token = self._tokenizer.backend.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        self._pending.append(token_id)
        if not self._steady or (self._byte_fallback and BYTE_TOKEN.fullmatch(token)):
            return ""
        text = self._text()
        if text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = [token_id], []
        return text

    def flush(self) -> str:
        """The rest, with U+FFFD for bytes that never became a character; starts over."""
        text = self._text() if self._pending else ""
        self._context, self._pending = [], []
        return text

    def _text(self) -> str:
        """The pending text as it reads after the token before it, whose presence keeps a space."""
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def decoder_steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """What a decoder does, one thing after the other."""
    if decoder is None:
        return
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for inner in decoder["decoders"]:
        yield from decoder_steps(inner)


def _is_steady(step: dict[str, Any]) -> bool:
    trims_end = step["type"] == "Strip" and step["stop"] != 0
    return step["type"] in STEADY and not trims_end
