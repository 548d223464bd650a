"""The processes of a data-parallel run, one a device, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from halfbyte.checkpoint.loading import checked_device

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's place: rank 0 alone writes files and talks."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over all ranks, in place, in one exchange."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def copy_from_main_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on rank 0, or the error that it raises there, on every rank."""
        answer: Any = None
        if self.main:
            try:
                answer = work()
            except Exception as error:
                answer = error
        answer = self.gather(answer)[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def check_equal(self, what: str, value: Any) -> None:
        """Raise ValueError on every rank unless all ranks hold the same value."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(f"{what} differs: rank 0 has {values[0]}, rank {rank} has {other}")


@contextmanager
def join_world(device: str | torch.device | None) -> Iterator[World]:
    """Join the processes named by torchrun's environment; without it, a world of one.

    Uses NCCL on CUDA devices and gloo on CPUs. A process group that exists already is used and
    left alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    here = _device(device)
    if size == 1 and not dist.is_initialized():
        yield World(0, 1, here)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), here)
    finally:
        if ours:
            dist.destroy_process_group()


def _device(device: str | torch.device | None) -> torch.device:
    """The device asked for, with the index of this process on its host."""
    found = checked_device(device)
    if found.type != "cuda":
        return found
    if found.index is None:
        found = checked_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    torch.cuda.set_device(found)
    return found
