"""From logits to the next token: penalties, filters and a draw that only its row decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.ops import draw

INT32_MAX = (1 << 31) - 1
MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# Most alternatives whose log-probabilities are kept for a token, as in OpenAI's API.
MAX_LOGPROBS = 20
# Stands for a token where logits were not finite.
NOT_FINITE = -1
# Most of what is added to a logit or divides it: fp32 holds what comes of it.
MAX_EDIT = 1e30
# A penalty multiplies and divides logits; one of fp32's smallest numbers would make them infinite.
REPETITION_PENALTIES = (0.01, 100.0)
# Steps whose tokens the host has not read, at most: a prompt's first ones and those of two steps.
SLOTS = 4


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    Order: logit_bias, repetition_penalty, frequency_penalty, presence_penalty, json_schema,
    temperature, top_k, top_p, min_p, then a draw from the fp32 probabilities that are left.
    temperature 0 takes the largest penalized logit that is allowed and skips the rest.

    temperature: divides the logits; 0 is greedy.
    top_k: keeps the k most likely tokens; 0 is off.
    top_p: keeps the fewest most likely tokens whose probabilities reach it.
    min_p: keeps tokens at least this fraction as likely as the likeliest.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or
        the reply (arXiv 1909.05858).
    frequency_penalty: subtracted from the logit of a token for each time the reply holds it.
    presence_penalty: subtracted once from the logit of a token that the reply holds.
    seed: the same text from the same prompt, whatever else is in the batch; None draws one from
        torch's generator.
    max_new_tokens: at most so many.
    min_new_tokens: no eos or stop id before so many.
    stop: strings that end the text and are not part of it.
    stop_ids: token ids that end the reply beside the model's own, and are not part of it.
    logit_bias: added to the logits of these token ids.
    logprobs: how many alternatives to report with each token's log-probability, at most 20; None
        reports nothing.
    json_schema: the reply is JSON that this schema allows, and ends where it is complete;
        {"type": "object"} allows any object. Needs the extra `json`.

    Raises ValueError naming the field that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = field(default=(), metadata={"python_only": True})
    logit_bias: Mapping[int, float] = field(
        default_factory=dict, metadata={"python_only": True}, hash=False
    )
    logprobs: int | None = field(default=None, metadata={"python_only": True})
    json_schema: Mapping[str, Any] | None = field(
        default=None, metadata={"python_only": True}, hash=False
    )

    def __post_init__(self) -> None:
        warmest = f"in [0, {MAX_EDIT:g}]"
        _require(0 <= self.temperature <= MAX_EDIT, "temperature", warmest, self.temperature)
        _require_int(self.top_k, "top_k", 0)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        penalty, (least, most) = self.repetition_penalty, REPETITION_PENALTIES
        _require(least <= penalty <= most, "repetition_penalty", f"in [{least}, {most}]", penalty)
        for name in ("frequency_penalty", "presence_penalty"):
            _require_edit(getattr(self, name), name)
        if self.seed is not None:
            _require_int(self.seed, "seed", 0)
        _require_int(self.max_new_tokens, "max_new_tokens", 1)
        _require_int(self.min_new_tokens, "min_new_tokens", 0)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for string in stop:
            _require(isinstance(string, str) and string != "", "stop", "non-empty strings", string)
        object.__setattr__(self, "stop", stop)
        for token in self.stop_ids:
            _require_int(token, "stop_ids", 0)
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        for token, bias in self.logit_bias.items():
            _require_int(token, "logit_bias", 0)
            _require_edit(bias, "logit_bias")
        if self.logprobs is not None:
            _require_int(self.logprobs, "logprobs", 0)
            _require(self.logprobs <= MAX_LOGPROBS, "logprobs", "<= 20", self.logprobs)
        if self.json_schema is not None:
            schema = self.json_schema
            _require(isinstance(schema, Mapping), "json_schema", "a mapping", schema)
            least = self.min_new_tokens
            _require(least == 0, "min_new_tokens", "0 beside json_schema", least)

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)

    @property
    def kind(self) -> Kind:
        """Which parts of sampling it needs."""
        edits = self.penalizes or bool(self.logit_bias) or self.min_new_tokens > 0
        return Kind(edits, self.logprobs is not None, self.json_schema is not None)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _require_edit(value: float, name: str) -> None:
    _require(abs(value) <= MAX_EDIT, name, f"in [-{MAX_EDIT:g}, {MAX_EDIT:g}]", value)


def _require_int(value: object, name: str, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _require(whole, name, f"an integer >= {least}", value)


class Kind(NamedTuple):
    """What a batch needs beside the draw; a row gets the same token with any others on."""

    edits: bool = False
    logprobs: bool = False
    masked: bool = False

    def __or__(self, other: Kind) -> Kind:  # type: ignore[override]
        return Kind(*(a or b for a, b in zip(self, other, strict=True)))


class Sampled(NamedTuple):
    """tokens: int32 [B], -1 where logits were not finite. logprobs: fp32 [B, 1 + MAX_LOGPROBS] of
    the token and the likeliest tokens, alternatives: int64 [B, MAX_LOGPROBS] which those are.

    From a GPU tokens are on their way to the host, in pinned memory."""

    tokens: Tensor
    logprobs: Tensor | None
    alternatives: Tensor | None


def _mix(x: int) -> int:
    """splitmix64's finalizer (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    """The int64 of the same bits."""
    return x - (1 << 64) if x >> 63 else x


