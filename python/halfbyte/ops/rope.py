"""rope: queries and keys rotated by the angles of their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define, is_transformed

# What our loops on the CPU have vectors for; the rest is torch's there.
VECTORS = (torch.float32, torch.bfloat16)


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    out = _rotated_fake(q, k, cos, sin, inverse)
    _core.rope(q, k, cos, sin, inverse, *out)
    return out


def _rotated_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_rotate = define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    _rotated,
    _rotated_fake,
)


class _Rope(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _rotate(_heads(q), _heads(k), cos, sin, inverse)

    @staticmethod
    def backward(ctx, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grads = _Rope.apply(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse)
        return *grads, None, None, None


def _heads(x: Tensor) -> Tensor:
    """x with the elements of a head side by side, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated: `x * cos + x.roll(head_dim / 2, -1) * sin`; differentiable in both.

    q: [B, T, heads, head_dim], k: [B, T, kv_heads, head_dim], of any strides; cos, sin:
    [B or 1, T, 1, head_dim], the first half of sin negated; one dtype, fp32, fp16 or bf16 (on the
    CPU also fp64). Equal to torch's own result to the bit.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if q.is_cpu and (q.dtype not in VECTORS or is_transformed()):
        half = q.shape[-1] // 2
        return q * cos + q.roll(half, -1) * sin, k * cos + k.roll(half, -1) * sin
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rope.apply(q, k, cos, sin, False)
    return _rotate(_heads(q), _heads(k), cos, sin, False)
