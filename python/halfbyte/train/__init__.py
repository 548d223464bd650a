"""Fine-tuning: one config in, one adapter out, resumable to the bit."""

from halfbyte.train.config import TrainConfig
from halfbyte.train.loop import TrainResult, finetune

__all__ = ["TrainConfig", "TrainResult", "finetune"]
