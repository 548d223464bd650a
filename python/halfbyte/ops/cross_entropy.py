"""cross_entropy: language-model loss from hidden states, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100
# fp32 logits of one chunk at most: 64 MiB, whatever the vocabulary.
CHUNK_BYTES = 64 << 20


class _CrossEntropy(torch.autograd.Function):
    """Computes gradients in the forward, so that no chunk's logits outlive the chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, divisor, chunk):
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            h, target = hidden[rows], labels[rows]
            logits = (h @ weight.t()).float()
            keep = target != IGNORE
            # What is out of range is masked, or has made the divisor NaN.
            index = target.clamp(0, weight.shape[0] - 1).unsqueeze(1)
            logsumexp = torch.logsumexp(logits, dim=1)
            picked = logits.gather(1, index).squeeze(1)
            # where, not a product: a masked row may hold Inf or NaN.
            loss += torch.where(keep, logsumexp - picked, 0.0).sum()
            if not (want_hidden or want_weight):
                continue
            grad = logits.sub_(logsumexp.unsqueeze(1)).exp_()
            grad.scatter_add_(1, index, torch.full_like(picked, -1.0).unsqueeze(1))
            grad = torch.where(keep.unsqueeze(1), grad, 0.0).div_(divisor).to(hidden.dtype)
            if want_hidden:
                grad_hidden[rows] = grad @ weight
            if want_weight:
                grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss / divisor

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum of -log softmax(hidden W^T)[label] over the labels that are not -100, over `num_items`.

    hidden: [T, d]; head_weight: [V, d], same dtype; labels: int64 [T], already shifted.
    num_items: the divisor (default: the number of labels that are not -100); with every label
    masked the default loss is 0, not NaN. chunk: tokens a piece (default: so that fp32 logits
    take at most 64 MiB). Returns an fp32 scalar, differentiable in hidden and head_weight.

    Raises ValueError for shapes that do not fit, labels that are no row of the head and
    num_items <= 0, naming them. On a GPU and under torch.compile, which would have to wait for
    the values, loss and gradients are NaN instead.
    """
    if hidden.dim() != 2 or hidden.shape[1] != head_weight.shape[1]:
        raise ValueError(
            f"cross_entropy: hidden: expected [T, {head_weight.shape[1]}], got {list(hidden.shape)}"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"cross_entropy: labels: expected [{hidden.shape[0]}], got {list(labels.shape)}"
        )
    if num_items is None:
        num_items = (labels != IGNORE).sum().clamp(min=1)
    divisor = _checked_divisor(labels, num_items, head_weight.shape[0])
    chunk = chunk or max(1, CHUNK_BYTES // (4 * head_weight.shape[0]))
    return _CrossEntropy.apply(hidden, head_weight, labels, divisor, chunk)


def _checked_divisor(labels: Tensor, num_items: Tensor | float, vocab: int) -> Tensor | float:
    """`num_items`, or NaN where it or a label is out of range and an error would have to wait."""
    unread = labels.is_cuda or torch.compiler.is_compiling()
    if not (unread and isinstance(num_items, Tensor)) and not num_items > 0:
        raise ValueError(f"cross_entropy: num_items: expected > 0, got {float(num_items):g}")
    outside = (labels != IGNORE) & ((labels < 0) | (labels >= vocab))
    if unread:
        divisor = torch.where(outside.any(), torch.nan, num_items)
        return torch.where(divisor > 0, divisor, torch.nan)
    if outside.any():
        got = labels[outside][0].item()
        raise ValueError(f"cross_entropy: labels: expected -100 or 0 to {vocab - 1}, got {got}")
    return num_items
