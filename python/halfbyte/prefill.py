"""Reading a prompt: chunk after chunk into the cache, then the logits of its last token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halfbyte.capture import Captured
from halfbyte.decode import evaluating
from halfbyte.kv_cache import SPARE_BLOCK, CacheStep, KVCache
from halfbyte.models import Decoder

# Tokens of a prompt that one forward reads; running sequences wait no longer than that takes.
CHUNK = 512
# On a GPU a first chunk is padded to one of these, so that a captured forward serves it.
SIZES = (32, 64, 128, 256, CHUNK)


class Prefill:
    """The forwards that read prompts. On CUDA those of first chunks are captured, by size."""

    def __init__(self, model: Decoder, cache: KVCache, width: int, pool: Any = None) -> None:
        device = cache.device
        self.model, self.cache = model, cache
        self.ids = torch.zeros(1, CHUNK, dtype=torch.int64, device=device)
        self.tables = torch.full((1, width), SPARE_BLOCK, dtype=torch.int32, device=device)
        self.lengths = torch.ones(1, dtype=torch.int32, device=device)
        self.positions = torch.arange(CHUNK, device=device)[None]
        self.forwards = {size: Captured(partial(self._first, size), device, pool) for size in SIZES}

    def read(self, ids: Sequence[int], table: Sequence[int], start: int, capture: bool) -> Tensor:
        """Cache a chunk at positions `start` on; logits [1, vocab_size] of its last token.

        capture: whether nothing but ids, table and start differs from other calls.
        """
        if start > 0 or not self.ids.is_cuda:
            step = self.cache.step([table], [start], [len(ids)])
            return self._logits(torch.tensor([ids], device=self.cache.device), step)
        padded = [*table, *[SPARE_BLOCK] * (self.tables.shape[1] - len(table))]
        self.ids[0, : len(ids)].copy_(torch.tensor(ids), non_blocking=True)
        self.tables[0].copy_(torch.tensor(padded, dtype=torch.int32), non_blocking=True)
        self.lengths.fill_(len(ids))
        size = next(size for size in SIZES if size >= len(ids))
        return self.forwards[size]() if capture else self._first(size)

    def _first(self, size: int) -> Tensor:
        step = CacheStep(
            cache=self.cache,
            tables=self.tables,
            lengths=self.lengths,
            positions=self.positions[:, :size],
            arrived=None,
            last=(self.lengths - 1).long(),
        )
        return self._logits(self.ids[:, :size], step)

    def _logits(self, ids: Tensor, step: CacheStep) -> Tensor:
        with evaluating(self.model):
            return self.model(ids, cache=step, last_only=True).logits[:, 0]
