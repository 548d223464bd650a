"""How a server is to be run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeConfig:
    """What a server is called, listens to and allows.

    name: what clients call the base model. api_key: what they must send, if anything.
    adapter_root: the folder that adapters may be loaded from while it runs; None: none may.
    max_waiting: requests that may wait before others are refused. kv_dtype: None or "int8", as
    Engine takes it. max_body: bytes of a request.
    request_timeout, drain_timeout: seconds.
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
