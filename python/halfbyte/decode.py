"""The decode step: one token for each running sequence, captured once, replayed from then on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.adapters import Adapter, Adapters
from halfbyte.kv_cache import SPARE_BLOCK, CacheStep, KVCache
from halfbyte.models import Decoder
from halfbyte.recording import Recording, record
from halfbyte.sampling import Kind, Sampled, SamplingRows

# A step runs for so many rows; the ones that no sequence has are computed and ignored.
BUCKETS = (1, 2, 4, 8, 16, 32)


class Variant(NamedTuple):
    """What one captured step can do: for how many rows, how they sample, whether with adapters."""

    rows: int
    kind: Kind
    adapted: bool


class Results(NamedTuple):
    """What one step sampled, on its way to the host; `wait` for it first."""

    tokens: Tensor
    logprobs: Tensor | None
    alternatives: Tensor | None
    arrived: torch.cuda.Event | None

    def wait(self) -> None:
        if self.arrived is not None:
            self.arrived.synchronize()


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
    row that no sequence has stays at position 0 of the spare block. Each variant is run as it is
    the first time, captured (on CUDA) or recorded (on the CPU) the second time and replayed from
    then on; all give the same bits.
    """

    def __init__(self, model: Decoder, cache: KVCache, rows: int, width: int) -> None:
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
        self.graphs: dict[Variant, torch.cuda.CUDAGraph | Recording | None] = {}
        self._sampled: dict[Variant, Sampled] = {}
        self._pool = None

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
        self.sampling.move(source, target)
        self.adapters.move(source, target)
        self.remove(source)

    def launch(self, rows: int, kind: Kind, adapted: bool = False) -> Results:
        """Queue one step of the first `rows` rows; adapted: whether some row uses an adapter."""
        key = Variant(next(size for size in BUCKETS if size >= rows), kind, adapted)
        if key not in self.graphs:
            self.graphs[key] = None
            return self.to_host(self._run(*key))
        graph = self.graphs[key]
        if graph is not None:
            graph.replay()
        elif self.tokens.is_cuda:
            self._capture(key).replay()
        else:
            self.graphs[key], self._sampled[key] = record(lambda: self._run(*key))
        return self.to_host(self._sampled[key])

    def rearrange(self) -> None:
        """Follow adapters that came or went; what was captured with the old ones is dropped."""
        self.adapters.arrange()
        for key in [key for key in self.graphs if key.adapted]:
            del self.graphs[key]
            self._sampled.pop(key, None)

    def _run(self, rows: int, kind: Kind, adapted: bool) -> Sampled:
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
        sampled = self.sampling.sample(logits[:, 0], self.positions[part], 0, kind)
        self.tokens[part].copy_(sampled.tokens.clamp(min=0))
        return sampled

    def _capture(self, key: Variant) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: torch may allocate on other threads meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._sampled[key] = self._run(*key)
        self._pool = self._pool or graph.pool()
        self.graphs[key] = graph
        return graph

    def to_host(self, sampled: Sampled) -> Results:
        """Send a step's results on their way."""
        if not self.tokens.is_cuda:
            return Results(*sampled, arrived=None)
        host = [
            None
            if x is None
            else torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            for x in sampled
        ]
        arrived = torch.cuda.Event()
        arrived.record()
        return Results(*host, arrived=arrived)
