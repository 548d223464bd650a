"""Work on CPU tensors recorded once and replayed without Python, as a CUDA graph replays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halfbyte import _core
from halfbyte.ops.library import KERNELS

Result = TypeVar("Result")

aten = torch.ops.aten
# What they return holds nothing yet.
EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class Recording:
    """A function's work, run once by `record` and again by every `replay`.

    Each replay reads and writes the tensors of the first run: what varies is written into them
    before, and the results are found where the first run left them. Everything else that Python
    decided, shapes and numbers on the host included, stays as it was.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], Any]] = []

    def replay(self) -> None:
        """Do the recorded work again, under the same grad mode as the first time."""
        for step in self._steps:
            step()


def record(work: Callable[[], Result]) -> tuple[Recording, Result]:
    """Run `work`, which computes on CPU tensors without gradients, and record what it does.

    Raises RuntimeError naming the operation when a value is read on the host, which later
    replays could not do.
    """
    recording = Recording()
    recorder = _Recorder(recording._steps)
    _core.record(True)
    try:
        with recorder:
            result = work()
    finally:
        recorder.take(_core.record(False))
    return recording, result


class _Recorder(TorchDispatchMode):
    """Sees torch's operations; those of halfbyte's kernels are recorded where they are called."""

    def __init__(self, steps: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.steps = steps

    def take(self, calls: _core.Recording) -> None:
        if len(calls):
            self.steps.append(calls.replay)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        call = partial(op, *args, **(kwargs or {}))
        if op in KERNELS:
            with self:
                return KERNELS[op](*args, **(kwargs or {}))
        result = call()
        if op in EMPTY:
            return result
        results = tree_leaves(result)
        if not all(isinstance(x, Tensor) for x in results):
            raise RuntimeError(f"record: {op}: expected tensors only, got {type(result).__name__}")
        step = call if op._schema.is_mutable else _again(call, args, kwargs, results)
        if step is not None:
            self.take(_core.record(True))
            self.steps.append(step)
        return result


def _again(
    call: partial, args: tuple, kwargs: dict | None, results: list[Tensor]
) -> Callable[[], Any] | None:
    """The call again, its results written over the first ones; None where they are views."""
    given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    if all(_memory(x) in given for x in results):
        return None
    into = _into(call.func)
    if into is not None:
        return partial(into, *args, **(kwargs or {}), out=results[0])

    def again() -> None:
        for first, new in zip(results, tree_leaves(call()), strict=True):
            first.copy_(new)

    return again


def _into(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """The overload of the same arguments that writes its one result into `out`."""
    packet = op.overloadpacket
    if "out" not in packet.overloads():
        return None
    own, others = (
        [(argument.name, str(argument.type)) for argument in overload._schema.arguments]
        for overload in (op, packet.out)
    )
    return packet.out if [*own, ("out", "Tensor")] == others else None


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
