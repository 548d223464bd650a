"""cross_entropy: language-model loss from hidden states, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define, product_fp32

IGNORE = -100
# A chunk's logits take this much, or more where that is still a tenth of all logits in fp32.
CHUNK_BYTES = 48 << 20
SHARE = 0.1
TILE = 128  # rows of a tile of torch's matrix products
WIDEST = 8192  # columns of a stripe of the vocabulary
ALIGNED = 8  # columns of logits, so that products of any vocabulary run at full speed
# On a CPU so many bytes in fp32 stay in the caches, and their memory in the process, between two
# operations.
CACHED_BYTES = 12 << 20


def _softmax(
    logits: Tensor,
    labels: Tensor,
    vocab: int,
    divisor: Tensor | None,
    losses: Tensor,
    logsumexps: Tensor,
) -> None:
    """Fills fp32 [rows]; with a divisor, logits [rows, >= vocab] become the losses' gradient."""
    if logits.is_cuda:
        _core.cross_entropy(logits, labels, losses, logsumexps, vocab, divisor)
        return
    rows = max(1, CACHED_BYTES // (4 * vocab))
    tensors = (logits[:, :vocab], labels, losses, logsumexps)
    for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        _softmax_by_torch(*part, divisor)


def _softmax_by_torch(
    whole: Tensor, labels: Tensor, losses: Tensor, logsumexps: Tensor, divisor: Tensor | None
) -> None:
    """The same for logits [rows, vocab]: torch's exponential is vectorized on the CPU."""
    keep = labels >= 0
    x, index = whole.float(), labels.clamp(min=0).long()[:, None]
    logsumexp = x.logsumexp(1, keepdim=True)
    # where, not a product: a masked row may hold Inf or NaN.
    losses.copy_(torch.where(keep, (logsumexp - x.gather(1, index))[:, 0], 0.0))
    logsumexps.copy_(logsumexp[:, 0])
    if divisor is not None:
        x = x.sub_(logsumexp).exp_()
        x.scatter_add_(1, index, torch.full_like(logsumexp, -1.0))
        whole.copy_(x.masked_fill_(~keep[:, None], 0.0).div_(divisor))


def _differentiate(
    logits: Tensor, labels: Tensor, logsumexps: Tensor, divisor: Tensor, first: int, width: int
) -> None:
    """Logits of some columns of the vocabulary become the gradient of the losses' sum over it."""
    if logits.is_cuda:
        _core.cross_entropy_backward(logits, labels, logsumexps, divisor, first, width)
        return
    part = logits[:, :width]
    x = part.float().sub_(logsumexps[:, None]).exp_()
    columns = torch.arange(first, first + width, device=x.device)
    x -= (columns == labels[:, None]).float()
    part.copy_(x.masked_fill_(labels[:, None] < 0, 0.0).div_(divisor))


def _loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, of_hidden: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    loss, grad_hidden, logsumexps = _loss_fake(hidden, weight, labels, divisor, of_hidden, chunk)
    tokens, vocab = len(hidden), len(weight)
    buffer = hidden.new_empty(min(chunk, tokens), _stride(vocab))
    losses = torch.empty_like(logsumexps)
    for start in range(0, tokens, chunk):
        rows = slice(start, min(start + chunk, tokens))
        h = hidden[rows]
        whole = buffer[: len(h)]
        logits = whole[:, :vocab]
        torch.mm(h, weight.t(), out=logits)
        wanted = divisor if of_hidden else None
        _softmax(whole, labels[rows], vocab, wanted, losses[rows], logsumexps[rows])
        if of_hidden:
            torch.mm(logits, weight, out=grad_hidden[rows])
    loss.copy_(losses.sum())
    return loss, grad_hidden, logsumexps


def _loss_fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, of_hidden: bool, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    logsumexps = hidden.new_empty(len(hidden), dtype=torch.float32)
    return hidden.new_empty((), dtype=torch.float32), grad_hidden, logsumexps


def _grad_weight(
    hidden: Tensor, weight: Tensor, labels: Tensor, logsumexps: Tensor, divisor: Tensor, width: int
) -> Tensor:
    grad_weight = torch.empty_like(weight)
    tokens, vocab = len(hidden), len(weight)
    buffer = hidden.new_empty(tokens, _stride(min(width, vocab)))
    # In fp16 small quotients would be lost: there the gradient is divided last.
    late = hidden.dtype == torch.float16
    early = torch.ones_like(divisor) if late else divisor
    for first in range(0, vocab, width):
        columns = slice(first, min(first + width, vocab))
        w, out = weight[columns], grad_weight[columns]
        logits = buffer[:, : len(w)]
        torch.mm(hidden, w.t(), out=logits)
        _differentiate(buffer, labels, logsumexps, early, first, len(w))
        if late:
            torch.div(product_fp32(logits.t(), hidden), divisor, out=out)
        else:
            torch.mm(logits.t(), hidden, out=out)
    return grad_weight


def _grad_weight_fake(
    hidden: Tensor, weight: Tensor, labels: Tensor, logsumexps: Tensor, divisor: Tensor, width: int
) -> Tensor:
    return torch.empty_like(weight)


def _stride(columns: int) -> int:
    return -(-columns // ALIGNED) * ALIGNED


define(
    "cross_entropy(Tensor hidden, Tensor weight, Tensor labels, Tensor divisor, bool of_hidden, "
    "SymInt chunk) -> (Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
)
define(
    "cross_entropy_grad_weight(Tensor hidden, Tensor weight, Tensor labels, Tensor logsumexps, "
    "Tensor divisor, SymInt width) -> Tensor",
    _grad_weight,
    _grad_weight_fake,
)


class _CrossEntropy(torch.autograd.Function):
    """The gradient of hidden is computed in the forward, so that no chunk's logits outlive it.

    That of the weight is a sum over all tokens: the backward computes the logits again, some
    columns at a time, so that it is added up in fp32 and rounded once, without a copy in fp32.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, divisor, chunk, width):
        # In fp16 small quotients would be lost: there the gradients are divided last.
        late = divisor if hidden.dtype == torch.float16 else torch.ones_like(divisor)
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        loss, grad_hidden, logsumexps = torch.ops.halfbyte.cross_entropy(
            hidden, weight, labels, divisor / late, of_hidden, chunk
        )
        again = (hidden, weight, labels, logsumexps, divisor) if of_weight else ()
        ctx.save_for_backward(grad_hidden, late, *again)
        ctx.width = width
        return loss / divisor[0]

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, late, *again = ctx.saved_tensors
        of_hidden = of_weight = None
        # First, so that its logits are gone before there is a second gradient of hidden.
        if again:
            *again, divisor = again
            of_weight = torch.ops.halfbyte.cross_entropy_grad_weight(
                *again, divisor / grad_loss, ctx.width
            )
        if ctx.needs_input_grad[0]:
            # A scale of one dimension is multiplied in fp32 and rounded with the product.
            scale = grad_loss / late
            of_hidden = torch.mul(grad_hidden, scale, out=torch.empty_like(grad_hidden))
        return of_hidden, of_weight, None, None, None, None


def chunk_rows(tokens: int, vocab: int, logit_bytes: int) -> int:
    """Tokens a chunk: a multiple of a tile, or as many as the bytes allow if they are fewer."""
    rows = max(CHUNK_BYTES // (4 * vocab), int(SHARE * 4 * tokens) // logit_bytes)
    return rows // TILE * TILE or max(1, rows)


def _stripe(hidden: Tensor, vocab: int, logit_bytes: int) -> int:
    """Columns of the vocabulary at a time: a multiple of a tile, in as much memory as a chunk."""
    tokens, size = hidden.shape
    # In fp16 the gradient is in fp32 until it is divided.
    column = logit_bytes * tokens + (4 * size if hidden.dtype == torch.float16 else 0)
    columns = chunk_rows(tokens, vocab, logit_bytes) * vocab * logit_bytes // max(1, column)
    return min(columns // TILE * TILE or max(1, columns), WIDEST)


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
    width = _stripe(hidden, vocab, logit_bytes)
    return _CrossEntropy.apply(hidden, head_weight, rows, divisor, chunk, width)


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
