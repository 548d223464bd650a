"""Keys and values of the tokens that sequences have seen so far, in blocks of 16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import ContextLengthError
from halfbyte.ops.paged_attention import BLOCK, Cached, decode, encode, paged_attention

# What padding writes to, and what tables name past their end; it belongs to no sequence.
SPARE_BLOCK = 0
# Of a layer's products: q, k and v; output; gate and up; down.
LAUNCHES = 4


class CacheShape(Protocol):
    """The part of a model's config that gives a cache its shape."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def check_kv_dtype(kv_dtype: str | None) -> None:
    """Raise ValueError unless a cache can hold this."""
    if kv_dtype not in (None, "int8"):
        raise ValueError(f"kv_dtype: expected None or 'int8', got {kv_dtype!r}")


def block_bytes(config: CacheShape, dtype: torch.dtype, kv_dtype: str | None = None) -> int:
    """Bytes of one block in all layers, keys and values."""
    vectors = 2 * config.num_hidden_layers * BLOCK * config.num_key_value_heads
    if kv_dtype == "int8":
        return vectors * (config.head_dim + torch.float32.itemsize)
    return vectors * config.head_dim * dtype.itemsize


class KVCache:
    """The keys and values of each layer, as `Cached` has them.

    kv_dtype: None, the model's own dtype, or "int8": a byte for each element and a scale for each
    token and head, half of 16 bits' memory. SmolLM2-135M in fp32 reads WikiText-2 with a perplexity
    of 21.184 instead of 21.193 so (unscaled fp8, e4m3: 21.37), and its likeliest token is another
    one in 1.5 % of places (fp8: 4.8 %).

    Which blocks belong to a sequence is the caller's to say, by a table for each row of a forward:
    token t lies in block table[t // 16]. Block 0 belongs to no one.
    """

    def __init__(
        self,
        config: CacheShape,
        blocks: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kv_dtype: str | None = None,
    ) -> None:
        if blocks < 2:
            raise ValueError(f"KVCache: expected at least 2 blocks, got {blocks}")
        check_kv_dtype(kv_dtype)
        self.coded = kv_dtype == "int8"
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        shapes = [(layers, blocks, BLOCK, heads, config.head_dim)] * 2
        dtypes = [torch.uint8 if self.coded else dtype] * 2
        if self.coded:
            shapes += [(layers, blocks, heads, BLOCK)] * 2
            dtypes += [torch.float32] * 2
        # Zeros, because a masked key still multiplies its value by zero, and 0 * NaN is NaN.
        parts = [
            torch.zeros(shape, dtype=dtype, device=device).unbind()
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        self.layers = [Cached(*layer) for layer in zip(*parts, strict=True)]
        self.heads = config.num_attention_heads
        self.blocks = blocks
        self.device = self.layers[0].keys.device

    def step(
        self,
        tables: Sequence[Sequence[int]],
        starts: Sequence[int],
        counts: Sequence[int],
    ) -> CacheStep:
        """The next forward: row b has `starts[b]` tokens cached and appends `counts[b]`.

        Its ids are [B, max(counts)]; what is shorter is padded on the right.
        Raises ContextLengthError when a table has no room, ValueError for lists that do not fit.
        """
        if not len(tables) == len(starts) == len(counts) >= 1 or min(counts) < 1:
            raise ValueError(
                f"KVCache.step: expected a table, a start and a count >= 1 for each row, got "
                f"{len(tables)} tables, starts {list(starts)}, counts {list(counts)}"
            )
        for table, start, count in zip(tables, starts, counts, strict=True):
            if start + count > len(table) * BLOCK:
                raise ContextLengthError(
                    f"KVCache: {start} cached + {count} new tokens exceed the {len(table) * BLOCK} "
                    "that the sequence has blocks for; shorten the prompt or ask for fewer new "
                    "tokens"
                )
        tokens, width = max(counts), max(map(len, tables))
        padded = [[*table, *[SPARE_BLOCK] * (width - len(table))] for table in tables]
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        return CacheStep(
            cache=self,
            tables=torch.tensor(padded, dtype=torch.int32, device=self.device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            positions=_positions(starts, tokens, self.device),
            arrived=self.arrivals(len(tables)) if tokens == 1 else None,
            words=self.words() if tokens == 1 else None,
            last=None if min(counts) == tokens else torch.tensor(counts, device=self.device) - 1,
            cached=min(max(starts) + tokens, width * BLOCK) if max(starts) else 0,
        )

    def arrivals(self, batch: int) -> Tensor:
        """The zeros that decode attention needs for `batch` rows."""
        return torch.zeros(batch, self.heads, dtype=torch.int32, device=self.device)

    def words(self) -> Tensor:
        """Zeros [layers, LAUNCHES], by which the launches of a forward of few tokens wait."""
        return torch.zeros(len(self.layers), LAUNCHES, dtype=torch.int32, device=self.device)


def _positions(starts: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """int64 [B, tokens], or [1, tokens] where all rows start alike."""
    if min(starts) == max(starts):
        return torch.arange(starts[0], starts[0] + tokens, device=device)[None]
    return torch.tensor(starts, device=device)[:, None] + torch.arange(tokens, device=device)


@dataclass(frozen=True)
class CacheStep:
    """Where one forward's tokens go in the cache and which tokens its rows see.

    tables: int32 [B, W]. lengths: int32 [B], tokens with the new ones. positions: int64 [B or 1,
    T] of the new tokens. arrived: as `paged_attention` takes it; decode only. words: int32 zeros
    [layers, LAUNCHES], one for each launch of products, which stand side by side where weights are
    small: none may hear what another is told; for one row or one token a row. last: int64 [B], the
    place of each row's last real token; None: all rows have T. cached: the most tokens that a row
    reads from the cache; 0 where no row has earlier tokens. angles: cos and sin [B, 1, 1, head_dim]
    of the new tokens, in place of their positions; decode only.

    With one new token a row nothing here is read on the host, so a captured forward serves every
    later step whose numbers are written into the same tensors.
    """

    cache: KVCache
    tables: Tensor
    lengths: Tensor
    positions: Tensor | None
    arrived: Tensor | None
    words: Tensor | None = None
    last: Tensor | None = None
    cached: int = 0
    angles: tuple[Tensor, Tensor] | None = None

    @property
    def decodes(self) -> bool:
        """Whether each row has one new token, which `attend` takes."""
        return self.arrived is not None

    def check(self, ids: Tensor) -> None:
        """Raise ValueError unless ids are [B, T] as announced."""
        tokens = 1 if self.positions is None else self.positions.shape[1]
        expected = (self.tables.shape[0], tokens)
        if tuple(ids.shape) != expected:
            raise ValueError(f"CacheStep: expected ids {list(expected)}, got {list(ids.shape)}")

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        window: int | None,
    ) -> Tensor:
        """Append one token a row and attend: q [B, 1, heads, D], k and v, not rotated -> q's shape.

        cos, sin: [B or 1, 1, 1, D].
        """
        batch, head_dim = q.shape[0], q.shape[-1]
        cos, sin = (x.reshape(-1, head_dim).expand(batch, -1).contiguous() for x in (cos, sin))
        out = paged_attention(
            q[:, 0],
            k[:, 0],
            v[:, 0],
            cos,
            sin,
            self.cache.layers[layer],
            self.tables,
            self.lengths,
            window,
            self.arrived,
        )
        return out[:, None]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys, values [B, T, num_key_value_heads, head_dim]; padding goes to the spare.

        Returns them as the cache holds them.
        """
        cached = self.cache.layers[layer]
        if not self.cache.coded:
            self._store(cached.keys, keys)
            self._store(cached.values, values)
            return keys, values
        stored = []
        for codes, scales, new in (
            (cached.keys, cached.key_scales, keys),
            (cached.values, cached.value_scales, values),
        ):
            new_codes, new_scales = encode(new)
            self._store(codes, new_codes)
            scales[self._slots // BLOCK, :, self._slots % BLOCK] = new_scales.flatten(0, 1)
            stored.append(decode(new_codes, new_scales, new.dtype))
        return stored[0], stored[1]

    def _store(self, cached: Tensor, new: Tensor) -> None:
        tokens = cached.flatten(0, 1).flatten(1)
        new = new.to(tokens.dtype).reshape(-1, tokens.shape[1])
        if tokens.shape[1] * tokens.element_size() % 8 == 0:
            # Torch copies element by element: the fewer the better.
            tokens, new = tokens.view(torch.int64), new.view(torch.int64)
        tokens.index_copy_(0, self._slots, new)

    @cached_property
    def _slots(self) -> Tensor:
        """int64 [B * T]: the new tokens' places in the cache."""
        batch, width = self.tables.shape
        places = (self.positions // BLOCK).expand(batch, -1).clamp(max=width - 1)
        blocks = self.tables.gather(1, places).long()
        blocks = torch.where(self.positions < self.lengths[:, None], blocks, SPARE_BLOCK)
        return (blocks * BLOCK + self.positions % BLOCK).flatten()

    def read(self, layer: int, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, tokens, num_key_value_heads, head_dim] from the first on."""
        blocks = self.tables[:, : blocks_for(tokens)].long()
        cached = Cached(
            *(None if part is None else part[blocks] for part in self.cache.layers[layer])
        )
        keys, values = cached.keys, cached.values
        if self.cache.coded:
            keys = decode(keys, cached.key_scales.transpose(2, 3), dtype)
            values = decode(values, cached.value_scales.transpose(2, 3), dtype)
        return keys.flatten(1, 2)[:, :tokens], values.flatten(1, 2)[:, :tokens]
