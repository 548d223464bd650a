"""How a server is to be run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from halfbyte.engine import MAX_BATCH
from halfbyte.kv_cache import check_kv_dtype


@dataclass(frozen=True)
class ServeConfig:
    """What a server is called, listens to and allows.

    name: what clients call the base model. api_key: what they must send, if anything.
    adapter_root: the folder that adapters may be loaded from while it runs; None: none may.
    max_waiting: requests that may wait before others are refused. kv_dtype: None or "int8", as
    Engine takes it. max_body: bytes of a request.
    request_timeout, drain_timeout: seconds.

    Raises ValueError for what no server can be: it would come out after minutes of loading, or not
    at all.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    adapter_root: Path | None = None
    max_batch: int = 32
    max_waiting: int = 64
    kv_budget: int | None = None
    kv_dtype: str | None = None
    max_body: int = 2 << 20
    request_timeout: float = 600.0
    drain_timeout: int = 30

    def __post_init__(self) -> None:
        bounds = {
            # Larger ports are cut to 16 bits by the system, which listens elsewhere.
            "port": (0, 65535),
            "max_batch": (1, MAX_BATCH),
            "max_waiting": (1, math.inf),
            "kv_budget": (1, math.inf),
            "request_timeout": (0, math.inf),
            "drain_timeout": (0, math.inf),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        check_kv_dtype(self.kv_dtype)
        if self.api_key == "":
            raise ValueError("api_key: expected a key, got an empty one, which lets everyone in")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise ValueError(f"adapter_root: expected a folder, got {self.adapter_root}")
