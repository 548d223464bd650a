"""Rows of tokens in a paged cache, for tests that feed a model by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.kv_cache import KVCache, blocks_for
from halfbyte.models import Decoder, Output


class Rows:
    """`batch` sequences with room for `max_len` tokens each, their blocks dealt out in turns."""

    def __init__(self, model: Decoder, batch: int, max_len: int = 48) -> None:
        weight = model.model.embed_tokens.weight
        each = blocks_for(max_len)
        self.model = model
        self.cache = KVCache(model.config, 1 + batch * each, weight.dtype, weight.device)
        self.tables = [[1 + row + batch * i for i in range(each)] for row in range(batch)]
        self.lengths = [0] * batch

    def __call__(self, ids: Tensor, counts: list[int] | None = None, **options) -> Output:
        """Feed ids [B, T]; of row b the first counts[b] are real (default: all)."""
        counts = counts or [ids.shape[1]] * len(ids)
        step = self.cache.step(self.tables, self.lengths, counts)
        out = self.model(ids.to(self.cache.device), cache=step, **options)
        self.lengths = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        return out

    def select(self, rows: list[int]) -> None:
        self.tables = [self.tables[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]

    def decode(self, ids: Tensor) -> Tensor:
        """Logits of ids [B, T] fed one token at a time."""
        return torch.cat([self(ids[:, i : i + 1]).logits for i in range(ids.shape[1])], 1)
