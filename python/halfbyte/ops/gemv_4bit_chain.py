"""gemv_4bit_chain: 4-bit products of a few rows, each of the one before, in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.quant_state import QuantState

MAX_ROWS = 8
# What CTAs count in while they wait for each other: zeros before and after every launch.
COUNTERS = 5


class LowRank(NamedTuple):
    """factors * (x a^T) b^T: a [r, K], b [N, r], both fp32 or both x's dtype.

    factors: fp32 [M, r], each row's own; None where `scaling` is all.
    """

    a: Tensor
    b: Tensor
    factors: Tensor | None
    scaling: float


class Product(NamedTuple):
    """out = x W^T + bias + adapter; the second of a gated pair shares the first's out."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_map: Tensor
    offset: float
    bias: Tensor | None
    adapter: LowRank | None
    out: Tensor


class Phase(NamedTuple):
    """Products of one x [M, K], which is normed before where `norm` [K] is given.

    gated: the products are a gate and an up projection, and out is silu(gate) * up.
    residual: [M, N], added to the one out. hidden: [M, all ranks], scratch for adapters.
    """

    x: Tensor
    products: Sequence[Product]
    gated: bool = False
    norm: Tensor | None = None
    eps: float = 0.0
    residual: Tensor | None = None
    hidden: Tensor | None = None


@functools.cache
def has_chains(device: torch.device) -> bool:
    """Whether there are kernels for chains on a device."""
    return device.type == "cuda" and _core.has_chains(device.index or 0)


def takes_chained(packed: Tensor, state: QuantState, head: QuantState) -> bool:
    """Whether the kernels take this weight in one chain with that of `head`."""
    nested, map_of_head = state.nested, head.nested
    return (
        nested is not None
        and map_of_head is not None
        and nested.map.data_ptr() == map_of_head.map.data_ptr()
        and state.quant_type == head.quant_type
        and state.blocksize == 64
        and state.shape[1] % 256 == 0
        and packed.data_ptr() % 16 == 0
        and state.absmax.data_ptr() % 4 == 0
    )


def gemv_4bit_chain(phases: Sequence[Phase], quant_type: str, arrived: Tensor) -> None:
    """Run up to four phases; a phase's x and residual may be what earlier ones write.

    x: fp16 or bf16 [M, K], M <= 8, one dtype for all; every rounding is that of the operations one
    after the other (`rms_norm`, `gemm_4bit`, the adapter, `swiglu`, a sum). Weights: double
    quantization with one map of scales and one quant_type, blocks of 64, K a multiple of 256.
    arrived: int32 [COUNTERS] zeros, which belong to one stream.

    Raises ValueError for what does not fit.
    """
    _core.gemv_4bit_chain(phases, quant_type, arrived)
