"""Samples as token ids and loss masks, and batches of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from halfbyte.data.files import Malformed
from halfbyte.data.formats import FORMATS, BadRow, Chat, Pair, Sample, Text, Tokens
from halfbyte.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from halfbyte.tokenizer import Tokenizer

IGNORED = -100
REASONS_SHOWN = 5


class EncodedRow(NamedTuple):
    """One training row: ids int32 [T]; trained bool [T], true where the token is a label."""

    ids: np.ndarray
    trained: np.ndarray
    number: int

    @property
    def targets(self) -> int:
        """Labels that count: the first token has nothing to be predicted from."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class Encoder:
    """How samples become ids: the tokenizer and qlora.py's truncation lengths, in tokens.

    `context` is the model's longest sequence and `vocab_size` its number of token ids.
    """

    tokenizer: Tokenizer | None
    source_max_len: int = 1024
    target_max_len: int = 256
    max_seq_len: int = 2048
    train_on_source: bool = False
    context: int = 1 << 30
    vocab_size: int = 1 << 31

    def check(self, format_name: str) -> None:
        """Raise DataError if rows of this format cannot be tokenized at all."""
        if format_name == "tokenized":
            return
        if format_name == "messages" and not self._tokenizer.chat_template:
            raise DataError(
                "rows hold chat messages but the model has no chat template. "
                "hint: use an instruct model, or rows with prompt and completion, or text"
            )
        if format_name != "messages" and not self._tokenizer.eos_token:
            raise DataError("the tokenizer names no eos token, so a trained model would never stop")

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise DataError(
                "the model has no tokenizer. hint: put tokenizer.json beside its weights, "
                "or give rows with input_ids and labels"
            )
        return self.tokenizer

    def encode(self, sample: Sample, number: int) -> tuple[EncodedRow, bool]:
        """One row, and whether it was truncated; BadRow if nothing of it can be learnt."""
        if isinstance(sample, Pair):
            ids, trained, cut = self._pair(sample)
        elif isinstance(sample, Chat):
            ids, trained, cut = self._whole(*self._chat(sample))
        elif isinstance(sample, Text):
            ids, trained, cut = self._whole(*self._plain(sample))
        else:
            ids, trained, cut = self._whole(*_given(sample))
        cut = cut or len(ids) > self.context
        ids, trained = ids[: self.context], trained[: self.context]
        self._check_ids(ids)
        row = EncodedRow(np.asarray(ids, np.int32), np.asarray(trained, bool), number)
        self._check_row(row, cut)
        return row, cut

    def _pair(self, pair: Pair) -> tuple[list[int], list[bool], bool]:
        source = self._ids((self._tokenizer.bos_token or "") + pair.source)
        target = self._ids(pair.target + (self._tokenizer.eos_token or ""))
        cut = len(source) > self.source_max_len or len(target) > self.target_max_len
        source, target = source[: self.source_max_len], target[: self.target_max_len]
        trained = [self.train_on_source] * len(source) + [True] * len(target)
        return source + target, trained, cut

    def _chat(self, chat: Chat) -> tuple[list[int], list[bool]]:
        try:
            ids, mask = self._tokenizer.chat_ids_and_mask(chat.messages)
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise BadRow(str(error)) from error
        return ids, [True] * len(ids) if self.train_on_source else [bool(m) for m in mask]

    def _plain(self, text: Text) -> tuple[list[int], list[bool]]:
        if not text.text:
            raise BadRow("the text is empty")
        bos, eos = self._tokenizer.bos_token or "", self._tokenizer.eos_token or ""
        start = "" if text.text.startswith(bos) else bos
        ids = self._ids(start + text.text + eos)
        return ids, [True] * len(ids)

    def _whole(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool], bool]:
        limit = self.max_seq_len
        return ids[:limit], trained[:limit], len(ids) > limit

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _check_ids(self, ids: list[int]) -> None:
        """Before they become int32, which an id from a file may not fit."""
        low, high = min(ids, default=0), max(ids, default=0)
        if low < 0 or high >= self.vocab_size:
            outside = low if low < 0 else high
            raise BadRow(f"token id {outside} is outside the model's {self.vocab_size} ids")

    def _check_row(self, row: EncodedRow, cut: bool) -> None:
        if row.targets == 0:
            where = f" of the first {len(row.ids)} that fit" if cut else ""
            raise BadRow(f"no token{where} is trained on, all labels are masked")


def _given(sample: Tokens) -> tuple[list[int], list[bool]]:
    return sample.ids, [label != IGNORED for label in sample.labels]


@dataclass
class DataReport:
    """What became of the rows: counts, the reasons for skips, and how the format was chosen."""

    format: str
    detected: bool
    read: int = 0
    kept: int = 0
    truncated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[int, str]] = field(default_factory=list)

    def skip(self, number: int, reason: str) -> None:
        self.skipped[reason] += 1
        if len(self.examples) < REASONS_SHOWN:
            self.examples.append((number, reason))

    def lines(self) -> list[str]:
        """Sentences for people, the first one a summary."""
        how = "detected from the columns" if self.detected else "as asked"
        count = self.skipped.total()
        summary = f"{self.read} rows in format {self.format} ({how}): {self.kept} sequences"
        lines = [f"{summary}, {self.truncated} truncated, {count} skipped"]
        lines += [f"  skipped row {number}: {reason}" for number, reason in self.examples]
        if count > len(self.examples):
            lines.append(f"  and {count - len(self.examples)} more skipped rows")
        return lines


def encode_rows(
    rows: Iterable[Any], encoder: Encoder, format_name: str, report: DataReport
) -> list[EncodedRow]:
    """Tokenize every row now, so that no bad one is met in the middle of a run.

    Rows are numbered from 1. Bad ones are counted in `report` and left out as a whole.
    """
    encoder.check(format_name)
    encoded: list[EncodedRow] = []
    for number, row in enumerate(rows, start=1):
        report.read += 1
        try:
            pairs = [encoder.encode(sample, number) for sample in _samples(row, format_name)]
        except BadRow as error:
            report.skip(number, str(error))
            continue
        encoded += [one for one, _ in pairs]
        report.truncated += sum(cut for _, cut in pairs)
    report.kept = len(encoded)
    return encoded


def _samples(row: Any, format_name: str) -> list[Sample]:
    if isinstance(row, Malformed):
        raise BadRow(row.reason)
    if not isinstance(row, dict):
        raise BadRow(f"it is {type(row).__name__}, expected an object with named columns")
    return FORMATS[format_name](row)


def check_report(report: DataReport, strict: bool) -> None:
    """Raise DataError if no row is left, or if `strict` and a row was skipped."""
    if report.kept == 0:
        raise DataError("\n".join(["no usable row", *report.lines()]))
    if strict and report.skipped:
        raise DataError("\n".join(["strict: every row must be usable", *report.lines()]))


def collate(rows: Sequence[EncodedRow], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels, int64 [B, T]; labels are -100 where nothing is learnt.

    Padding needs no token and no mask of its own: under causal attention no real token sees what
    follows it, and padded labels are ignored.
    """
    longest = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    labels = np.full((len(rows), longest), IGNORED, np.int64)
    for line, row in enumerate(rows):
        ids[line, : len(row.ids)] = row.ids
        labels[line, : len(row.ids)] = np.where(row.trained, row.ids, IGNORED)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def data_fingerprint(rows: Sequence[EncodedRow]) -> str:
    """sha256 over the ids and masks of all rows in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.ids).to_bytes(8, "little"))
        digest.update(row.ids.tobytes())
        digest.update(row.trained.tobytes())
    return digest.hexdigest()