def seed_key(seed: int) -> int:
    """What a row keeps of its seed, an int64."""
    return _signed(_mix(seed * GOLDEN + GOLDEN & MASK64))


class Edits(NamedTuple):
    """What changes single logits of each row, [rows, vocab_size] each.

    seen: bool, in the prompt or the reply. replied: fp32, how often in the reply. bias: fp32.
    ends: bool, ids that end the reply.
    """

    seen: Tensor
    replied: Tensor
    bias: Tensor
    ends: Tensor

    @classmethod
    def empty(cls, rows: int, vocab_size: int, device: torch.device | str) -> Edits:
        dtypes = (torch.bool, torch.float32, torch.float32, torch.bool)
        return cls(*(torch.zeros(rows, vocab_size, dtype=d, device=device) for d in dtypes))

    def rows(self, part: slice) -> Edits:
        return Edits(*(table[part] for table in self))

    def set(
        self,
        row: int,
        bias: Mapping[int, float],
        prompt: Sequence[int],
        reply: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """Let a row be that of a sequence which holds `prompt` and has replied `reply`."""

        def ids(tokens: Iterable[int]) -> Tensor:
            return torch.tensor(list(tokens), dtype=torch.int64, device=self.seen.device)

        for table in self:
            table[row].zero_()
        self.seen[row, ids([*prompt, *reply])] = True
        once = torch.ones_like(ids(reply), dtype=torch.float32)
        self.replied[row].index_add_(0, ids(reply), once)
        self.bias[row, ids(bias)] = self.bias.new_tensor(list(bias.values()))
        self.ends[row, ids(ends)] = True

    def apply(self, logits: Tensor, penalties: Tensor, early: Tensor) -> Tensor:
        """fp32 logits [B, V] after bias, penalties and the least length.

        penalties: fp32 [B, 3], repetition, frequency and presence. early: bool [B], true where a
        reply may not end yet.
        """
        repetition, frequency, presence = penalties.unbind(1)
        logits = logits + self.bias
        penalty = repetition[:, None]
        repeated = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(self.seen, repeated, logits)
        logits = logits - frequency[:, None] * self.replied
        logits = logits - presence[:, None] * (self.replied > 0)
        return logits.masked_fill(early[:, None] & self.ends, -math.inf)

    def note(self, tokens: Tensor) -> None:
        """Count one new token of each row."""
        index = tokens[:, None]
        self.seen.scatter_(1, index, True)
        self.replied.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))


