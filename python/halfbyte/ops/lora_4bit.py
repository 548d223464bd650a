"""lora_4bit: y = x W^T + s (x A^T) B^T for the 4-bit weights W of one input, and all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from halfbyte.ops.dequantize_4bit import values
from halfbyte.ops.gemm_4bit import accepted, grad_x, is_dequantized, product
from halfbyte.ops.library import product_fp32
from halfbyte.ops.lora_product import lora_product
from halfbyte.ops.quant_state import QuantState

Weight = tuple[Tensor, QuantState]


class _Lora4bit(torch.autograd.Function):
    """All weights of one input in one node; saved are the input and what is as narrow as r.

    Differentiable once, as the kernels record no gradient.
    """

    @staticmethod
    def forward(ctx, weights, scaling, unread, x, *tensors):
        outs, saved = _outputs(weights, scaling, unread, x, tensors)
        ctx.save_for_backward(*saved)
        ctx.weights, ctx.scaling, ctx.shape = weights, scaling, x.shape
        ctx.dropped = len(tensors) > 2 * len(weights)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        count = len(ctx.weights)
        hidden, a, *rest = ctx.saved_tensors
        b, inputs = rest[:count], rest[count:]
        ranks = [own.shape[1] for own in b]
        grads = [_rows(grad) for grad in grads]
        # A kernel of ours comes first, which leaves autograd's thread a CUDA context: without one
        # torch's products warn.
        asked = ctx.needs_input_grad[3]
        first = [values(*ctx.weights[0], grads[0].dtype)] if asked and grads[0].is_cuda else []
        grad_hidden = torch.empty_like(hidden)
        parts = _parts(grad_hidden, ranks, 1)
        # Beside a weight's product the first part is made by the launch that reads all of them.
        made = bool(first) and not ctx.dropped
        for part, grad, own in list(zip(parts, grads, b, strict=True))[made:]:
            part.addmm_(grad, own, beta=0, alpha=ctx.scaling)
        of_x = None
        if asked:
            narrow = None if ctx.dropped else (grad_hidden, a, b[0], ctx.scaling)
            of_x = _grad_input(grads, ctx.weights, first, narrow).view(ctx.shape)
        pairs = zip(grads, _parts(hidden, ranks, 1), strict=True)
        grads_b = [product_fp32(grad.t(), part) for grad, part in pairs]
        grads_dropped = []
        if ctx.dropped:
            triples = list(zip(parts, inputs, _parts(a, ranks, 0), strict=True))
            grads_a = [product_fp32(part.t(), dropped) for part, dropped, _ in triples]
            grads_dropped = [torch.mm(part, own).view(ctx.shape) for part, _, own in triples]
        else:
            grads_a = _parts(product_fp32(grad_hidden.t(), inputs[0]), ranks, 0)
        return None, None, None, of_x, *grads_a, *grads_b, *grads_dropped


def _outputs(
    weights: Sequence[Weight], scaling: float, unread: bool, x: Tensor, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and what the backward needs: hidden [M, sum of r], a, every b, the inputs."""
    count, lead = len(weights), x.shape[:-1]
    rows = _rows(x)
    drops = len(tensors) > 2 * count
    inputs = [_rows(dropped) for dropped in tensors[2 * count :]] or [rows]
    a, *b = _narrowed(tensors[:count], tensors[count : 2 * count], x.dtype)
    ranks = [own.shape[1] for own in b]
    hidden = x.new_empty(rows.shape[0], a.shape[0])
    parts = _parts(hidden, ranks, 1)
    # Beside the first weight's product its launch makes hidden for all of them.
    made = not (unread or drops) and is_dequantized(rows, weights[0][1])
    if drops:
        for part, dropped, own in zip(parts, inputs, _parts(a, ranks, 0), strict=True):
            part.addmm_(dropped, own.t(), beta=0, alpha=scaling)
    elif not made:
        hidden.addmm_(rows, a.t(), beta=0, alpha=scaling)
    if unread:
        outs = [rows.new_zeros(()).expand(rows.shape[0], own.shape[0]) for own in b]
    elif made:
        outs = _products(rows, weights, [hidden, *parts[1:]], b, (a, scaling))
    else:
        outs = _products(rows, weights, parts, b)
    return [out.view(*lead, out.shape[1]) for out in outs], [hidden, a, *b, *inputs]


def _products(
    rows: Tensor,
    weights: Sequence[Weight],
    hidden: Sequence[Tensor],
    b: Sequence[Tensor],
    narrow: tuple[Tensor, float] | tuple[()] = (),
) -> list[Tensor]:
    """rows W^T + hidden b^T for each weight; narrow: a and scaling, where they make hidden[0]."""
    outs = []
    for weight, part, own in zip(weights, hidden, b, strict=True):
        if is_dequantized(rows, weight[1]):
            out = lora_product(rows, values(*weight, rows.dtype), part, own, False, *narrow)
            narrow = ()
        else:
            out = product(rows, *weight).addmm_(part, own.t())
        outs.append(out)
    return outs


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _parts(x: Tensor, sizes: list[int], dim: int) -> Sequence[Tensor]:
    return (x,) if len(sizes) == 1 else torch.split_with_sizes(x, sizes, dim)


def _narrowed(a: Sequence[Tensor], b: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All a, one below the other, and every b, in the dtype of the products.

    Gathered and then cast, which a GPU does faster than it casts them to where they belong.
    """
    if len(a) == 1:
        return [a[0].to(dtype), b[0].to(dtype)]
    tensors = (*a, *b)
    gathered = _flatten_dense_tensors(tensors).to(dtype)
    below = gathered[: sum(own.numel() for own in a)].view(-1, a[0].shape[1])
    return [below, *_unflatten_dense_tensors(gathered, tensors)[len(a) :]]


def _grad_input(
    grads: Sequence[Tensor],
    weights: Sequence[Weight],
    first: list[Tensor],
    narrow: tuple[Tensor, Tensor, Tensor, float] | None,
) -> Tensor:
    """The sum of grad W and of the product of what is narrow: grad_hidden and a.

    On a GPU the first columns of grad_hidden are made here, from the first b and scaling. first:
    there the first W, dequantized; it is taken out, so that one is there at a time.
    """
    if not grads[0].is_cuda:
        total = grad_x(grads[0], *weights[0])
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            total.add_(grad_x(grad, *weight))
        return total if narrow is None else total.addmm_(*narrow[:2])
    total = None
    for grad, weight in zip(grads, weights, strict=True):
        matrix = first.pop() if first else values(*weight, grad.dtype)
        if total is not None:
            total.addmm_(grad, matrix)
        elif narrow is not None:
            grad_hidden, a, own, scaling = narrow
            total = lora_product(grad, matrix, grad_hidden, a, True, own, scaling)
        else:
            total = torch.mm(grad, matrix)
        del matrix
    return total


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
    x = accepted(x, *weights[0])
    for packed, state in weights[1:]:
        accepted(x, packed, state)
    tensors = (*a, *b, *(other.to(x.dtype) for other in dropped))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors)):
        return list(_Lora4bit.apply(weights, scaling, unread, x, *tensors))
    return _outputs(weights, scaling, unread, x, tensors)[0]
