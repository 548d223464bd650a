"""Text to token ids and back, and chats as text: the same ids and text as transformers'."""

from halfbyte.tokenizer.detokenizer import Detokenizer
from halfbyte.tokenizer.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Tokenizer"]
