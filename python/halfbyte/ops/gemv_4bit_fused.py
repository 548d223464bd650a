"""gemv_4bit_fused: 4-bit products of a few rows with what stands around them, in one launch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import capability
from halfbyte.ops.quant_state import QuantState

MAX_ROWS = 16
# Beside adapters, and then the highest rank.
MAX_ADAPTED_ROWS = 8
MAX_RANK = 256
# By another kernel, of tiles, of compute capability 9.0 alone, with adapters of any rank.
MAX_TILED_ROWS = 64
# Elements of K that make a share of an adapter's hidden value; the other kernel's hidden values
# begin at a multiple of so many ranks.
CHUNK = 2048
RANKS = 16
# Neighbours in a row whose squares are summed for a norm.
SQUARES = 16
# Largest K of an x that is normed sooner beside its products than before them.
MAX_NORMED = 4096


class LowRank(NamedTuple):
    """factors * (x a^T) b^T: a [r, K], b [N, r], both fp32 or both x's dtype.

    factors: fp32 [M, r], each row's own; None where `scaling` is all.
    """

    a: Tensor
    b: Tensor
    factors: Tensor | None
    scaling: float


class Product(NamedTuple):
    """x W^T + bias + adapter, for W [N, K] held as (packed, state)."""

    packed: Tensor
    state: QuantState
    bias: Tensor | None
    adapter: LowRank | None


class Norm(NamedTuple):
    """x / sqrt(mean(x^2) + eps) * weight, before the products of x [M, K].

    weight: [K], x's dtype. squares: fp32 [M, K / 16], sums of squares of neighbours in x.
    """

    weight: Tensor
    squares: Tensor
    eps: float


class Residual(NamedTuple):
    """What the one product is added to: values [M, N], x's dtype, N a multiple of 16.

    squares: fp32 [M, N / 16], made for the norm behind it: as `Norm` takes them.
    """

    values: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Residual:
        """With room for the squares."""
        shape = (len(values), values.shape[1] // SQUARES)
        return cls(values.contiguous(), values.new_empty(shape, dtype=torch.float32))


class _NextWeight(NamedTuple):
    """As the compiled part takes it."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    n: int
    k: int


class _Next(NamedTuple):
    """As the compiled part takes it."""

    weights: Sequence[_NextWeight]
    gated: bool
    norm: Tensor | None


