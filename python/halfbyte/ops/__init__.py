"""Plain functions over torch tensors, registered so that torch.compile sees through them."""

from halfbyte.ops.cross_entropy import cross_entropy
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.gemm_4bit import gemm_4bit
from halfbyte.ops.quant_state import Nested, QuantState
from halfbyte.ops.quantize_4bit import dynamic_map, quantize_4bit
from halfbyte.ops.quantize_blockwise import dequantize_blockwise, quantize_blockwise

__all__ = [
    "Nested",
    "QuantState",
    "cross_entropy",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dynamic_map",
    "gemm_4bit",
    "quantize_4bit",
    "quantize_blockwise",
]
