"""From logits to the next token: penalties, filters and a draw that only its row decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.ops import draw

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# Most alternatives whose log-probabilities are kept for a token, as in OpenAI's API.
MAX_LOGPROBS = 20
# Stands for a token where logits were not finite.
NOT_FINITE = -1


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
        _require(0 <= self.temperature < math.inf, "temperature", ">= 0", self.temperature)
        _require_int(self.top_k, "top_k", 0)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]", self.min_p)
        penalty = self.repetition_penalty
        _require(0 < penalty < math.inf, "repetition_penalty", "> 0", penalty)
        for name in ("frequency_penalty", "presence_penalty"):
            _require(math.isfinite(getattr(self, name)), name, "finite", getattr(self, name))
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
            _require(math.isfinite(bias), "logit_bias", "finite", bias)
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
        draws = self.temperature > 0
        edits = self.penalizes or bool(self.logit_bias) or self.min_new_tokens > 0
        return Kind(draws, edits, self.logprobs is not None, self.json_schema is not None)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _require_int(value: object, name: str, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _require(whole, name, f"an integer >= {least}", value)


class Kind(NamedTuple):
    """The parts of sampling that a batch needs; a row gets the same token with any others on."""

    draws: bool = False
    edits: bool = False
    logprobs: bool = False
    masked: bool = False

    def __or__(self, other: Kind) -> Kind:  # type: ignore[override]
        return Kind(*(a or b for a, b in zip(self, other, strict=True)))


class Sampled(NamedTuple):
    """tokens: int64 [B], -1 where logits were not finite. logprobs: fp32 [B, 1 + MAX_LOGPROBS] of
    the token and the likeliest tokens, alternatives: int64 [B, MAX_LOGPROBS] which those are."""

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
            return torch.tensor(list(tokens), dtype=torch.int64).to(self.seen.device)

        for table in self:
            table[row].zero_()
        self.seen[row, ids([*prompt, *reply])] = True
        self.replied[row].index_add_(0, ids(reply), torch.ones(len(reply)).to(self.bias.device))
        self.bias[row, ids(bias)] = torch.tensor(list(bias.values())).to(self.bias)
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
        index = tokens.clamp(min=0)[:, None]
        self.seen.scatter_(1, index, True)
        self.replied.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))


class SamplingRows:
    """The settings of `rows` rows and the tokens they have seen, on one device.

    A captured step reads them there, so a row's settings may change between two launches.
    """

    SCALARS = (
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
    )

    def __init__(self, rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.scalars = torch.zeros(rows, len(self.SCALARS), device=device)
        # top_k, the seed's key and the position of the first token that may be an end.
        self.integers = torch.zeros(rows, 3, dtype=torch.int64, device=device)
        self.edits: Edits | None = None
        # Of each row, a bit for each token that may come next.
        self.masks: Tensor | None = None

    def set(
        self,
        row: int,
        sampling: Sampling,
        seed: int,
        prompt: Sequence[int],
        reply: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """Give a row the settings of a sequence that holds `prompt` and has replied `reply`."""
        top_k = min(sampling.top_k or self.vocab_size, self.vocab_size)
        first_end = len(prompt) + sampling.min_new_tokens
        scalars = [getattr(sampling, name) for name in self.SCALARS]
        self.scalars[row].copy_(torch.tensor(scalars, dtype=torch.float32), non_blocking=True)
        integers = torch.tensor([top_k, seed_key(seed), first_end])
        self.integers[row].copy_(integers, non_blocking=True)
        if self.edits is None and sampling.kind.edits:
            self.edits = Edits.empty(len(self.scalars), self.vocab_size, self.scalars.device)
        if self.edits is not None:
            self.edits.set(row, sampling.logit_bias, prompt, reply, ends)
        if self.masks is not None:
            self.masks[row].fill_(-1)

    def allow(self, row: int, mask: Tensor) -> None:
        """Let a row's next token be one of those that its grammar's mask (on the CPU) allows."""
        if self.masks is None:
            self.masks = self.integers.new_full((len(self.integers), len(mask)), -1).int()
        self.masks[row].copy_(mask, non_blocking=True)

    def move(self, source: int, target: int) -> None:
        """Copy a row's settings and tokens to another row."""
        for table in (self.scalars, self.integers, *(self.edits or ()), self.masks):
            if table is not None:
                table[target].copy_(table[source])

    def sample(self, logits: Tensor, positions: Tensor, first: int, kind: Kind) -> Sampled:
        """The next token of rows `first` on, from their logits [B, V].

        positions: int64 [B] of the new tokens. kind: the parts that at least one row needs.
        """
        part = slice(first, first + len(logits))
        # 16 bits order tokens as well as 32 do.
        logits = logits.float() if kind != Kind() else logits
        edits = self.edits.rows(part) if self.edits is not None and kind.edits else None
        scores = logits
        if edits is not None:
            early = positions < self.integers[part, 2]
            scores = edits.apply(logits, self.scalars[part, 3:], early)
        if self.masks is not None and kind.masked:
            scores = scores.masked_fill(~_bits(self.masks[part], scores.shape[-1]), -math.inf)
        # The largest is NaN if any is.
        largest, tokens = scores.max(-1)
        finite = largest.isfinite()
        if kind.draws:
            tokens = self._draw(scores, tokens, positions, part)
        if edits is not None:
            edits.note(tokens)
        logprobs = alternatives = None
        if kind.logprobs:
            every = logits.log_softmax(-1)
            top, alternatives = every.topk(min(MAX_LOGPROBS, every.shape[-1]))
            logprobs = torch.cat((every.gather(1, tokens[:, None]), top), 1)
        return Sampled(tokens.where(finite, NOT_FINITE), logprobs, alternatives)

    def _draw(self, scores: Tensor, best: Tensor, positions: Tensor, part: slice) -> Tensor:
        """`best` for rows of temperature 0, a drawn token for the others."""
        settings = self.scalars[part, :3]
        top_k, keys, _ = self.integers[part].unbind(1)
        drawn = draw(scores, settings, top_k, keys, positions)
        return best.where(settings[:, 0] == 0, drawn)


def _bits(masks: Tensor, count: int) -> Tensor:
    """bool [B, count] of int32 [B, words], lowest bits first."""
    bits = torch.arange(32, dtype=torch.int32, device=masks.device)
    return ((masks[:, :, None] >> bits) & 1).flatten(1)[:, :count].bool()
