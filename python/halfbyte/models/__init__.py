"""The decoder of the Llama, Mistral, Qwen2 and Qwen3 families, written once."""

from halfbyte.models.config import DecoderConfig
from halfbyte.models.decoder import Decoder, Output

__all__ = ["Decoder", "DecoderConfig", "Output"]
