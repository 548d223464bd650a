"""gemv: y = x W^T for a few rows x, at the speed of the memory that holds W."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define
from halfbyte.ops.quantize_4bit import FLOAT_DTYPES

# Rows for which a row's result on the CPU does not depend on the others.
FEW = 8


def _product(x: Tensor, weight: Tensor) -> Tensor:
    if x.is_cuda or x.shape[0] > FEW or x.dtype not in FLOAT_DTYPES:
        return torch.mm(x, weight.t())
    out = _product_fake(x, weight)
    _core.gemv(x.contiguous(), weight, out)
    return out


def _product_fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


define("gemv(Tensor x, Tensor weight) -> Tensor", _product, _product_fake)


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, accumulated in fp32; no gradients.

    x: [M, K]; weight: [N, K], contiguous, of x's dtype, fp32, fp16 or bf16. Returns [M, N].
    torch's own product on a GPU, for more than 8 rows and in fp64.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        expected = f"[M, K] for weight {list(weight.shape)}"
        raise ValueError(f"gemv: x: expected {expected}, got {list(x.shape)}")
    return torch.ops.halfbyte.gemv(x, weight)
