"""swiglu: silu(gate) * up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from halfbyte import _core
from halfbyte.ops.library import define, is_left_to_torch


def _product(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    _core.swiglu(gate, up, out)
    return out


def _product_fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _gradients(grad: Tensor, gate: Tensor, up: Tensor, halves: bool) -> Tensor:
    grads = _gradients_fake(grad, gate, up, halves)
    _core.swiglu_backward(grad, gate, up, grads, halves)
    return grads


def _gradients_fake(grad: Tensor, gate: Tensor, up: Tensor, halves: bool) -> Tensor:
    rows, columns = gate.shape
    return gate.new_empty((rows, 2, columns) if halves else (2, rows, columns))


_forward = define("swiglu(Tensor gate, Tensor up) -> Tensor", _product, _product_fake)
_backward = define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up, bool halves) -> Tensor",
    _gradients,
    _gradients_fake,
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        grads = _backward(grad.contiguous(), *ctx.saved_tensors, False)
        return grads[0], grads[1]


class _SwigluOfHalves(torch.autograd.Function):
    """The gradient of both halves is written where they lie, not gathered from two tensors."""

    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _forward(*both.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        halves = both.chunk(2, dim=-1)
        grads = _backward(grad.contiguous(), *halves, True)
        return grads.view(both.shape)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, differentiable in both.

    gate, up: [..., d], one dtype, fp32, fp16 or bf16; without up, gate is [..., 2 d] and holds
    both, gate first. silu is computed in fp32 and rounded to the dtype, as torch does. Returns
    [..., d].

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"swiglu: gate: expected [..., 2 d], got {list(gate.shape)}")
        if _is_left_to_torch(gate):
            return _by_torch(*gate.chunk(2, dim=-1))
        both = _rows(gate)
        if torch.is_grad_enabled() and both.requires_grad:
            out = _SwigluOfHalves.apply(both)
        else:
            out = _forward(*both.chunk(2, dim=-1))
        return out.view(*gate.shape[:-1], gate.shape[-1] // 2)
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.device != up.device:
        raise ValueError(f"swiglu: up: expected {_described(gate)}, got {_described(up)}")
    if _is_left_to_torch(gate):
        return _by_torch(gate, up)
    rows = _rows(gate), _rows(up)
    tracked = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
    out = _Swiglu.apply(*rows) if tracked else _forward(*rows)
    return out.view(gate.shape)


def _is_left_to_torch(gate: Tensor) -> bool:
    """Its fp16 is vectorized on the CPU, where ours is not."""
    return is_left_to_torch(gate) or gate.is_cpu and gate.dtype == torch.float16


def _by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _rows(x: Tensor) -> Tensor:
    """[..., d] as a matrix, without a copy where rows lie one distance apart."""
    matrix = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    apart = matrix.stride(-1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if apart else matrix.contiguous()


def _described(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}"
