"""halfbyte: half a byte per weight, trained and served from one wheel."""

from halfbyte import optim
from halfbyte.linear import Linear4bit
from halfbyte.lora import LoraConfig, LoRALinear
from halfbyte.ops import QuantState, dequantize_4bit, quantize_4bit

__all__ = [
    "LoRALinear",
    "Linear4bit",
    "LoraConfig",
    "QuantState",
    "dequantize_4bit",
    "optim",
    "quantize_4bit",
]
