"""A function of tensors that stay where they are, captured as a CUDA graph or a recording."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from halfbyte.recording import Recording, record

T = TypeVar("T")


class Captured(Generic[T]):
    """Calls `work` the first time, captures it the second time and replays it from then on.

    All ways give the same bits; after a capture the results lie in the same tensors every time. Who
    captures has called before, on the same thread: libraries make handles for each thread when it
    first calls them, which would break the capture.
    device: where `work` computes. pool: torch's handle of the memory that captures share which
    never run at the same time (CUDA).
    """

    def __init__(self, work: Callable[[], T], device: torch.device, pool: Any) -> None:
        self.work = work
        self.device = device
        self.pool = pool
        self.thread = threading.local()
        self.captured: tuple[torch.cuda.CUDAGraph | Recording, T] | None = None

    def __call__(self) -> T:
        if self.captured is None and not hasattr(self.thread, "called"):
            self.thread.called = True
            return self.work()
        if self.captured is None and self.device.type != "cuda":
            # Recording it has done the work.
            self.captured = record(self.work)
            return self.captured[1]
        self.captured = self.captured or capture(self.work, self.pool)
        graph, results = self.captured
        graph.replay()
        return results


def capture(work: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """`work` as a CUDA graph, which has not run yet, and where each replay leaves the results."""
    graph = torch.cuda.CUDAGraph()
    # Thread-local: torch may allocate on other threads meanwhile.
    with (
        _no_garbage_collection(),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        return graph, work()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A graph that is collected while another is captured would break the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