class _Product(NamedTuple):
    """As the compiled part takes it."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: float
    bias: Tensor | None
    adapter: LowRank | None
    out: Tensor


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and _core.has_gemv_4bit_fused(device.index or 0)


def fuses(x: Tensor, products: Sequence[Product]) -> bool:
    """Whether there is a kernel for these products of x [M, K]."""
    head = products[0].state
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and 0 < len(x) <= MAX_TILED_ROWS
        and _has_kernels(x.device)
        and len({p.adapter.a.dtype for p in products if p.adapter is not None}) <= 1
        and all(_takes(product.packed, product.state, head) for product in products)
        and (not _is_tiled(x, products) or _has_tiles(x.device, products))
    )


def takes_norm(x: Tensor, products: Sequence[Product]) -> bool:
    """Whether the kernel that `fuses` norms x, too, and sooner than a launch of its own.

    A larger K is read in pieces, each of which is normed while the memory waits. So are more than
    eight rows, which take 2 % longer that way, but have the bits of fewer.
    """
    return x.shape[1] <= MAX_NORMED and not _is_tiled(x, products)


def takes_residual(x: Tensor, products: Sequence[Product]) -> bool:
    """Whether the kernel that `fuses` adds its one product to a residual, too."""
    return products[0].state.shape[0] % SQUARES == 0 and not _is_tiled(x, products)


def _is_tiled(x: Tensor, products: Sequence[Product]) -> bool:
    """Whether there are too many rows, or ranks, for the kernel of few."""
    ranks = _ranks(products)
    return len(x) > (MAX_ADAPTED_ROWS if ranks else MAX_ROWS) or max(ranks, default=0) > MAX_RANK


def _has_tiles(device: torch.device, products: Sequence[Product]) -> bool:
    """Whether there is a kernel of tiles for these products."""
    fits = all(_fits_tiles(product.state) for product in products)
    return fits and capability(device.index or 0) == (9, 0)


def _ranks(products: Sequence[Product]) -> list[int]:
    return [len(product.adapter.a) for product in products if product.adapter is not None]


def _takes(packed: Tensor, state: QuantState, head: QuantState) -> bool:
    n, k = state.shape
    return (
        _map(state) == _map(head)
        and state.quant_type == head.quant_type
        and state.blocksize == 64
        and k % 64 == 0
        and n * k % 256 == 0
        and packed.data_ptr() % 16 == 0
        and state.absmax.data_ptr() % (16 if state.nested is None else 4) == 0
    )


def _map(state: QuantState) -> int | None:
    """Which map nested scales have."""
    return None if state.nested is None else state.nested.map.data_ptr()


def _fits_tiles(state: QuantState) -> bool:
    return state.nested is not None and state.shape[1] % 256 == 0


class Following(NamedTuple):
    """What the next launch reads: (packed, state) of its weights, a gate and an up one where gated.

    norm: the weight of the norm in front of them.
    """

    weights: Sequence[tuple[Tensor, QuantState]] = ()
    gated: bool = False
    norm: Tensor | None = None


NOTHING = Following()


def _next(following: Following, head: QuantState) -> _Next:
    """What is moved ahead: weights that the kernel knows to address, or none."""
    known, gated, norm = following
    if not all(_takes(*weight, head) and _fits_tiles(weight[1]) for weight in known):
        return _Next((), gated, None)
    weights = [
        _NextWeight(packed, state.absmax, state.nested.absmax, *state.shape)
        for packed, state in known
    ]
    return _Next(weights, gated, norm if norm is not None and norm.element_size() == 2 else None)


def gemv_4bit_fused(
    x: Tensor,
    products: Sequence[Product],
    gated: bool = False,
    following: Following = NOTHING,
    arrived: Tensor | None = None,
    norm: Norm | None = None,
    residual: Residual | None = None,
) -> list[Tensor]:
    """Up to four products of x [M, K] that `fuses`; each [M, N] in x's dtype.

    Every rounding is that of the operations one after the other (`rms_norm`, `gemm_4bit`, the bias'
    sum, the adapter, `swiglu`, the residual's sum). gated: the products are a gate and an up
    projection, and the one result is silu(gate) * up. following: its beginning is moved to L2
    meanwhile. arrived: int32 zeros, which the op leaves as they were; made here where adapters want
    them and there are none. norm, residual: where the products take them (`takes_norm`,
    `takes_residual`); with a residual the one result is its sum with the product.

    Raises ValueError for what does not fit.
    """
    x = x.contiguous()
    widths = [product.state.shape[0] for product in products]
    outs = [x.new_empty(len(x), width) for width in (widths[:1] if gated else widths)]
    given = [
        _Product(p.packed, *p.state.scale_args(), p.bias, p.adapter, outs[0 if gated else index])
        for index, p in enumerate(products)
    ]
    ranks, tiled = _ranks(products), _is_tiled(x, products)
    hidden = None
    if ranks and tiled:
        hidden = x.new_empty(len(x), sum(-(-rank // RANKS) * RANKS for rank in ranks))
    elif ranks:
        shares = (-(-x.shape[1] // CHUNK), len(x), sum(ranks))
        hidden = x.new_empty(shares, dtype=torch.float32)
    if ranks and arrived is None:
        arrived = x.new_zeros(1, dtype=torch.int32)
    head = products[0].state
    after = _next(following, head)
    _core.gemv_4bit_fused(x, given, head.quant_type, gated, hidden, arrived, norm, residual, after)
    return outs
