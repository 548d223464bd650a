"""RMSNorm, computed in fp32 whatever the dtype of the stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        normed = F.rms_norm(x, self.weight.shape, None, self.eps)
        return (normed * self.weight).to(x.dtype)
