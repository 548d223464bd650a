"""quantize_blockwise, dequantize_blockwise: 8-bit codes for optimizer state."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def quantize_blockwise(
    x: Tensor, signed: bool = True, blocksize: int = 256
) -> tuple[Tensor, Tensor]:
    """Nearest entry of the dynamic 8-bit map to x / absmax, block by block.

    x: fp32, fp16 or bf16, any shape. Returns codes uint8 of x's shape and absmax fp32
    [ceil(n / blocksize)] (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").
    Raises ValueError for another dtype or block size.
    """
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"quantize_blockwise: blocksize: expected {BLOCKSIZES}, got {blocksize!r}")
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = x.new_empty(-(-x.numel() // blocksize), dtype=torch.float32)
    _core.quantize_blockwise(x.detach().contiguous(), codes, absmax, signed, blocksize)
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    signed: bool = True,
    blocksize: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`map[code] * absmax`, of the shape of `codes`. Inverse of `quantize_blockwise`."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    _core.dequantize_blockwise(codes.contiguous(), absmax, signed, blocksize, out)
    return out
