"""What happens when memory is short: the same numbers as if it were not."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_decoder

from halfbyte import lora
from halfbyte.models import Decoder
from halfbyte.offload import ActivationOffload
from halfbyte.optim import AdamW
from halfbyte.pager import free_memory
from halfbyte.pressure import Predictor
