"""rms_norm: rows over their root mean square, after the addition of a residual or alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from halfbyte import _core
from halfbyte.ops.library import define, is_left_to_torch

SLICES = 64  # partial sums of the weight's gradient


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _core.rms_norm(x, weight, eps, out)
    return out


def _normed_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _added(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    _core.rms_norm(x, weight, eps, out, residual, total)
    return out, total


def _added_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_sum: Tensor | None,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = _gradients_fake(grad, x, weight, eps, grad_sum, of_weight)
    scratch = (None, None, None)
    if of_weight:
        columns = weight.numel()
        roots = x.new_empty(x.numel() // columns, dtype=torch.float32)
        scratch = grad_weight, roots, x.new_empty(SLICES, columns, dtype=torch.float32)
    _core.rms_norm_backward(grad, x, weight, eps, grad_x, grad_sum, *scratch)
    return grad_x, grad_weight


def _gradients_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_sum: Tensor | None,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape if of_weight else 0)


_norm = define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _normed, _normed_fake)
_add_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _added,
    _added_fake,
)
_backward = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor? grad_sum, "
    "bool of_weight) -> (Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)


class _RmsNorm(torch.autograd.Function):
    """Saves what was normed; its root mean square costs the backward no memory traffic."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = _backward(grad.contiguous(), x, weight, ctx.eps, None, of_weight)
        return grad_x, grad_weight if of_weight else None, None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        out, total = _add_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        total, weight = ctx.saved_tensors
        of_weight = ctx.needs_input_grad[2]
        grad_x, grad_weight = _backward(
            grad.contiguous(), total, weight, ctx.eps, grad_sum.contiguous(), of_weight
        )
        return grad_x, grad_x, grad_weight if of_weight else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; differentiable in both.

    x: [..., d], fp32, fp16 or bf16 (on the CPU also fp64); weight: [d], x's dtype or fp32.
    Computed in fp32, rounded to x's dtype before the weight and after it. Returns x's shape and
    dtype.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    x = _rows("rms_norm", x, weight)
    tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if is_left_to_torch(x):
        return _by_torch(x, weight, eps)
    if tracked:
        return _RmsNorm.apply(x, weight, eps)
    return _norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and `x + residual`, in one pass over both.

    residual: x's shape and dtype. Otherwise as `rms_norm`.
    """
    x = _rows("add_rms_norm", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual: expected {x.dtype} {list(x.shape)}, "
            f"got {residual.dtype} {list(residual.shape)}"
        )
    wanted = x.requires_grad or residual.requires_grad or weight.requires_grad
    tracked = torch.is_grad_enabled() and wanted
    if is_left_to_torch(x):
        total = x + residual
        return _by_torch(total, weight, eps), total
    residual = residual.contiguous()
    if tracked:
        return _AddRmsNorm.apply(x, residual, weight, eps)
    return _add_norm(x, residual, weight, eps)


def _by_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x, weight.shape, None, eps) * weight).to(x.dtype)


def _rows(op: str, x: Tensor, weight: Tensor) -> Tensor:
    """x as the kernels read it, once its rows are known to fit the weight."""
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"{op}: x: expected [..., {weight.numel()}] for weight {list(weight.shape)}, "
            f"got {list(x.shape)}"
        )
    if weight.dtype not in (x.dtype, torch.float32) or weight.device != x.device:
        raise ValueError(
            f"{op}: weight: expected {x.dtype} or torch.float32 on {x.device}, "
            f"got {weight.dtype} on {weight.device}"
        )
    return x.contiguous()
