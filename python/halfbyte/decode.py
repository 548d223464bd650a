"""The decode step: one token for each running sequence, captured once, replayed from then on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.adapters import Adapter, Adapters
from halfbyte.capture import Captured
from halfbyte.kv_cache import SPARE_BLOCK, CacheStep, KVCache
from halfbyte.models import Decoder
from halfbyte.sampling import Kind, Sampled, SamplingRows

# A step runs for so many rows; the ones that no sequence has are computed and ignored.
BUCKETS = (1, 2, 4, 8, 16, 32)


class Variant(NamedTuple):
    """What one captured step can do: for how many rows, how they sample, whether with adapters."""

    rows: int
    kind: Kind
    adapted: bool


class Results(NamedTuple):
    """What one step sampled, on its way to the host."""

    sampled: Sampled
    arrived: torch.cuda.Event | None

    def read(self) -> Sampled:
        """Wait for it to arrive."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.sampled


@contextmanager
def evaluating(model: Decoder) -> Iterator[None]:
    """Dropout off for one forward, each module's mode as it was afterwards."""
    training = [m for m in model.modules() if m.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class DecodeStep:
    """The state of up to `rows` sequences on the device, and the step that advances them.

    Row b feeds tokens[b] at positions[b]; the step samples its next token and moves it there. A
    row that no sequence has stays at position 0 of the spare block. Each variant of the step is
    captured.
    """

    def __init__(
        self, model: Decoder, cache: KVCache, rows: int, width: int, pool: Any = None
    ) -> None:
        device = cache.device
        self.model, self.cache = model, cache
        self.sampling = SamplingRows(rows, model.config.vocab_size, device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = torch.ones(rows, dtype=torch.int32, device=device)
        self.running = torch.zeros(rows, dtype=torch.int32, device=device)
        self.tables = torch.full((rows, width), SPARE_BLOCK, dtype=torch.int32, device=device)
        self.arrived = cache.arrivals(rows)
        self.adapters = Adapters(model, rows)
        self.steps: dict[Variant, Captured[Sampled]] = {}
        # A step in two parts, and what passes from the first to the second.
        self.logits: Tensor | None = None
        self.forwards: dict[tuple[int, bool], Captured[None]] = {}
        self.draws: dict[tuple[int, Kind], Captured[Sampled]] = {}
        self._pool = pool

    def place(
        self,
        row: int,
        table: Sequence[int],
        token: Tensor,
        position: int,
        adapter: Adapter | None = None,
    ) -> None:
        """Let a sequence run in a row: its blocks, and its newest token (int64 [1]) to be fed."""
        self.adapters.use(row, adapter)
        padded = [*table, *[SPARE_BLOCK] * (self.tables.shape[1] - len(table))]
        blocks = torch.tensor(padded, dtype=torch.int32)
        self.tables[row].copy_(blocks, non_blocking=True)
        self.tokens[row : row + 1].copy_(token.clamp(min=0))
        self.positions[row].fill_(position)
        self.lengths[row].fill_(position + 1)
        self.running[row].fill_(1)

    def remove(self, row: int) -> None:
        """Let no sequence run in a row."""
        self.adapters.use(row, None)
        self.tables[row].fill_(SPARE_BLOCK)
        self.positions[row].fill_(0)
        self.lengths[row].fill_(1)
        self.running[row].fill_(0)

    def move(self, source: int, target: int) -> None:
        """Let a row's sequence run in another row."""
        for state in (self.tables, self.tokens, self.positions, self.lengths, self.running):
            state[target].copy_(state[source])
        if self.logits is not None:
            self.logits[target].copy_(self.logits[source])
        self.sampling.move(source, target)
        self.adapters.move(source, target)
        self.remove(source)

    def launch(self, rows: int, kind: Kind, adapted: bool = False) -> Results:
        """Queue one step of the first `rows` rows; adapted: whether some row uses an adapter."""
        key = Variant(_bucket(rows), kind, adapted)
        if key not in self.steps:
            work = partial(self._run, *key)
            self.steps[key] = Captured(work, self.cache.device, self._pool)
        return self.to_host(self.steps[key]())

    def forward(self, rows: int, adapted: bool = False) -> None:
        """Queue the first part of a step: all but the tokens, which `draw` gives."""
        key = _bucket(rows), adapted
        if key not in self.forwards:
            work = partial(self._keep, *key)
            self.forwards[key] = Captured(work, self.cache.device, self._pool)
        self.forwards[key]()

    def draw(self, rows: int, kind: Kind) -> Results:
        """Queue the second part, of those first rows that are still there."""
        key = _bucket(rows), kind
        if key not in self.draws:
            work = partial(self._draw, *key)
            self.draws[key] = Captured(work, self.cache.device, self._pool)
        return self.to_host(self.draws[key]())

    def rearrange(self) -> None:
        """Follow adapters that came or went; what was captured with the old ones is dropped."""
        self.adapters.arrange()
        self.steps = {key: step for key, step in self.steps.items() if not key.adapted}
        self.forwards = {key: forward for key, forward in self.forwards.items() if not key[1]}

    def _run(self, rows: int, kind: Kind, adapted: bool) -> Sampled:
        return self._sample(self._logits(rows, adapted), kind)

    def _keep(self, rows: int, adapted: bool) -> None:
        logits = self._logits(rows, adapted)
        if self.logits is None:
            self.logits = logits.new_empty(len(self.tokens), logits.shape[-1])
        self.logits[:rows].copy_(logits)

    def _draw(self, rows: int, kind: Kind) -> Sampled:
        assert self.logits is not None
        return self._sample(self.logits[:rows], kind)

    def _logits(self, rows: int, adapted: bool) -> Tensor:
        """Those of each row's next token, whose position the row takes."""
        part = slice(0, rows)
        step = CacheStep(
            cache=self.cache,
            tables=self.tables[part],
            lengths=self.lengths[part],
            positions=self.positions[part, None],
            arrived=self.arrived[part],
        )
        with evaluating(self.model), self.adapters.rows(part, adapted):
            logits = self.model(self.tokens[part, None], cache=step, last_only=True).logits
        self.positions[part].add_(self.running[part])
        self.lengths[part].add_(self.running[part])
        return logits[:, 0]

    def _sample(self, logits: Tensor, kind: Kind) -> Sampled:
        part = slice(0, len(logits))
        sampled = self.sampling.sample(logits, self.positions[part], 0, kind)
        self.tokens[part].copy_(sampled.tokens.clamp(min=0))
        return sampled

    def to_host(self, sampled: Sampled) -> Results:
        """Send a step's results on their way."""
        if not self.tokens.is_cuda:
            # The next step may write its results over these before they are read.
            return Results(Sampled(*(None if x is None else x.clone() for x in sampled)), None)
        host = Sampled(
            _pinned(sampled.tokens),
            None if sampled.logprobs is None else _pinned(sampled.logprobs),
            None if sampled.alternatives is None else _pinned(sampled.alternatives),
        )
        arrived = torch.cuda.Event()
        arrived.record()
        return Results(host, arrived)


def _bucket(rows: int) -> int:
    return next(size for size in BUCKETS if size >= rows)


def _pinned(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
