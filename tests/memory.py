"""What this process holds, whatever others on the machine do."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Host memory, pinned memory included."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s*(\d+) kB", status)[1]) << 10


def held_bytes(device: torch.device) -> dict[str, int]:
    """Host memory, and what torch has of a GPU once it gave back what it could."""
    gc.collect()
    if device.type == "cpu":
        return {"host": resident_bytes()}
    torch.cuda.empty_cache()
    return {"host": resident_bytes(), "device": torch.cuda.memory_reserved(device)}
