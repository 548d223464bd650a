"""Checkpointed activations in pinned host memory between forward and backward."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfbyte import _core

# Below this many tokens a copy costs more time than the memory is worth.
MIN_TOKENS = 512


class Kept:
    """One activation that a layer reads twice: in the forward and when it is recomputed.

    Calling it gives the activation itself until `leave`, a copy brought back afterwards.
    """

    def __init__(self, x: Tensor, pool: ActivationOffload, before: Kept | None):
        self.x: Tensor | None = x
        self.pool, self.before = pool, before
        self.device, self.requires_grad = x.device, x.requires_grad
        self.host: Tensor | None = None
        self.copied: torch.cuda.Event | None = None

    def leave(self) -> None:
        """Copy the activation out and let go of its memory; without room on the host it stays."""
        if self.x is None:
            return
        x = self.x.detach()
        self.host = self.pool.take(x)
        if self.host is None:
            return
        with self.pool.copying(out=True) as event:
            self.host.copy_(x, non_blocking=True)
        if x.is_cuda:
            x.record_stream(self.pool.streams[0])
        self.copied, self.x = event, None

    def fetch(self) -> None:
        """Queue the copy back to the device."""
        if self.x is not None or self.host is None:
            return
        x = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        with self.pool.copying(out=False, after=self.copied) as event:
            x.copy_(self.host, non_blocking=True)
        if x.is_cuda:
            x.record_stream(self.pool.streams[1])
        self.pool.put(self.host, event)
        self.copied, self.host = event, None
        self.x = x.requires_grad_(self.requires_grad)

    def __call__(self) -> Tensor:
        returned = self.host is not None or self.copied is not None
        self.fetch()
        if returned and self.before is not None:
            # The layer before is recomputed next: its activation travels meanwhile.
            self.before.fetch()
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        assert self.x is not None
        x = self.x
        if returned:
            # Read for the last time: the graph must not hold it until the backward has ended.
            self.x = self.copied = None
        return x


class ActivationOffload:
    """Copies activations of one device out and back on streams of its own.

    Host buffers are pinned once and used again by later forward passes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moved_bytes = 0
        self.free: dict[tuple, list[tuple[Tensor, torch.cuda.Event | None]]] = defaultdict(list)
        self.streams: tuple[torch.cuda.Stream, ...] = ()
        if device.type == "cuda":
            self.streams = (torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1))

    def run(self, layers: Sequence[Callable], x: Tensor, *rest: object) -> Tensor:
        """Apply checkpointed layer(x, *rest), one after the other; every input but the last
        layer's goes to the host meanwhile. `rest` holds a tensor of the device.
        """
        before: Kept | None = None
        for index, layer in enumerate(layers):
            kept = Kept(x, self, before)
            x = checkpoint(_apply, layer, kept, *rest, use_reentrant=False)
            if index + 1 < len(layers):
                kept.leave()
            before = kept
        return x

    def take(self, x: Tensor) -> Tensor | None:
        """A host buffer of x's shape, None where host memory is short."""
        free = self.free[(x.shape, x.dtype)]
        self.moved_bytes += x.nbytes
        if free:
            host, event = free.pop()
            if event is not None:
                self.streams[0].wait_event(event)
            return host
        budget = _core.Pager.host_budget()
        if budget is not None and x.nbytes > budget:
            return None
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)

    def put(self, host: Tensor, event: torch.cuda.Event | None) -> None:
        """Take a buffer back; it may be written again after `event`."""
        self.free[(host.shape, host.dtype)].append((host, event))

    def copying(self, out: bool, after: torch.cuda.Event | None = None) -> _Copying:
        return _Copying(self, out, after)


def _apply(layer: Callable, kept: Kept, *rest: object) -> Tensor:
    return layer(kept(), *rest)


class _Copying:
    """A copy on its stream, after the current stream; gives an event that is done with it."""

    def __init__(self, pool: ActivationOffload, out: bool, after: torch.cuda.Event | None):
        self.stream = pool.streams[0 if out else 1] if pool.streams else None
        self.after = after

    def __enter__(self) -> torch.cuda.Event | None:
        if self.stream is None:
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        if self.after is not None:
            self.stream.wait_event(self.after)
        self.event = torch.cuda.Event()
        self.context = torch.cuda.stream(self.stream)
        self.context.__enter__()
        return self.event

    def __exit__(self, *raised: object) -> None:
        if self.stream is not None:
            self.event.record(self.stream)
            self.context.__exit__(*raised)
