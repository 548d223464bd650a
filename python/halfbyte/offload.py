"""Checkpointed activations in pinned host memory between forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from halfbyte import _core

# Below this many tokens a copy costs more time than the memory is worth.
MIN_TOKENS = 512
# Host memory is reserved in blocks of this many bytes; an activation may straddle them.
BLOCK_BYTES = 32 << 20
ALIGNMENT = 256


class Kept:
    """One activation that a layer reads twice: in the forward and when it is recomputed.

    `leave` sends it to the host after the first time; `unpack` gives it, or a copy brought back.
    """

    def __init__(self, x: Tensor, pool: ActivationOffload, before: Kept | None):
        self.x: Tensor | None = x
        self.pool, self.before = pool, before
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.host: list[Tensor] | None = None
        self.copied: torch.cuda.Event | None = None

    def leave(self) -> None:
        """Copy the activation out and let go of its memory; without room on the host it stays."""
        if self.x is None:
            return
        x = self.x.detach().contiguous()
        self.host = self.pool.take(x.nbytes)
        if self.host is None:
            return
        with self.pool.copying(out=True) as event:
            for host, part in zip(self.host, _bytes(x, self.host), strict=True):
                host.copy_(part, non_blocking=True)
        if x.is_cuda:
            x.record_stream(self.pool.streams[0])
        self.copied, self.x = event, None

    def fetch(self) -> None:
        """Queue the copy back to the device."""
        if self.x is not None or self.host is None:
            return
        x = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        with self.pool.copying(out=False, after=self.copied) as event:
            for host, part in zip(self.host, _bytes(x, self.host), strict=True):
                part.copy_(host, non_blocking=True)
        if x.is_cuda:
            x.record_stream(self.pool.streams[1])
        self.x, self.copied, self.host = x, event, None

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        """What autograd shall keep of a tensor: this, if the tensor is the activation."""
        x = self.x
        if x is not None and tensor.data_ptr() == x.data_ptr():
            return self
        # The tensor itself, kept by the node that made it, would never be freed.
        return tensor.detach()

    def unpack(self) -> Tensor:
        """The activation, for the last time; the one before it is on its way from here on."""
        self.fetch()
        if self.before is not None:
            # The layer before is recomputed next: its activation travels meanwhile.
            self.before.fetch()
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        x, self.x, self.copied = self.x, None, None
        assert x is not None
        return x


def _bytes(x: Tensor, pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The bytes of x in parts as long as some pieces."""
    return x.view(-1).view(torch.uint8).split([piece.numel() for piece in pieces])


class ActivationOffload:
    """Copies activations of one device out and back on streams of its own.

    reserve: makes so many bytes of host memory, uint8, pinned where there is a GPU; it raises
    HostMemoryError. What it made is a stack that the next forward pass uses anew, so that it
    grows to the longest batch and no further.
    """

    def __init__(self, device: torch.device, reserve: Callable[[int], Tensor]):
        self.device, self.reserve = device, reserve
        self.moved_bytes = 0
        self.blocks: list[Tensor] = []
        self.top = 0
        self.kept: WeakSet[Kept] = WeakSet()
        self.streams: tuple[torch.cuda.Stream, ...] = ()
        if device.type == "cuda":
            self.streams = (torch.cuda.Stream(device), torch.cuda.Stream(device, priority=-1))

    @property
    def reserved_bytes(self) -> int:
        return sum(block.numel() for block in self.blocks)

    def run(self, layers: Sequence[Callable], x: Tensor, *rest: object) -> Tensor:
        """Apply layer(x, *rest), one after the other, each of which keeps x for its backward; every
        x but the last goes to the host meanwhile.
        """
        self._begin()
        before: Kept | None = None
        for index, layer in enumerate(layers):
            kept = Kept(x, self, before)
            self.kept.add(kept)
            with saved_tensors_hooks(kept.pack, _unpacked):
                x = layer(x, *rest)
            if index + 1 < len(layers):
                kept.leave()
            before = kept
        return x

    def _begin(self) -> None:
        """Use the stack anew unless a backward is still to come that reads it."""
        if any(kept.host is not None for kept in self.kept):
            return
        self.top = 0
        if self.streams:
            out, back = self.streams
            out.wait_stream(back)

    def take(self, nbytes: int) -> list[Tensor] | None:
        """Pieces of host memory of so many bytes in all, None where it is short."""
        end = self.top + -(-nbytes // ALIGNMENT) * ALIGNMENT
        while end > len(self.blocks) * BLOCK_BYTES:
            try:
                self.blocks.append(self.reserve(BLOCK_BYTES))
            except _core.HostMemoryError:
                return None
        pieces, left = [], nbytes
        while left > 0:
            block, offset = divmod(self.top + nbytes - left, BLOCK_BYTES)
            pieces.append(self.blocks[block][offset : offset + left])
            left -= pieces[-1].numel()
        self.top = end
        self.moved_bytes += nbytes
        return pieces

    def copying(self, out: bool, after: torch.cuda.Event | None = None) -> _Copying:
        return _Copying(self, out, after)


def _unpacked(kept: Tensor | Kept) -> Tensor:
    return kept.unpack() if isinstance(kept, Kept) else kept


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
