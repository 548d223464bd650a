"""RMSNorm, computed in fp32 whatever the dtype of the stream."""

import torch
from torch import Tensor, nn

from halfbyte.linear import Summed, Unnormed, is_watched
from halfbyte.ops import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    The quotient is computed in fp32 and rounded to x's dtype before the weight, as transformers
    does; the result has x's dtype also where the weight is kept in fp32.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def add_norm(
    norm: nn.Module, x: Tensor | Summed, residual: Tensor, waits: bool = False
) -> tuple[Tensor | Unnormed, Tensor]:
    """The norm of x + residual, and that sum.

    norm: an RMSNorm, or what stands in its place. waits: for the launch behind it, if it can, where
    the sum is there already.
    """
    plain = type(norm) is RMSNorm and not is_watched(norm)
    if plain and not isinstance(x, Summed):
        # What autocast computed is narrower than the stream.
        return add_rms_norm(x.to(residual.dtype), residual, norm.weight, norm.eps)
    total = x.total if isinstance(x, Summed) else x + residual
    if waits and plain and isinstance(x, Summed) and norm.weight.dtype == total.dtype:
        return Unnormed(x, norm.weight, norm.eps), total
    return norm(total), total
