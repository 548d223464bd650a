"""lora_4bit: y = x W^T + s (x A^T) B^T for the 4-bit weights W of one input, and all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.gemm_4bit import accepted, grad_x, is_dequantized, product
from halfbyte.ops.quant_state import QuantState

Weight = tuple[Tensor, QuantState]


class _Lora4bit(torch.autograd.Function):
    """All weights of one input in one node; saved are the input and what is as narrow as r."""

    @staticmethod
    def forward(ctx, weights, scaling, unread, x, *tensors):
        outs, hidden, a, b, inputs = _outputs(weights, scaling, unread, x, tensors)
        ctx.save_for_backward(hidden, a, *b, *inputs)
        ctx.weights, ctx.scaling, ctx.shape = weights, scaling, x.shape
        ctx.dropped = len(tensors) > 2 * len(weights)
        return tuple(outs)

    @staticmethod
    def backward(ctx, *grads):
        count = len(ctx.weights)
        hidden, a, *rest = ctx.saved_tensors
        b, inputs = rest[:count], rest[count:]
        ranks = [own.shape[1] for own in b]
        grads = [_rows(grad) for grad in grads]
        grad_hidden = torch.empty_like(hidden)
        parts = grad_hidden.split(ranks, 1)
        for part, grad, own in zip(parts, grads, b, strict=True):
            part.addmm_(grad, own, beta=0, alpha=ctx.scaling)
        grads_b = [
            _product_fp32(grad.t(), part)
            for grad, part in zip(grads, hidden.split(ranks, 1), strict=True)
        ]
        total, grads_dropped = None, []
        if ctx.dropped:
            pairs = list(zip(parts, inputs, a.split(ranks), strict=True))
            grads_a = [_product_fp32(part.t(), dropped) for part, dropped, _ in pairs]
            grads_dropped = [torch.mm(part, own).view(ctx.shape) for part, _, own in pairs]
        else:
            grads_a = _product_fp32(grad_hidden.t(), inputs[0]).split(ranks)
            total = torch.mm(grad_hidden, a) if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[3]:
            for grad, weight in zip(grads, ctx.weights, strict=True):
                total = _added_grad(total, grad, *weight)
            total = total.view(ctx.shape)
        return None, None, None, total, *grads_a, *grads_b, *grads_dropped


def _outputs(
    weights: Sequence[Weight], scaling: float, unread: bool, x: Tensor, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The outputs, and what the backward needs: hidden [M, sum of r], a, every b, the inputs."""
    count = len(weights)
    rows = _rows(x)
    inputs = [_rows(dropped) for dropped in tensors[2 * count :]] or [rows]
    ranks = [len(a) for a in tensors[:count]]
    a, b = _narrowed(tensors[:count], tensors[count : 2 * count], x.dtype)
    hidden = x.new_empty(len(rows), sum(ranks))
    parts = hidden.split(ranks, 1)
    if len(inputs) == 1:
        hidden.addmm_(inputs[0], a.t(), beta=0, alpha=scaling)
    else:
        for part, dropped, own in zip(parts, inputs, a.split(ranks), strict=True):
            part.addmm_(dropped, own.t(), beta=0, alpha=scaling)
    outs = [
        _output(rows, *weight, part, own, unread).view(*x.shape[:-1], len(own))
        for weight, part, own in zip(weights, parts, b, strict=True)
    ]
    return outs, hidden, a, b, inputs


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _narrowed(
    a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """All a, one below the other, and every b, in one launch; parameters stay in fp32."""
    below = a[0].new_empty(sum(len(own) for own in a), a[0].shape[1], dtype=dtype)
    beside = [torch.empty_like(own, dtype=dtype) for own in b]
    torch._foreach_copy_([*below.split([len(own) for own in a]), *beside], [*a, *b])
    return below, beside


def _output(
    rows: Tensor, packed: Tensor, state: QuantState, hidden: Tensor, b: Tensor, unread: bool
) -> Tensor:
    if unread:
        return rows.new_zeros(()).expand(len(rows), len(b))
    if not is_dequantized(rows, state):
        return product(rows, packed, state).addmm_(hidden, b.t())
    # The large product comes last: it reads what it adds to while it multiplies.
    return torch.mm(hidden, b.t()).addmm_(rows, dequantize_4bit(packed, state, rows.dtype).t())


def _added_grad(total: Tensor | None, grad: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """total + grad W, in total's memory."""
    if total is None:
        return grad_x(grad, packed, state)
    if not grad.is_cuda:
        return total.add_(grad_x(grad, packed, state))
    return total.addmm_(grad, dequantize_4bit(packed, state, grad.dtype))


def _product_fp32(x: Tensor, y: Tensor) -> Tensor:
    """x y as it is accumulated: a parameter's gradient is not rounded to 16 bits first."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x.float(), y.float())


def lora_4bit(
    x: Tensor,
    weights: Sequence[Weight],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: float,
    dropped: Sequence[Tensor] = (),
    unread: bool = False,
) -> list[Tensor]:
    """[x W^T + scaling (x a^T) b^T] for each weight with its adapter; differentiable in all floats.

    x: [..., K], fp32, fp16 or bf16; under autocast it is cast to autocast's dtype. weights:
    (packed, state) of W [N, K]. a: [r, K], b: [N, r], fp32, multiplied in x's dtype; their
    gradients are fp32. dropped: instead of x for each a, x's shape. unread: only gradients are
    asked for, the outputs may hold anything. Returns [..., N] each, in the (cast) dtype of x.

    Raises what gemm_4bit raises.
    """
    for packed, state in weights:
        x = accepted(x, packed, state)
    dropped = [other.to(x.dtype) for other in dropped]
    tensors = (*a, *b, *dropped)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
        return list(_Lora4bit.apply(weights, scaling, unread, x, *tensors))
    return _outputs(weights, scaling, unread, x, tensors)[0]
