"""Optimizer state in pages, on the device or in pinned host memory: where it is, and moving it."""

from __future__ import annotations

import ctypes
import json
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.offload import MIN_TOKENS, ActivationOffload
from halfbyte.pressure import (
    Attempt,
    Gradients,
    Predictor,
    RandomState,
    free_memory,
    join_segments,
    total_memory,
)

BLOCKSIZE = 256
PAGE = 1 << 17
PLACEMENTS = ("auto", "device", "host")
# Share of a device's memory that state leaves free when it comes (back) to the device.
MARGIN = 0.05
# Memory that a batch takes over what is allocated: pieces too small to be used.
SLACK = 1.1
# Steps without pressure before state comes back.
QUIET_STEPS = 20
TRACE_EVENTS = 100_000
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

    @cached_property
    def update_stream(self) -> torch.cuda.ExternalStream:
        """The pager's own stream of updates."""
        return torch.cuda.ExternalStream(self.core.update_stream(), self.device)

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

    def reserve(self, nbytes: int) -> Tensor:
        """Host memory beside the state's, uint8 and pinned for good; HostMemoryError if short."""
        return self._at(self.core.reserve(nbytes), nbytes)

    def _at(self, address: int, nbytes: int) -> Tensor:
        """The host memory at an address, as long as anyone holds it."""
        memory = (ctypes.c_ubyte * nbytes).from_address(address)
        memory.owner = self.core
        return torch.frombuffer(memory, dtype=torch.uint8)

    def promote(self, frames: Iterable[int]) -> int:
        """Move frames to the device while it has room in one piece; returns the bytes that came."""
        moved = 0
        for frame in frames:
            try:
                memory = self._memory(frame)
            except torch.OutOfMemoryError:
                break
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
                memory = self._at(host, nbytes)
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
        values = torch.empty(param.shape, dtype=torch.float32, device="cpu")
        if self.moments == "fp32":
            return {name: torch.empty_like(values) for name in ("exp_avg", "exp_avg_sq")}
        codes = {n: torch.empty_like(values, dtype=torch.uint8) for n in ("state1", "state2")}
        blocks = -(-param.numel() // BLOCKSIZE)
        return codes | {name: values.new_empty(blocks) for name in ("absmax1", "absmax2")}

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
    """Where the optimizer's state is, and what happens when memory is short.

    Made by `optim.AdamW`, which has it as `pager`. placement: "device" keeps the state there;
    "host" keeps it in pinned host memory, where it is updated across the bus; "auto" keeps it on
    the device while it fits and moves it on pressure. host_limit: most bytes of host memory.

    A training loop gets the whole ladder by `micro_step`, or all but the splitting by `attempts`.

    Raises ValueError for another placement, HostMemoryError where host memory is short.
    """

    def __init__(self, placement: str = "auto", host_limit: int | None = None):
        if placement not in PLACEMENTS:
            raise ValueError(f"AdamW: placement: expected one of {PLACEMENTS}, got {placement!r}")
        self.placement = placement
        self.host_limit = host_limit
        self.slabs: list[Slab] = []
        self.predictor = Predictor()
        self.decision = "nothing was decided yet"
        self._evicted: Counter[str] = Counter()
        self._restored: Counter[str] = Counter()
        self._absorbed: Counter[str] = Counter()
        self._offload: ActivationOffload | None = None
        self._offload_from: int | None = None
        self._joined = False
        self._quiet = 0
        self._longest = 0
        self._peak = 0
        self._spans: dict[str, deque[tuple[torch.cuda.Event, torch.cuda.Event]]] = {
            "update_ms": deque(),
            "exposed_ms": deque(),
        }
        self._ms: Counter[str] = Counter()
        self._events: deque[dict[str, Any]] = deque(maxlen=TRACE_EVENTS)

    @property
    def params(self) -> list[Tensor]:
        return [param for slab in self.slabs for param in slab.params]

    @property
    def device(self) -> torch.device:
        """Of the first parameter, and so of the model's forward and backward."""
        return self.slabs[0].device if self.slabs else torch.device("cpu")

    def add(self, params: Sequence[Tensor], moments: str) -> Slab:
        """Make room for the moments of more parameters of one device."""
        limit = self.host_limit
        if limit is not None:
            limit -= self._pinned_bytes()
        slab = Slab(params, moments, self.placement != "device", limit)
        self.slabs.append(slab)
        if self.placement == "auto" and slab.device.type == "cuda":
            self.restore("start")
        return slab

    def evict(self, nbytes: int, cause: str = "asked") -> int:
        """Move state of at least `nbytes` to host memory, as far as there is; returns the bytes.

        Waits until the device memory is free. The state stays where it is with placement "device".
        """
        freed = 0
        with self._span("evict", cause=cause):
            for slab in reversed(self.slabs):
                if freed < nbytes:
                    freed += slab.demote(slab.core.victims(nbytes - freed))
        if freed:
            self._evicted[cause] += freed
            # What follows decides when it comes back, not the batch that had it go.
            self._quiet = self._longest = 0
        self.decision = f"{cause}: {nbytes:,} bytes wanted, {freed:,} of state moved to the host"
        return freed

    def restore(self, cause: str = "asked", keep_free: int = 0) -> int:
        """Move state back to the device, as far as it leaves `keep_free` bytes and a margin."""
        moved = 0
        with self._span("restore", cause=cause):
            for slab in self.slabs:
                margin = int(MARGIN * total_memory(slab.device))
                room = free_memory(slab.device) - margin - keep_free
                moved += slab.promote(slab.core.returners(max(0, room)))
        if moved:
            self._restored[cause] += moved
            self.decision = f"{cause}: {moved:,} bytes of state moved to the device"
        return moved

    def settle(self) -> None:
        """Let torch's current stream wait for every update so far."""
        for slab in self.slabs:
            slab.core.wait_for_all()

    def expect(self, shape: Sequence[int], model: Any = None) -> None:
        """Make room for a micro-batch of ids [B, T] before it runs, by what is known of others."""
        tokens = math.prod(shape)
        self._longest = max(self._longest, tokens)
        predicted = self.predictor.predict(tokens)
        if predicted is None or self.device.type != "cuda":
            return
        missing = int(SLACK * predicted) - free_memory(self.device)
        if missing > 0:
            missing -= self.evict(missing, "predicted")
        if missing > 0 and self._can_offload(shape, model):
            self._offload_from = min(tokens, self._offload_from or tokens)

    def attempts(self, shape: Sequence[int], model: Any = None) -> Iterator[Attempt]:
        """Tries of one micro-batch of ids [B, T]: forward and backward go into `with attempt:`.

            for attempt in optimizer.pager.attempts(ids.shape, model):
                with attempt:
                    loss = model(ids, labels=labels).loss
                    loss.backward()

        Makes room before; after torch.OutOfMemoryError puts gradients and generators back, makes
        more room and yields another try, with the same numbers as if nothing had happened. model:
        a Decoder whose checkpointed activations may go to host memory (given gradient
        checkpointing). Raises torch.OutOfMemoryError saying what was tried when nothing is left.
        """
        self.expect(shape, model)
        tokens = math.prod(shape)
        tried: list[str] = []
        gradients, random = Gradients(self.params), RandomState.of(self.device)
        offloaded = self._offload_from is not None and tokens >= self._offload_from
        while True:
            before = self._begin()
            self._set_offload(model, shape, offloaded)
            attempt = Attempt(gradients)
            with self._span("micro step", tokens=tokens):
                yield attempt
            self._set_offload(model, shape, False)
            if attempt.done:
                if not offloaded:
                    self._learn(tokens, before)
                return
            random.restore()
            rung = self._climb(gradients, shape, model, offloaded, tried)
            if rung is None:
                gradients.restore()
                raise torch.OutOfMemoryError(self._ledger(shape, tried, attempt.failure))
            offloaded = offloaded or rung == "activations"
            tried.append(rung)

    def micro_step(self, work: Callable[..., Tensor], *batch: Tensor, model: Any = None) -> Tensor:
        """Run work(*batch), a forward and backward that returns its loss, whatever memory does.

        As `attempts`; and when nothing else helps, the batch is split along its first dimension and
        the losses are added up, so that `work` must divide by a number that does not depend on the
        part it is given (the tokens of the whole step). Raises torch.OutOfMemoryError for a batch
        of one row that does not fit.
        """
        try:
            for attempt in self.attempts(batch[0].shape, model):
                with attempt:
                    loss = work(*batch)
            return loss
        except torch.OutOfMemoryError:
            if batch[0].shape[0] < 2:
                raise
        self._absorbed["split"] += 1
        self.decision = f"split: {list(batch[0].shape)} in two"
        half = (batch[0].shape[0] + 1) // 2
        first = self.micro_step(work, *(part[:half] for part in batch), model=model)
        return first + self.micro_step(work, *(part[half:] for part in batch), model=model)

    def _begin(self) -> int:
        """Bytes allocated before a micro-batch, whose peak is measured from here."""
        if self.device.type != "cuda":
            return 0
        self._peak = self.peak_bytes()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def _learn(self, tokens: int, before: int) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) - before
            self.predictor.learn(tokens, peak)

    def _climb(
        self,
        gradients: Gradients,
        shape: Sequence[int],
        model: Any,
        offloaded: bool,
        tried: list[str],
    ) -> str | None:
        """Make room after a try that failed; what was done, None if nothing was left to do."""
        rung = None
        if self.evict(1 << 62, "out of memory") + gradients.to_host() > 0:
            rung = "state"
        elif self.device.type == "cuda" and not self._joined:
            # There may be enough in pieces: a long batch asks for what short ones have split.
            rung, self._joined = "segments", True
            join_segments()
        elif not offloaded and self._can_offload(shape, model):
            rung = "activations"
            tokens = math.prod(shape)
            self._offload_from = min(tokens, self._offload_from or tokens)
            self.decision = f"activations: offloaded from {self._offload_from} tokens on"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if rung is not None:
            self._absorbed[rung] += 1
        return rung

    def _can_offload(self, shape: Sequence[int], model: Any) -> bool:
        return bool(
            model is not None
            and getattr(model, "gradient_checkpointing", False)
            and math.prod(shape) >= MIN_TOKENS
            and self.placement != "device"
        )

    def _set_offload(self, model: Any, shape: Sequence[int], on: bool) -> None:
        if model is None or not hasattr(model, "gradient_checkpointing"):
            return
        if not (on and self._can_offload(shape, model)):
            model.model.offload = None
            return
        if self._offload is None:
            self._offload = ActivationOffload(self.device, self.slabs[-1].reserve)
        model.model.offload = self._offload

    def _ledger(self, shape: Sequence[int], tried: list[str], failure: str | None) -> str:
        stats = self.stats()
        grads = sum(p.grad.nbytes for p in self.params if p.grad is not None)
        held = ""
        if self.device.type == "cuda":
            used, cap = torch.cuda.memory_allocated(self.device), total_memory(self.device)
            held = f" of {used:,} bytes allocated where {cap:,} may be"
        return (
            f"a micro-batch of {list(shape)} tokens does not fit in memory ({failure}). "
            f"Tried: {', '.join(tried) or 'nothing was left to move'}. Held{held}: optimizer state "
            f"{stats['device_bytes']:,} on the device and {stats['host_bytes']:,} on the host, "
            f"gradients {grads:,}, parameters {sum(p.nbytes for p in self.params):,}"
        )

    def stepped(self) -> None:
        """After an optimizer step: bring state back once memory has long been easy."""
        for name, spans in self._spans.items():
            while spans and spans[0][1].query():
                begin, end = spans.popleft()
                self._ms[name] += begin.elapsed_time(end)
        self._quiet += 1
        if self.placement != "auto" or self._quiet < QUIET_STEPS or self.device.type != "cuda":
            return
        # The longest batch of late has to fit beside what comes back.
        keep_free = self.predictor.predict(self._longest) or 0
        self.restore("quiet", keep_free)
        self._quiet = self._longest = 0

    @contextmanager
    def timed(self, slab: Slab, *names: str, there: bool = False) -> Iterator[None]:
        """Count the time from here on torch's stream to the end, there or on the stream of updates,
        as "update_ms" (all of it), "exposed_ms" (what torch's stream waits) or both.
        """
        if slab.device.type != "cuda":
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        current = torch.cuda.current_stream(slab.device)
        begin.record(current)
        yield
        end.record(slab.update_stream if there else current)
        for name in names:
            self._spans[name].append((begin, end))

    def peak_bytes(self) -> int:
        """Most bytes that torch had allocated at once: micro-batches reset torch's own count."""
        if self.device.type != "cuda":
            return 0
        return max(self._peak, torch.cuda.max_memory_allocated(self.device))

    def stats(self) -> dict[str, Any]:
        """Bytes of state by place, moved by cause and across the bus by updates in place; ms that
        torch's stream spent on updates; OOMs absorbed by rung; quality of the predictions.
        """
        moved = [slab.core.moved() for slab in self.slabs]
        total = sum(slab.nbytes for slab in self.slabs)
        on_device = sum(slab.bytes_on_device for slab in self.slabs)
        return {
            "state_bytes": total,
            "device_bytes": on_device,
            "host_bytes": total - on_device,
            "pinned_bytes": self._pinned_bytes(),
            "pinned_near": bool(self.slabs) and all(slab.core.is_near() for slab in self.slabs),
            "evicted_bytes": dict(self._evicted),
            "restored_bytes": dict(self._restored),
            "zero_copy_bytes": sum(of[2] for of in moved),
            "offloaded_bytes": self._offload.moved_bytes if self._offload else 0,
            "updates": max((of[3] for of in moved), default=0),
            "update_ms": round(self._ms["update_ms"], 3),
            "exposed_ms": round(self._ms["exposed_ms"], 3),
            "absorbed": dict(self._absorbed),
            "prediction_error": {
                "p50": self.predictor.quantile(0.5),
                "p99": self.predictor.quantile(0.99),
            },
        }

    def _pinned_bytes(self) -> int:
        """Host memory that was reserved: for the state, and for activations."""
        if self.placement == "device":
            return 0
        activations = self._offload.reserved_bytes if self._offload else 0
        return sum(slab.nbytes for slab in self.slabs) + activations

    def explain(self) -> str:
        """Why state is where it is, in words."""
        stats = self.stats()
        return (
            f"{stats['device_bytes']:,} bytes of optimizer state on the device, "
            f"{stats['host_bytes']:,} in host memory (placement {self.placement}). "
            f"Last decision: {self.decision}"
        )

    @contextmanager
    def _span(self, name: str, **args: Any) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            span = {"name": name, "ph": "X", "pid": 0, "tid": 0, "args": args}
            now = time.perf_counter()
            self._events.append(span | {"ts": begin * 1e6, "dur": (now - begin) * 1e6})

    def write_trace(self, path: str | Path) -> None:
        """Write the host's view of moves and micro-steps for chrome://tracing, as JSON."""
        Path(path).write_text(json.dumps({"traceEvents": list(self._events)}))
