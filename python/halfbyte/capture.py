"""A function of tensors that stay where they are, captured as a CUDA graph or a recording."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch

from halfbyte.recording import Recording, record

T = TypeVar("T")
# All captures of a device share a stream.
_CAPTURING = threading.Lock()


class Captured(Generic[T]):
    """Calls `work` the first time, captures it the second time and replays it from then on.

    All ways give the same bits; after a capture the results lie in the same tensors every time. Who
    captures has called before, on the same thread: libraries make handles for each thread when it
    first calls them, which would break the capture.
    device: where `work` computes. pool: the memory of CUDA graphs.
    """

    def __init__(self, work: Callable[[], T], device: torch.device, pool: Pool) -> None:
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
        self.captured = self.captured or self.pool.capture(self.work)
        graph, results = self.captured
        graph.replay()
        return results


class Pool:
    """Memory of a device that CUDA graphs share which never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._handle: Any = None

    def capture(self, work: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """`work` as a graph, which has not run yet, and where each replay leaves the results."""
        if not self._graphs:
            # Torch gives memory up with the last graph of its handle, which then takes no other.
            self._handle = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.device(self.device), _no_garbage_collection():
            results = self._capture(graph, work)
        self._graphs.add(graph)
        return graph, results

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Callable[[], T]) -> T:
        before = torch.cuda.current_stream()
        try:
            # Thread-local: torch may allocate on other threads meanwhile.
            with torch.cuda.graph(
                graph, self._handle, _stream(self.device), capture_error_mode="thread_local"
            ):
                return work()
        except BaseException:
            # Where a capture cannot even be ended torch stays on its stream and in its pool.
            torch.cuda.set_stream(before)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(before.device_index, self._handle)
            raise


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where work of a device is captured; torch's own is that of the first device alone."""
    return torch.cuda.Stream(device)


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
