"""dequantize_4bit: packed codes and scales -> a float tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define
from halfbyte.ops.quant_state import QuantState
from halfbyte.ops.quantize_4bit import FLOAT_DTYPES


def _values(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: float,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    out = packed.new_empty(shape, dtype=dtype)
    scales = (absmax, nested_absmax, nested_map, offset)
    _core.dequantize_4bit(packed, *scales, quant_type, blocksize, out)
    return out


def _values_fake(
    packed, absmax, nested_absmax, nested_map, offset, quant_type, blocksize, shape, dtype
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


_dequantize = define(
    "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, "
    "float offset, str quant_type, int blocksize, SymInt[] shape, ScalarType dtype) -> Tensor",
    _values,
    _values_fake,
)


def values(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """dequantize_4bit of arguments that are known to fit."""
    return _dequantize(
        packed, *state.scale_args(), state.quant_type, state.blocksize, state.shape, dtype
    )


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """`codebook[code] * scale` in fp32, rounded once to `dtype` (default: state.dtype).

    packed: uint8 [(n + 1) // 2, 1], contiguous. Returns a tensor of state.shape.
    Raises TypeError when packed is no tensor, ValueError when packed, state and dtype do not fit
    each other.
    """
    if not isinstance(packed, Tensor):
        got = type(packed).__name__
        raise TypeError(f"dequantize_4bit: packed: expected a torch.Tensor, got {got}")
    if packed.device != state.absmax.device or packed.is_meta:
        raise ValueError(
            "dequantize_4bit: packed and state: expected both on one cpu or cuda device, got "
            f"{packed.device} and {state.absmax.device}"
        )
    dtype = dtype or state.dtype
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dequantize_4bit: dtype: expected fp32, fp16 or bf16, got {dtype}")
    return values(packed, state, dtype)
