"""Plain functions over torch tensors, registered so that torch.compile sees through them."""

from halfbyte.ops.cross_entropy import cross_entropy
from halfbyte.ops.dequantize_4bit import dequantize_4bit
from halfbyte.ops.draw import draw
from halfbyte.ops.gemm_4bit import gemm_4bit, gemm_4bit_group
from halfbyte.ops.gemv import gemv
from halfbyte.ops.lora_4bit import lora_4bit
from halfbyte.ops.paged_attention import paged_attention
from halfbyte.ops.quant_state import Nested, QuantState
from halfbyte.ops.quantize_4bit import dynamic_map, quantize_4bit
from halfbyte.ops.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from halfbyte.ops.rms_norm import add_rms_norm, rms_norm
from halfbyte.ops.rope import rope
from halfbyte.ops.swiglu import swiglu

__all__ = [
    "Nested",
    "QuantState",
    "add_rms_norm",
    "cross_entropy",
    "dequantize_4bit",
    "dequantize_blockwise",
    "draw",
    "dynamic_map",
    "gemm_4bit",
    "gemm_4bit_group",
    "gemv",
    "lora_4bit",
    "paged_attention",
    "quantize_4bit",
    "quantize_blockwise",
    "rms_norm",
    "rope",
    "swiglu",
]
