"""halfbyte: half a byte per weight, trained and served from one wheel."""

from halfbyte import optim
from halfbyte._core import __version__
from halfbyte.chat import chat
from halfbyte.checkpoint import load, save
from halfbyte.engine import Completion, Engine
from halfbyte.generate import generate, stream
from halfbyte.linear import Linear4bit
from halfbyte.lora import LoraConfig, LoRALinear, load_adapter, merge, save_adapter
from halfbyte.models import Decoder
from halfbyte.ops import QuantState, dequantize_4bit, quantize_4bit
from halfbyte.sampling import Sampling
from halfbyte.train import MicroSteps, TrainConfig, TrainResult, finetune

# Attached here, so that the model need not know how it is sampled from.
Decoder.generate = generate

__all__ = [
    "Completion",
    "Decoder",
    "Engine",
    "LoRALinear",
    "Linear4bit",
    "LoraConfig",
    "MicroSteps",
    "QuantState",
    "Sampling",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "chat",
    "dequantize_4bit",
    "finetune",
    "generate",
    "load",
    "load_adapter",
    "merge",
    "optim",
    "quantize_4bit",
    "save",
    "save_adapter",
    "stream",
]
