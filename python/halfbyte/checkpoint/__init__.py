"""Model folder, hub id or GGUF file -> 4-bit model -> folder, tensor by tensor."""

from halfbyte.checkpoint.loading import default_device, load, open_source, read_config
from halfbyte.checkpoint.saving import quantize, save

__all__ = ["default_device", "load", "open_source", "read_config", "quantize", "save"]