class SamplingRows:
    """The settings of `rows` rows and the tokens they have seen, on one device.

    A captured step reads them there, so a row's settings may change between two launches.
    tokens: the newest of each row. lengths: tokens of a row, the newest included; 1 where no
    sequence runs, and `running` is 0.
    """

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        def ints(value: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.tokens, self.lengths, self.running = ints(), ints(1), ints()
        # temperature, top_p, min_p; then the penalties: repetition, frequency, presence.
        self.settings = torch.zeros(rows, 3, dtype=torch.float32, device=device)
        self.penalties = torch.zeros_like(self.settings)
        self.top_k, self.keys = ints(), ints(dtype=torch.int64)
        # Of a sequence, when its next token may be an end.
        self.first_ends = ints()
        self.edits: Edits | None = None
        # Of each row, a bit for each token that may come next.
        self.masks: Tensor | None = None
        self._slots = cycle(_shared(SLOTS, rows, self.tokens.device).unbind())

    def set(
        self,
        row: int,
        sampling: Sampling,
        seed: int,
        prompt: Sequence[int],
        reply: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """Let a sequence run in a row that holds `prompt` and has replied `reply`."""
        settings = (sampling.temperature, sampling.top_p, sampling.min_p)
        self.settings[row].copy_(_on_host(settings), non_blocking=True)
        penalties = (
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        self.penalties[row].copy_(_on_host(penalties), non_blocking=True)
        self.top_k[row].fill_(min(sampling.top_k or self.vocab_size, self.vocab_size))
        self.keys[row].fill_(seed_key(seed))
        self.first_ends[row].fill_(min(len(prompt) + sampling.min_new_tokens, INT32_MAX))
        self.lengths[row].fill_(len(prompt) + len(reply))
        self.running[row].fill_(1)
        if self.edits is None and sampling.kind.edits:
            self.edits = Edits.empty(len(self.tokens), self.vocab_size, self.tokens.device)
        if self.edits is not None:
            self.edits.set(row, sampling.logit_bias, prompt, reply, ends)
        if self.masks is not None:
            self.masks[row].fill_(-1)

    def allow(self, row: int, mask: Tensor) -> None:
        """Let a row's next token be one of those that its grammar's mask (on the CPU) allows."""
        if self.masks is None:
            self.masks = self.tokens.new_full((len(self.tokens), len(mask)), -1)
        self.masks[row].copy_(mask, non_blocking=True)

    def remove(self, row: int) -> None:
        """Let no sequence run in a row."""
        self.lengths[row].fill_(1)
        self.running[row].fill_(0)

    def move(self, source: int, target: int) -> None:
        """Let a row's sequence run in another row."""
        state = (self.tokens, self.lengths, self.running, self.first_ends)
        settings = (self.settings, self.penalties, self.top_k, self.keys, self.masks)
        for table in (*state, *settings, *(self.edits or ())):
            if table is not None:
                table[target].copy_(table[source])
        self.remove(source)

    def sample(self, logits: Tensor, first: int, kind: Kind) -> Sampled:
        """Give rows `first` on their next token, from their logits [B, V].

        kind: what at least one row needs. Tokens reported SLOTS calls ago are written over.
        """
        part = slice(first, first + len(logits))
        tokens, lengths = self.tokens[part], self.lengths[part]
        edits = self.edits.rows(part) if self.edits is not None and kind.edits else None
        scores = logits
        if edits is not None:
            early = lengths < self.first_ends[part]
            scores = edits.apply(logits.float(), self.penalties[part], early)
        if self.masks is not None and kind.masked:
            scores = scores.masked_fill(~_bits(self.masks[part], scores.shape[-1]), -math.inf)
        reported = next(self._slots)[part]
        chosen = (self.settings[part], self.top_k[part], self.keys[part], self.running[part])
        draw(scores, *chosen, lengths, tokens, reported)
        logprobs = alternatives = None
        if edits is not None or kind.logprobs:
            drawn = tokens.long()
            if edits is not None:
                edits.note(drawn)
            if kind.logprobs:
                every = logits.float().log_softmax(-1)
                top, alternatives = every.topk(min(MAX_LOGPROBS, every.shape[-1]))
                logprobs = torch.cat((every.gather(1, drawn[:, None]), top), 1)
        return Sampled(reported, logprobs, alternatives)


def _on_host(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _shared(slots: int, rows: int, device: torch.device) -> Tensor:
    """int32 [slots, rows] on the host, where `device` can write."""
    if device.type != "cuda":
        return torch.zeros(slots, rows, dtype=torch.int32, device="cpu")
    shared = torch.zeros(slots, rows, dtype=torch.int32, device="cpu", pin_memory=True)
    # A copy tells torch that the stream writes here: nobody else gets the memory before that ends.
    return shared.copy_(torch.zeros_like(shared, device=device), non_blocking=True)


def _bits(masks: Tensor, count: int) -> Tensor:
    """bool [B, count] of int32 [B, words], lowest bits first."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).flatten(1)[:, :count].bool()
