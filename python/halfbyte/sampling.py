"""From logits to the next token: penalties, filters and a draw that only its row decides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    Order: repetition_penalty, frequency_penalty, presence_penalty, temperature, top_k, top_p,
    min_p, then a draw from the fp32 probabilities that are left. temperature 0 takes the largest
    penalized logit and skips the rest.

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
    stop: strings that end the text and are not part of it.

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
    stop: str | Sequence[str] = ()

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
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for string in stop:
            _require(isinstance(string, str) and string != "", "stop", "non-empty strings", string)
        object.__setattr__(self, "stop", stop)

    @property
    def penalizes(self) -> bool:
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _require_int(value: object, name: str, least: int) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
    _require(whole, name, f"an integer >= {least}", value)


class TokenCounts:
    """Which tokens each row has seen, and how often its reply holds them; on the logits' device."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab_size: int, device) -> None:
        shape = (len(prompts), vocab_size)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self.replied = torch.zeros(shape, dtype=torch.float32, device=device)
        for row, prompt in enumerate(prompts):
            self.seen[row, torch.tensor(prompt, device=device)] = True

    def add(self, tokens: Sequence[int]) -> None:
        """Count one new token of each row."""
        index = torch.tensor(tokens, device=self.seen.device)[:, None]
        self.seen.scatter_(1, index, True)
        self.replied.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.seen, self.replied = self.seen[list(rows)], self.replied[list(rows)]

    def penalize(self, logits: Tensor, sampling: Sampling) -> Tensor:
        """fp32 logits [B, V] after the three penalties."""
        penalty = sampling.repetition_penalty
        if penalty != 1:
            repeated = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(self.seen, repeated, logits)
        if sampling.frequency_penalty or sampling.presence_penalty:
            logits = logits - sampling.frequency_penalty * self.replied
            logits = logits - sampling.presence_penalty * (self.replied > 0)
        return logits


def candidates(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Apply top_k, top_p and min_p to scores [B, V], log-probabilities up to a constant.

    Returns scores [B, C], -inf where a token is dropped, and the tokens they belong to [B, C]; None
    for the tokens means that C is V and each score is still at its token's place.
    """
    tokens = None
    if sampling.top_k or sampling.top_p < 1:
        kept = min(sampling.top_k or scores.shape[-1], scores.shape[-1])
        scores, tokens = scores.topk(kept)
    if sampling.top_p < 1:
        probabilities = scores.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities
        scores = scores.masked_fill(likelier >= sampling.top_p, -math.inf)
    if sampling.min_p > 0:
        floor = scores.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < floor, -math.inf)
    return scores, tokens


def _mix(x: int) -> int:
    """splitmix64's finalizer (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the token's position."""
    key = _mix(seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15 & MASK64)
    # 48 bits, so that the product with a sum of probabilities stays below that sum.
    return (_mix(key + position * 0x9E3779B97F4A7C15 & MASK64) >> 16) / (1 << 48)


def _draw(scores: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Index [B] where each row's cumulative probability passes its uniform number."""
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    target = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)
    target = target[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def sample(
    logits: Tensor,
    sampling: Sampling,
    counts: TokenCounts | None,
    seeds: Sequence[int],
    positions: Sequence[int],
) -> list[int]:
    """The next token of each row of logits [B, V]; positions are those of the new tokens.

    Raises FloatingPointError naming the row where logits are NaN or infinite.
    """
    logits = logits.float()
    best = logits.amax(-1).tolist()
    for row, value in enumerate(best):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"logits of row {row} at position {positions[row]}: expected finite numbers, got "
                f"{value}; do the weights or the adapter hold NaN, or did float16 overflow?"
            )
    if counts is not None:
        logits = counts.penalize(logits, sampling)
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    # Less the maximum first: a tiny temperature must not turn large logits into Inf - Inf.
    scores = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    scores, tokens = candidates(scores, sampling)
    uniforms = [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    index = _draw(scores, uniforms)
    if tokens is not None:
        index = tokens.gather(1, index[:, None])[:, 0]
    return index.tolist()
