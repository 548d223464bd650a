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

    A last wave of fewer than half as many tiles is cut in two and takes half the time. As measured
    on an H200, whole waves take the time of torch's product if they hold 1.03 times as many
    elements, and its second pass over out takes 350 / K times the product.
    """
    tiles = -(-m // TILE[0]) * -(-n // TILE[1])
    waves, last = divmod(tiles, most)
    if last:
        waves += 0.5 if 2 * last <= most else 1
    return waves * most * TILE[0] * TILE[1] <= m * n * (1.04 + 200 / k)


def _takes(x: Tensor, w: Tensor, hidden: Tensor, b: Tensor, n: int) -> bool:
    """Whether there is a kernel for such operands, which is then faster than torch's two passes."""
    if not x.is_cuda or x.dtype == torch.float32 or not _has_kernel(x.get_device()):
        return False
    whole = all(tensor.is_contiguous() for tensor in (x, w, b)) and hidden.stride(1) == 1
    aligned = n % 8 == 0 and all(
        tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0 for tensor in (x, w, hidden, b)
    )
    return whole and aligned and _fills_tiles(*x.shape, n, multiprocessors(x.get_device()))


def _multiply(x: Tensor, w: Tensor, hidden: Tensor, b: Tensor, transposed: bool) -> Tensor:
    n = w.shape[1] if transposed else w.shape[0]
    if _takes(x, w, hidden, b, n):
        out = x.new_empty(len(x), n)
        _core.lora_product(x, w, hidden, b, transposed, out)
        return out
    # The large product comes last: it reads what it adds to while it multiplies.
    of_w, of_b = (w, b) if transposed else (w.t(), b.t())
    return torch.mm(hidden, of_b).addmm_(x, of_w)


def _multiply_fake(x: Tensor, w: Tensor, hidden: Tensor, b: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1] if transposed else w.shape[0])


# x w^T + hidden b^T of x [M, K], w [N, K], hidden [M, r] and b [N, r], all of one dtype, in M x N;
# transposed, w is [K, N] and b [r, N].
lora_product = define(
    "lora_product(Tensor x, Tensor w, Tensor hidden, Tensor b, bool transposed) -> Tensor",
    _multiply,
    _multiply_fake,
)
