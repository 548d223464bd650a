"""lora_product: a dequantized weight's product and an adapter's beside it, in one pass."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.gemm_4bit import multiprocessors
from halfbyte.ops.library import define

# Rows and columns of a tile of out.
TILE = (128, 256)


@functools.cache
def _has_kernel(index: int) -> bool:
    return _core.has_lora_product(index)


def _fills_tiles(m: int, k: int, n: int, most: int) -> bool:
    """Whether tiles of out, one on each of `most` multiprocessors, waste less than a second pass.

    A last wave of at most half as many tiles is cut in two and takes half the time. As measured on
    an H200, the kernel is faster while its waves hold up to 1.04 + 200 / K times out's elements.
    """
    tiles = -(-m // TILE[0]) * -(-n // TILE[1])
    waves, last = divmod(tiles, most)
    if last:
        waves += 0.5 if 2 * last <= most else 1
    return waves * most * TILE[0] * TILE[1] <= m * n * (1.04 + 200 / k)


def _are_aligned(*tensors: Tensor) -> bool:
    return all(
        tensor.stride(1) == 1 and tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0
        for tensor in tensors
    )


def _takes(x: Tensor, w: Tensor, hidden: Tensor, b: Tensor, n: int) -> bool:
    """Whether there is a kernel for such operands, which is then faster than torch's two passes."""
    if not x.is_cuda or x.dtype == torch.float32 or not _has_kernel(x.get_device()):
        return False
    whole = all(tensor.is_contiguous() for tensor in (x, w, b))
    aligned = n % 8 == 0 and _are_aligned(x, w, hidden, b)
    return whole and aligned and _fills_tiles(*x.shape, n, multiprocessors(x.get_device()))


def _finds_room(m: int, n: int, s: int, most: int) -> bool:
    """Whether tiles of hidden find room beside those of out, or cost less than their own product.

    Each takes as long as half a tile of out. As measured on an H200, half a wave more is too much
    unless there are fifty.
    """
    rows = -(-m // TILE[0])
    halves = 2 * rows * -(-n // TILE[1])
    hidden = rows * -(-2 * s // TILE[1])
    return -(-(halves + hidden) // most) - -(-halves // most) <= halves // most // 50


def _makes_hidden(x: Tensor, a: Tensor, n: int, transposed: bool) -> bool:
    """Whether the kernel, which takes the other operands, makes hidden too."""
    s, most = a.shape[1 if transposed else 0], multiprocessors(x.get_device())
    return a.is_contiguous() and _are_aligned(a) and _finds_room(len(x), n, s, most)


def _multiply(
    x: Tensor,
    w: Tensor,
    hidden: Tensor,
    b: Tensor,
    transposed: bool,
    a: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    # As torch multiplies by them from the right.
    of_w, of_b = (w, b) if transposed else (w.t(), b.t())
    n = of_w.shape[1]
    takes = _takes(x, w, hidden, b, n)
    if a is not None and not (takes and _makes_hidden(x, a, n, transposed)):
        of_a = a if transposed else a.t()
        hidden[:, : of_a.shape[1]].addmm_(x, of_a, beta=0, alpha=scaling)
        a = None
    if takes:
        progress = None if a is None else x.new_zeros(1 + -(-len(x) // TILE[0]), dtype=torch.int32)
        out = x.new_empty(len(x), n)
        _core.lora_product(x, w, hidden, b, transposed, out, a, scaling, progress)
        return out
    # The large product comes last: it reads what it adds to while it multiplies.
    return torch.mm(hidden[:, : len(of_b)], of_b).addmm_(x, of_w)


def _multiply_fake(
    x: Tensor,
    w: Tensor,
    hidden: Tensor,
    b: Tensor,
    transposed: bool,
    a: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1] if transposed else w.shape[0])


# x w^T + hidden b^T of x [M, K], w [N, K], hidden [M, r] and b [N, r], all of one dtype, in M x N;
# transposed, w is [K, N] and b [r, N]. With a [s, K], or [K, s], hidden's first s columns become
# scaling x a^T before. hidden may be wider than r and s.
lora_product = define(
    "lora_product(Tensor x, Tensor w, Tensor(a!) hidden, Tensor b, bool transposed, "
    "Tensor? a=None, float scaling=1.0) -> Tensor",
    _multiply,
    _multiply_fake,
)
