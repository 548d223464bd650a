"""RMSNorm, computed in fp32 whatever the dtype of the stream."""

import torch
from torch import Tensor, nn

from halfbyte.linear import Summed, Unnormed
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

    def add(self, x: Tensor | Summed, residual: Tensor) -> tuple[Tensor | Unnormed, Tensor]:
        """The norm of x + residual, and that sum; where it is there already the norm may wait."""
        if not isinstance(x, Summed):
            return add_rms_norm(x, residual, self.weight, self.eps)
        if self.weight.dtype != x.total.dtype:
            return self(x.total), x.total
        return Unnormed(x, self.weight, self.eps), x.total
