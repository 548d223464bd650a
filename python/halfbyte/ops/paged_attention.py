"""paged_attention: rotate, append to the paged cache and attend, for one new token a row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define

# Tokens of a block of the cache, and most parts of a row's context, as in rust/core.
BLOCK = 16
MAX_PARTS = 32


def _kernel(
    q,
    k,
    v,
    cos,
    sin,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    lengths,
    window: int,
    arrived,
) -> Tensor:
    batch, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    partials = arrived.new_empty(batch * heads * MAX_PARTS * (head_dim + 2), dtype=torch.float32)
    cache = (keys, values, key_scales, value_scales)
    _core.paged_attention(
        q, k, v, cos, sin, *cache, tables, lengths, window, partials, arrived, out
    )
    return out


def _fake(q, *_) -> Tensor:
    return q.new_empty(q.shape)


define(
    "paged_attention(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, "
    "Tensor(b!) values, Tensor(d!)? key_scales, Tensor(e!)? value_scales, Tensor tables, "
    "Tensor lengths, int window, Tensor(c!) arrived) -> Tensor",
    _kernel,
    _fake,
)


class Cached(NamedTuple):
    """Keys and values of one layer: [blocks, 16, kv_heads, D] of the model's dtype.

    Or uint8 codes, with scales: float32 [blocks, kv_heads, 16] of keys and of values. A code stands
    for (code - 128) * scale.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and scales, float32, of vectors [..., D], as `paged_attention` makes them.

    The largest element of a vector is 127 scales away from zero; NaN and Inf end up in the scale.
    """
    x = x.float()
    scales = x.abs().amax(-1) / 127
    steps = (x / scales[..., None]).nan_to_num(nan=0.0).round_().clamp_(-127, 127)
    return steps.add_(128).to(torch.uint8), scales


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes [..., D] of scales [...] stand for."""
    return ((codes.float() - 128) * scales[..., None]).to(dtype)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cached: Cached,
    tables: Tensor,
    lengths: Tensor,
    window: int | None,
    arrived: Tensor,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each row's cached tokens, its new token appended first.

    q: [B, heads, D], k and v: [B, kv_heads, D], of the new tokens, not yet rotated. cos, sin:
    [B, D] as RotaryEmbedding gives them. cached: written at position lengths - 1. tables: int32
    [B, W], each row's blocks. lengths: int32 [B], the new token included. window: tokens attended
    to, None for all. arrived: int32 [B, heads] of zeros, which the op leaves as it was. Returns
    [B, heads, D].

    A row's result depends on nothing but the row. Everything that varies from token to token is
    read on the device, so that one captured launch serves all of them. On a GPU older tokens may be
    read before the launch in front has ended: where one call follows another on the same cache, let
    an operation of torch's own lie between them, as the next token's embedding does.
    """
    return torch.ops.halfbyte.paged_attention(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        cos,
        sin,
        *cached,
        tables,
        lengths,
        window or 0,
        arrived,
    )
