"""quantize_4bit: a float tensor -> packed 4-bit codes and their scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define
from halfbyte.ops.quant_state import BLOCKSIZES, NESTED_BLOCKSIZE, QUANT_TYPES, Nested, QuantState

MEAN_CHUNK = 65536  # scales whose mean is taken in 256 running sums, 2048 bytes
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _codes(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    packed, absmax = _codes_fake(x, quant_type, blocksize)
    _core.quantize_4bit(x, packed, absmax, quant_type, blocksize)
    return packed, absmax


def _codes_fake(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    packed = x.new_empty(((x.numel() + 1) // 2, 1), dtype=torch.uint8)
    absmax = x.new_empty((x.numel() + blocksize - 1) // blocksize, dtype=torch.float32)
    return packed, absmax


def _double(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = _double_fake(absmax)
    chunks = (absmax.numel() + MEAN_CHUNK - 1) // MEAN_CHUNK
    _core.double_quantize(absmax, *out, absmax.new_empty(2048 * chunks, dtype=torch.uint8))
    return out


def _double_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested = (absmax.numel() + NESTED_BLOCKSIZE - 1) // NESTED_BLOCKSIZE
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    return codes, absmax.new_empty(nested), absmax.new_empty(1)


define(
    "quantize_4bit(Tensor x, str quant_type, int blocksize) -> (Tensor, Tensor)",
    _codes,
    _codes_fake,
)
define("double_quantize(Tensor absmax) -> (Tensor, Tensor, Tensor)", _double, _double_fake)


def quantize_4bit(
    x: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    name: str = "x",
) -> tuple[Tensor, QuantState]:
    """Quantize `x` in blocks of `blocksize` consecutive elements of the flattened tensor.

    x: fp32, fp16 or bf16, any shape (made contiguous if it is not), on CPU or CUDA.
    Returns packed uint8 [(n + 1) // 2, 1], element 2j in the high nibble of byte j, and the
    QuantState. Codes are the nearest codebook entry of x / absmax, ties to the lower one
    (Dettmers et al. 2023, section 3; bytes as bitsandbytes writes them).

    Raises TypeError when x is no tensor, ValueError for an unknown quant_type, block size, dtype
    or device, and for a NaN or Inf in `x`, naming it by `name`.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"quantize_4bit: {name}: expected a torch.Tensor, got {type(x).__name__}")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quantize_4bit: quant_type: expected {QUANT_TYPES}, got {quant_type!r}")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ValueError(f"quantize_4bit: blocksize: expected {BLOCKSIZES}, got {blocksize!r}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"quantize_4bit: {name}: expected fp32, fp16 or bf16, got {x.dtype}")
    if x.is_meta:
        raise ValueError(
            f"quantize_4bit: {name}: expected values on cpu or cuda, got a meta tensor"
        )
    packed, absmax = torch.ops.halfbyte.quantize_4bit(
        x.detach().contiguous(), quant_type, blocksize
    )
    shape, dtype = tuple(x.shape), x.dtype
    if not double_quant or absmax.numel() == 0:
        _refuse_non_finite(absmax, name, blocksize)
        return packed, QuantState(absmax, None, 0.0, blocksize, quant_type, shape, dtype)
    codes, nested_absmax, mean = torch.ops.halfbyte.double_quantize(absmax)
    offset = mean.item()
    if not math.isfinite(offset):
        _refuse_non_finite(absmax, name, blocksize)
    nested = Nested(nested_absmax, dynamic_map(signed=True)).to(x.device)
    return packed, QuantState(codes, nested, offset, blocksize, quant_type, shape, dtype)


def _refuse_non_finite(absmax: Tensor, name: str, blocksize: int) -> None:
    """A NaN or Inf reaches its block's absmax, so 1/blocksize of the data tells."""
    bad = torch.nonzero(~torch.isfinite(absmax))
    if bad.numel():
        first = int(bad[0])
        raise ValueError(
            f"quantize_4bit: {name}: expected finite values, got NaN or Inf in {len(bad)} "
            f"block(s), the first at elements {first * blocksize}..{(first + 1) * blocksize - 1}. "
            "Hint: the source weights are damaged or overflowed fp16"
        )


def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The dynamic 8-bit codebook, fp32 [256] (Dettmers et al. 2022, section 2.1)."""
    return torch.tensor(_core.dynamic_map(signed), dtype=torch.float32, device=device)
