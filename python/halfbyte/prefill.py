"""Reading a prompt: chunk after chunk into the cache, then the logits of its last token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.capture import Captured, Pool
from halfbyte.decode import evaluating
from halfbyte.kv_cache import SPARE_BLOCK, CacheStep, KVCache
from halfbyte.models import Decoder
from halfbyte.ops.paged_attention import BLOCK

# Tokens of a prompt that one forward reads; running sequences wait no longer than that takes.
CHUNK = 512
# On a GPU a chunk is padded to one of these, so that a captured forward serves it.
SIZES = (32, 64, 128, 256, CHUNK)


class Shape(NamedTuple):
    """Of a forward: tokens that it reads, and cached tokens that they look at (0: none before).

    adapted: whether with an adapter.
    """

    size: int
    cached: int
    adapted: bool = False


class Prefill:
    """The forwards that read prompts; on CUDA each shape of them is captured."""

    def __init__(self, model: Decoder, cache: KVCache, width: int, pool: Pool) -> None:
        device = cache.device
        self.model, self.cache, self.pool = model, cache, pool
        self.ids = torch.zeros(1, CHUNK, dtype=torch.int64, device=device)
        self.tables = torch.full((1, width), SPARE_BLOCK, dtype=torch.int32, device=device)
        self.lengths = torch.ones(1, dtype=torch.int32, device=device)
        self.words = cache.words()
        self.places = torch.arange(CHUNK, device=device)[None]
        self.positions = self.places.clone()
        self.forwards: dict[Shape, Captured[Tensor]] = {}

    def read(
        self, ids: Sequence[int], table: Sequence[int], start: int, adapted: bool = False
    ) -> Tensor:
        """Cache a chunk at positions `start` on; logits [1, vocab_size] of its last token.

        adapted: whether inside `Adapters.only` of an adapter.
        """
        if not self.ids.is_cuda:
            step = self.cache.step([table], [start], [len(ids)])
            return self._logits(torch.tensor([ids], device=self.cache.device), step)
        shape = self._fill(ids, table, start, adapted)
        if shape not in self.forwards:
            work = partial(self._padded, shape)
            self.forwards[shape] = Captured(work, self.cache.device, self.pool)
        return self.forwards[shape]()

    def rearrange(self) -> None:
        """Follow adapters that came or went; what was captured with the old ones is dropped."""
        self.forwards = {shape: f for shape, f in self.forwards.items() if not shape.adapted}

    def _fill(
        self, ids: Sequence[int], table: Sequence[int], start: int, adapted: bool = False
    ) -> Shape:
        """Write a chunk to where forwards read it; the shape of the one that it needs."""
        width = self.tables.shape[1]
        padded = [*table, *[SPARE_BLOCK] * (width - len(table))]
        self.ids[0, : len(ids)].copy_(torch.tensor(ids, device="cpu"), non_blocking=True)
        self.tables[0].copy_(
            torch.tensor(padded, dtype=torch.int32, device="cpu"), non_blocking=True
        )
        self.lengths.fill_(start + len(ids))
        torch.add(self.places, start, out=self.positions)
        size = next(size for size in SIZES if size >= len(ids))
        # Powers of two, so that a long prompt needs few captures.
        cached = min(1 << (start + size - 1).bit_length(), width * BLOCK) if start else 0
        return Shape(size, cached, adapted)

    def _padded(self, shape: Shape) -> Tensor:
        step = CacheStep(
            cache=self.cache,
            tables=self.tables,
            lengths=self.lengths,
            positions=self.positions[:, : shape.size],
            arrived=None,
            words=self.words,
            last=(self.lengths - self.positions[:, 0] - 1).long(),
            cached=shape.cached,
        )
        return self._logits(self.ids[:, : shape.size], step)

    def _logits(self, ids: Tensor, step: CacheStep) -> Tensor:
        with evaluating(self.model):
            return self.model(ids, cache=step, last_only=True).logits[:, 0]
