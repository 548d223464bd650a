"""Fine-tuning: one config in, one adapter out, resumable to the bit."""

from halfbyte.train.config import TrainConfig
from halfbyte.train.loop import TrainResult, finetune
from halfbyte.train.micro_steps import MicroSteps

__all__ = ["MicroSteps", "TrainConfig", "TrainResult", "finetune"]
