"""cross_entropy: language-model loss from hidden states, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define

IGNORE = -100
# A chunk's logits take this much, or more where that is still a tenth of all logits in fp32.
CHUNK_BYTES = 48 << 20
SHARE = 0.1
TILE = 128  # rows of a tile of torch's matrix products
ALIGNED = 8  # columns of logits, so that products of any vocabulary run at full speed
# On a CPU so many bytes in fp32 stay in the caches, and their memory in the process, between two
# operations.
CACHED_BYTES = 12 << 20


def _softmax(logits: Tensor, labels: Tensor, vocab: int, divisor: Tensor | None) -> Tensor:
    """Losses fp32 [rows]; with a divisor, logits [rows, >= vocab] become their sum's gradient."""
    if logits.is_cuda:
        losses = logits.new_empty(len(labels), dtype=torch.float32)
        _core.cross_entropy(logits, labels, losses, vocab, divisor)
        return losses
    rows = max(1, CACHED_BYTES // (4 * vocab))
    parts = zip(logits[:, :vocab].split(rows), labels.split(rows), strict=True)
    return torch.cat([_softmax_by_torch(*part, divisor) for part in parts])


def _softmax_by_torch(whole: Tensor, labels: Tensor, divisor: Tensor | None) -> Tensor:
    """The same for logits [rows, vocab]: torch's exponential is vectorized on the CPU."""
    keep = labels >= 0
    x, index = whole.float(), labels.clamp(min=0).long()[:, None]
    logsumexp = x.logsumexp(1, keepdim=True)
    # where, not a product: a masked row may hold Inf or NaN.
    losses = torch.where(keep, (logsumexp - x.gather(1, index))[:, 0], 0.0)
    if divisor is not None:
        x = x.sub_(logsumexp).exp_()
        x.scatter_add_(1, index, torch.full_like(logsumexp, -1.0))
        whole.copy_(x.masked_fill_(~keep[:, None], 0.0).div_(divisor))
    return losses


def _accumulate(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """total [V, d] fp32 += grad^T hidden."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.t(), hidden)
    elif grad.is_cuda:
        torch.addmm(total, grad.t(), hidden, out_dtype=torch.float32, out=total)
    else:
        total.add_(grad.t() @ hidden)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    divisor: Tensor,
    of_hidden: bool,
    of_weight: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, grad_hidden, grad_weight = _loss_fake(
        hidden, weight, labels, divisor, of_hidden, of_weight, chunk
    )
    tokens, vocab = len(hidden), len(weight)
    stride = -(-vocab // ALIGNED) * ALIGNED
    buffer = hidden.new_empty(min(chunk, tokens), stride)
    grad_weight.zero_()
    losses = hidden.new_zeros(tokens, dtype=torch.float32)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        h = hidden[rows]
        whole = buffer[: len(h)]
        logits = whole[:, :vocab]
        torch.mm(h, weight.t(), out=logits)
        wanted = of_hidden or of_weight
        losses[rows] = _softmax(whole, labels[rows], vocab, divisor if wanted else None)
        if of_hidden:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if of_weight:
            _accumulate(grad_weight, logits, h)
    loss.copy_(losses.sum())
    return loss, grad_hidden, grad_weight


def _loss_fake(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    divisor: Tensor,
    of_hidden: bool,
    of_weight: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    shape = weight.shape if of_weight else (0,)
    grad_weight = weight.new_empty(shape, dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), grad_hidden, grad_weight


define(
    "cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor divisor, bool of_hidden, "
    "bool of_weight, SymInt chunk) -> (Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
)


class _CrossEntropy(torch.autograd.Function):
    """Computes gradients in the forward, so that no chunk's logits outlive the chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, divisor, chunk):
        # In fp16 small quotients would be lost: there the gradients are divided last.
        late = divisor if hidden.dtype == torch.float16 else torch.ones_like(divisor)
        loss, *grads = torch.ops.halfbyte.cross_entropy(
            hidden, weight, labels, divisor / late, *ctx.needs_input_grad[:2], chunk
        )
        ctx.save_for_backward(*grads, late)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss / divisor[0]

    @staticmethod
    def backward(ctx, grad_loss):
        *grads, late = ctx.saved_tensors
        scale = grad_loss / late
        scaled = [
            # A scale of one dimension is multiplied in fp32 and rounded with the product.
            torch.mul(grad, scale, out=torch.empty_like(grad, dtype=dtype)) if wanted else None
            for grad, dtype, wanted in zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return *scaled, None, None, None


def chunk_rows(tokens: int, vocab: int, logit_bytes: int) -> int:
    """Tokens a chunk: a multiple of a tile, or as many as the bytes allow if they are fewer."""
    rows = max(CHUNK_BYTES // (4 * vocab), int(SHARE * 4 * tokens) // logit_bytes)
    return rows // TILE * TILE or max(1, rows)


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
    masked the default loss is 0, not NaN. chunk: tokens a piece (default: so that their logits
    take 48 MiB or a tenth of all logits in fp32). Returns an fp32 scalar, differentiable in hidden
    and head_weight.

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
    vocab = head_weight.shape[0]
    divisor = _checked_divisor(labels, num_items, vocab)
    if isinstance(divisor, Tensor):
        divisor = divisor.to(hidden.device, torch.float32).view(1)
    else:
        divisor = hidden.new_full((1,), divisor, dtype=torch.float32)
    # What is out of range is masked, or has made the divisor NaN.
    rows = torch.where(labels == IGNORE, -1, labels.clamp(0, vocab - 1)).int()
    # On the CPU the logits of a chunk are computed in fp32.
    logit_bytes = hidden.element_size() if hidden.is_cuda else 4
    chunk = chunk or chunk_rows(len(hidden), vocab, logit_bytes)
    return _CrossEntropy.apply(hidden, head_weight, rows, divisor, chunk)


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
