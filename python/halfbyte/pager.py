"""Optimizer state in pages, on the device or in pinned host memory: where it is, and moving it."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte import _core

BLOCKSIZE = 256
PAGE = 1 << 17
PLACEMENTS = ("auto", "device", "host")
# Share of a device's memory that state leaves free when it comes (back) to the device.
MARGIN = 0.05
# The code of zero in the signed map; the unsigned map's is 0.
ZERO_CODE = 127


class Slab:
    """The moments of some parameters of one device, in one format, end to end in pages.

    moments: "fp32" or "8bit". reserve: hold pinned host memory for all of it, at most `limit`
    bytes; without it the state stays on the device.
    """

    def __init__(self, params: Sequence[Tensor], moments: str, reserve: bool, limit: int | None):
        self.params = list(params)
        self.moments = moments
        self.device = params[0].device
        numels = [param.numel() for param in params]
        table = None
        if self.device.type == "cuda":
            nbytes = _core.Pager.table_bytes(numels, moments)
            table = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        self.core = _core.Pager(numels, moments, reserve, limit, table)
        self.starts = self.core.starts()
        self.offsets, self.page_bytes = self.core.page_layout()
        if not reserve:
            for frame in range(len(self.core.frames())):
                self.core.lend(frame, self._memory(frame))
        self._clear()

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, _, nbytes, _, _ in self.core.frames())

    @property
    def bytes_on_device(self) -> int:
        return sum(nbytes for _, _, nbytes, _, here in self.core.frames() if here)

    def _memory(self, frame: int) -> Tensor:
        """Device memory for a frame, from torch's allocator."""
        nbytes = self.core.frames()[frame][2]
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def promote(self, frames: Iterable[int]) -> int:
        """Move frames to the device; returns the bytes that came."""
        moved = 0
        for frame in frames:
            memory = self._memory(frame)
            self.core.promote(frame, memory)
            moved += memory.numel()
        return moved

    def demote(self, frames: Iterable[int]) -> int:
        """Move frames to host memory, wait, give their device memory back; returns its bytes."""
        nbytes = [frame[2] for frame in self.core.frames()]
        for frame in frames:
            self.core.demote(frame)
        return sum(nbytes[frame] for frame in self.core.take_back(True))

    def _pages(self) -> Iterator[tuple[int, Tensor]]:
        """(first page, uint8 [pages, page_bytes]) of every frame, where it is."""
        for frame, (first, pages, nbytes, host, _) in enumerate(self.core.frames()):
            memory = self.core.memory(frame)
            if memory is None:
                slot = (ctypes.c_ubyte * nbytes).from_address(host)
                memory = torch.frombuffer(slot, dtype=torch.uint8)
            yield first, memory.view(pages, self.page_bytes)

    def _parts(self, pages: Tensor) -> dict[str, Tensor]:
        """The arrays of pages by their names in a state dict, each [pages, ...]."""
        m, v, absmax_m, absmax_v = self.offsets
        if self.moments == "fp32":
            return {
                "exp_avg": pages[:, m:v].view(torch.float32),
                "exp_avg_sq": pages[:, v:].view(torch.float32),
            }
        return {
            "state1": pages[:, m:v],
            "state2": pages[:, v:absmax_m],
            "absmax1": pages[:, absmax_m:absmax_v].view(torch.float32),
            "absmax2": pages[:, absmax_v:].view(torch.float32),
        }

    def _clear(self) -> None:
        for _, pages in self._pages():
            pages.zero_()
            if self.moments == "8bit":
                self._parts(pages)["state1"].fill_(ZERO_CODE)
        self.core.rewritten()

    def read(self) -> list[dict[str, Tensor]]:
        """The moments of every parameter, on the CPU: fp32 exp_avg, exp_avg_sq of its shape, or
        uint8 state1, state2 of its shape and fp32 absmax1, absmax2 [ceil(n / 256)].
        """
        self.core.settle()
        found = [self._empty(param) for param in self.params]
        for first, pages in self._pages():
            for name, part in self._parts(pages.cpu()).items():
                flat = part.reshape(-1)
                for param, into, out_of in self._spans(first, pages.shape[0], name):
                    found[param][name].view(-1)[into] = flat[out_of]
        return found

    def write(self, values: dict[int, dict[str, Tensor]]) -> None:
        """Overwrite the moments of parameters by their number, from what `read` returns of them."""
        self.core.settle()
        for first, pages in self._pages():
            # A view may straddle pages, so that whole frames are changed on the CPU.
            copy = pages.cpu() if pages.is_cuda else pages
            for name, part in self._parts(copy).items():
                flat = part.clone(memory_format=torch.contiguous_format).view(-1)
                for param, out_of, into in self._spans(first, pages.shape[0], name):
                    if param in values:
                        flat[into] = values[param][name].reshape(-1)[out_of].to("cpu", flat.dtype)
                part.copy_(flat.view_as(part))
            if pages.is_cuda:
                pages.copy_(copy)
        self.core.rewritten()

    def _empty(self, param: Tensor) -> dict[str, Tensor]:
        if self.moments == "fp32":
            return {name: torch.empty(param.shape) for name in ("exp_avg", "exp_avg_sq")}
        blocks = -(-param.numel() // BLOCKSIZE)
        codes = {name: torch.empty(param.shape, dtype=torch.uint8) for name in ("state1", "state2")}
        return codes | {name: torch.empty(blocks) for name in ("absmax1", "absmax2")}

    def _spans(self, first: int, pages: int, name: str) -> Iterator[tuple[int, slice, slice]]:
        """(parameter, slice of its array, slice of the pages' array) for what these pages hold."""
        size = 1 if name.startswith("absmax") else BLOCKSIZE
        begin = first * (PAGE // BLOCKSIZE)
        end = begin + pages * (PAGE // BLOCKSIZE)
        for index, param in enumerate(self.params):
            low, high = max(self.starts[index], begin), min(self.starts[index + 1], end)
            if low >= high:
                continue
            start = (low - self.starts[index]) * size
            stop = (high - self.starts[index]) * size
            if size == BLOCKSIZE:
                stop = min(stop, param.numel())
            offset = (low - begin) * size
            yield index, slice(start, stop), slice(offset, offset + stop - start)


class Pager:
    """Where the optimizer's state is. Made by `optim.AdamW`, which has it as `pager`.

    placement: "device" keeps the state there; "host" keeps it in pinned host memory, where it is
    updated across the bus; "auto" keeps it on the device while it fits and moves it on pressure.
    host_limit: most bytes of host memory to reserve.

    Raises ValueError for another placement, HostMemoryError where host memory is short.
    """

    def __init__(self, placement: str = "auto", host_limit: int | None = None):
        if placement not in PLACEMENTS:
            raise ValueError(f"AdamW: placement: expected one of {PLACEMENTS}, got {placement!r}")
        self.placement = placement
        self.host_limit = host_limit
        self.slabs: list[Slab] = []
        self.evicted: Counter[str] = Counter()
        self.restored: Counter[str] = Counter()
        self.decision = "nothing was decided yet"

    def add(self, params: Sequence[Tensor], moments: str) -> Slab:
        """Make room for the moments of more parameters of one device."""
        limit = self.host_limit
        if limit is not None:
            limit -= sum(slab.nbytes for slab in self.slabs)
        slab = Slab(params, moments, self.placement != "device", limit)
        self.slabs.append(slab)
        if self.placement == "auto" and slab.device.type == "cuda":
            self.restore("start")
        return slab

    def evict(self, nbytes: int, cause: str = "asked") -> int:
        """Move state of at least `nbytes` to host memory, as far as there is; returns the bytes."""
        freed = 0
        for slab in reversed(self.slabs):
            if freed < nbytes:
                freed += slab.demote(slab.core.victims(nbytes - freed))
        if freed:
            self.evicted[cause] += freed
        self.decision = f"{cause}: {nbytes:,} bytes wanted, {freed:,} of state moved to the host"
        return freed

    def restore(self, cause: str = "asked", keep_free: int | None = None) -> int:
        """Move state back to the device, as much as leaves `keep_free` bytes; returns the bytes."""
        moved = 0
        for slab in self.slabs:
            room = free_memory(slab.device)
            margin = int(MARGIN * total_memory(slab.device)) if keep_free is None else keep_free
            frames = slab.core.returners(max(0, room - margin))
            moved += slab.promote(frames)
        if moved:
            self.restored[cause] += moved
        self.decision = f"{cause}: {moved:,} bytes of state moved to the device"
        return moved

    def settle(self) -> None:
        """Let torch's current stream wait for every update so far."""
        for slab in self.slabs:
            slab.core.wait_for_all()

    def stats(self) -> dict[str, Any]:
        """Bytes of state by place; bytes moved, by cause and by updates in place; steps."""
        moved = [slab.core.moved() for slab in self.slabs]
        total = sum(slab.nbytes for slab in self.slabs)
        on_device = sum(slab.bytes_on_device for slab in self.slabs)
        return {
            "state_bytes": total,
            "device_bytes": on_device,
            "host_bytes": total - on_device,
            "pinned_bytes": total if self.placement != "device" else 0,
            "evicted_bytes": dict(self.evicted),
            "restored_bytes": dict(self.restored),
            "zero_copy_bytes": sum(of[2] for of in moved),
            "updates": max((of[3] for of in moved), default=0),
        }

    def explain(self) -> str:
        """Why state is where it is, in words."""
        stats = self.stats()
        return (
            f"{stats['device_bytes']:,} bytes of optimizer state on the device, "
            f"{stats['host_bytes']:,} in host memory (placement {self.placement}). "
            f"Last decision: {self.decision}"
        )


def total_memory(device: torch.device) -> int:
    """Bytes of the device that this process may use, its memory fraction counted; CPU: 2**63."""
    if device.type != "cuda":
        return 1 << 63
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(torch.cuda.get_device_properties(device).total_memory * fraction)


def free_memory(device: torch.device) -> int:
    """Bytes that torch can still hand out: free on the device, under the fraction, or cached."""
    if device.type != "cuda":
        return 1 << 62
    used = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - used
    return min(torch.cuda.mem_get_info(device)[0] + cached, total_memory(device) - used)
