"""The decode step: one token for each running sequence, its forward captured and replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.adapters import Adapter, Adapters
from halfbyte.capture import Captured, Pool
from halfbyte.kv_cache import SPARE_BLOCK, CacheStep, KVCache
from halfbyte.models import Decoder
from halfbyte.ops.paged_attention import BLOCK
from halfbyte.sampling import Kind, Sampled, SamplingRows

# A step runs for so many rows; the ones that no sequence has are computed and ignored.
BUCKETS = (1, 2, 4, 8, 16, 32)


class Variant(NamedTuple):
    """What one captured forward can do: for how many rows, whether with adapters."""

    rows: int
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

    A step is a forward, which feeds row b its newest token, and a draw of the next one. A row that
    no sequence has stays at position 0 of the spare block. Each variant of the forward is captured;
    the draw is a launch or two, and writes its tokens to another place of the host's memory each
    time: the GPU goes on without waiting for a copy.
    """

    def __init__(self, model: Decoder, cache: KVCache, rows: int, width: int, pool: Pool) -> None:
        device, backbone = cache.device, model.model
        self.model, self.cache = model, cache
        self.sampling = SamplingRows(rows, model.config.vocab_size, device)
        self.tables = torch.full((rows, width), SPARE_BLOCK, dtype=torch.int32, device=device)
        dtype = backbone.embed_tokens.weight.dtype
        self.angles = backbone.rotary_emb.table(1 + width * BLOCK, dtype, device)
        self.arrived, self.words = cache.arrivals(rows), cache.words()
        self.adapters = Adapters(model, rows)
        self.forwards: dict[Variant, Captured[Tensor]] = {}
        # What a forward leaves to the draw.
        self.logits: Tensor | None = None
        self._pool = pool

    def place(self, row: int, table: Sequence[int], adapter: Adapter | None = None) -> None:
        """Let the sequence that `sampling` has in a row run there: its blocks and adapter."""
        self.adapters.use(row, adapter)
        padded = [*table, *[SPARE_BLOCK] * (self.tables.shape[1] - len(table))]
        blocks = torch.tensor(padded, dtype=torch.int32, device="cpu")
        self.tables[row].copy_(blocks, non_blocking=True)

    def remove(self, row: int) -> None:
        """Let no sequence run in a row."""
        self.adapters.use(row, None)
        self.tables[row].fill_(SPARE_BLOCK)
        self.sampling.remove(row)

    def move(self, source: int, target: int) -> None:
        """Let a row's sequence run in another row."""
        self.tables[target].copy_(self.tables[source])
        if self.logits is not None:
            self.logits[target].copy_(self.logits[source])
        self.sampling.move(source, target)
        self.adapters.move(source, target)
        self.remove(source)

    def forward(self, rows: int, adapted: bool = False) -> None:
        """Queue the forward of the first `rows` rows; adapted: whether some row uses an adapter."""
        key = Variant(_bucket(rows), adapted)
        if key not in self.forwards:
            work = partial(self._forward, *key)
            self.forwards[key] = Captured(work, self.cache.device, self._pool)
        self.logits = self.forwards[key]()

    def draw(self, rows: int, kind: Kind) -> Results:
        """Queue the draw of those first rows that are still there."""
        assert self.logits is not None
        logits, self.logits = self.logits[:rows], None
        return self.sample(logits, 0, kind)

    def sample(self, logits: Tensor, first: int, kind: Kind) -> Results:
        """Queue the draw of rows `first` on, from logits [B, vocab_size]."""
        sampled = self.sampling.sample(logits, first, kind)
        if not logits.is_cuda:
            return Results(sampled, None)
        tokens, *others = sampled
        host = Sampled(tokens, *(None if x is None else _pinned(x) for x in others))
        arrived = torch.cuda.Event()
        arrived.record()
        return Results(host, arrived)

    def rearrange(self) -> None:
        """Follow adapters that came or went; what was captured with the old ones is dropped."""
        self.adapters.arrange()
        self.forwards = {key: step for key, step in self.forwards.items() if not key.adapted}

    def _forward(self, rows: int, adapted: bool) -> Tensor:
        """Logits [rows, vocab_size] of each row's next token."""
        part = slice(0, rows)
        lengths = self.sampling.lengths[part]
        cos, sin = self.angles.index_select(1, lengths)[:, :, None, None]
        step = CacheStep(
            cache=self.cache,
            tables=self.tables[part],
            lengths=lengths,
            positions=None,
            arrived=self.arrived[part],
            words=self.words,
            angles=(cos, sin),
        )
        with evaluating(self.model), self.adapters.rows(part, adapted):
            ids = self.sampling.tokens[part, None]
            return self.model(ids, cache=step, last_only=True).logits[:, 0]


def _bucket(rows: int) -> int:
    return next(size for size in BUCKETS if size >= rows)


def _pinned(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    return host.copy_(x, non_blocking=True)
