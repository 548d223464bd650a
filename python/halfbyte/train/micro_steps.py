"""Forward and backward of micro-batches, as CUDA graphs where their shapes come again."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.capture import Pool
from halfbyte.linear import Linear4bit
from halfbyte.models import Decoder
from halfbyte.models.decoder import IGNORE
from halfbyte.optim import AdamW, waits_for_update
from halfbyte.pager import SLACK
from halfbyte.pressure import free_memory

# Graphs that are kept, of the shapes that come most: each holds some megabytes of the device.
MOST_GRAPHS = 48
# Tokens times weights of a layer: past this an H200 computes longer than Python takes to queue it.
MOST_WORK = 1 << 40


class _Graph(NamedTuple):
    """A captured micro-batch: what it reads, and the loss that it leaves."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    labels: Tensor
    num_items: Tensor
    loss: Tensor


class MicroSteps:
    """Adds the gradients of micro-batches to the parameters' own.

    A small micro-batch is over before Python has queued its thousands of launches. So on a GPU it
    is padded to one of few lengths, and a shape that comes again is captured, forward and backward,
    and replayed from then on: the same kernels in one launch. What may differ each time runs as
    ever, by `Pager.micro_step`: dropout, autocast, trained embeddings, a head that is adapted or
    quantized, and what hooks watch. So do all micro-batches while state of the optimizer lies in
    host memory, whose update runs beside the forward, and while the device has no room for two of
    the largest.

    optimizer: of the model's trained parameters, whose `grad` it may set to None between steps.
    Whoever gives the model other modules or parameters makes other MicroSteps for it.
    """

    def __init__(self, model: Decoder, optimizer: AdamW) -> None:
        self.model, self.optimizer = model, optimizer
        self.graphs: dict[tuple[int, ...], _Graph] = {}
        self._watch = _Watch(model)
        linear = [
            m for m in model.model.layers[0].modules() if isinstance(m, Linear4bit | nn.Linear)
        ]
        weights = sum(m.in_features * m.out_features for m in linear)
        self._most_tokens = MOST_WORK // max(1, weights)
        self._longest = 0
        # How often shapes came, and those whose capture ran out of memory.
        self._uses: Counter[tuple[int, ...]] = Counter()
        self._refused: set[tuple[int, ...]] = set()
        # Where graphs leave the gradients of parameters that get any; None until one is captured.
        self._gradients: dict[Tensor, Tensor | None] = {}
        self._pool = Pool(optimizer.pager.device)
        # Bytes of the device that graphs keep for themselves.
        self._held = 0

    def __call__(self, ids: Tensor, labels: Tensor, num_items: float) -> Tensor:
        """The loss over `num_items`, detached, after its backward.

        ids, labels: int64 [B, T], as `Decoder` takes them. num_items: the labels of the whole step.
        Raises torch.OutOfMemoryError for what does not fit in any way.
        """
        if ids.is_cuda and ids.numel() <= self._most_tokens:
            ids, labels = _padded(ids, 0), _padded(labels, IGNORE)
        shape = tuple(ids.shape)
        self._longest = max(self._longest, ids.numel())
        self._uses[shape] += 1
        if self._repeats(shape):
            self._place_gradients()
            if self._is_captured(ids, labels):
                return self._replay(ids, labels, num_items)
        return self._run(ids, labels, num_items)

    def drop(self) -> None:
        """Let go of all graphs and of their memory."""
        self.graphs.clear()
        self._held = 0
        torch.cuda.empty_cache()

    def _repeats(self, shape: tuple[int, ...]) -> bool:
        """Whether a replay does what a run would do, and sooner."""
        pager = self.optimizer.pager
        small = math.prod(shape) <= self._most_tokens and pager.device.type == "cuda"
        if not small or self._uses[shape] == 1 or shape in self._refused:
            return False
        near = all(slab.bytes_on_device == slab.nbytes for slab in pager.slabs)
        fixed = near and not torch.is_autocast_enabled("cuda") and self.model.has_plain_head
        fixed = fixed and not self._watch.sees_change()
        return fixed and (shape in self.graphs or self._has_room(shape))

    def _has_room(self, shape: tuple[int, ...]) -> bool:
        """Whether to capture a shape: in place of one that comes far less often, if need be."""
        peak = self.optimizer.pager.predictor.predict(self._longest)
        if peak is None or self._free() <= 2 * SLACK * peak:
            return False
        if len(self.graphs) >= MOST_GRAPHS:
            rarest = min(self.graphs, key=self._uses.__getitem__)
            if self._uses[shape] < 2 * self._uses[rarest]:
                return False
            del self.graphs[rarest]
        return True

    def _free(self) -> int:
        """Bytes that are left for what is not replayed."""
        return free_memory(self.optimizer.pager.device) - self._held

    def _run(self, ids: Tensor, labels: Tensor, num_items: float) -> Tensor:
        pager = self.optimizer.pager
        peak = pager.predictor.predict(ids.numel())
        # What graphs hold goes before the pager has to move state.
        if self.graphs and peak is not None and self._free() < SLACK * peak:
            self.drop()
        work = partial(self._work, num_items=num_items)
        try:
            loss = pager.micro_step(work, ids, labels, model=self.model)
        except torch.OutOfMemoryError:
            if not self.graphs:
                raise
            self.drop()
            loss = pager.micro_step(work, ids, labels, model=self.model)
        if not self._gradients:
            self._gradients = {p: None for p in pager.params if p.grad is not None}
        return loss

    def _work(self, ids: Tensor, labels: Tensor, num_items: Tensor | float) -> Tensor:
        loss = self.model(ids, labels=labels, num_items=num_items).loss
        assert loss is not None
        loss.backward()
        return loss.detach()

    def _is_captured(self, ids: Tensor, labels: Tensor) -> bool:
        """Whether there is a graph for these, now at the latest."""
        shape = tuple(ids.shape)
        if shape in self.graphs:
            return True
        try:
            self.graphs[shape] = self._capture(ids, labels)
        except torch.OutOfMemoryError:  # nothing has run yet
            self._refused.add(shape)
            self.drop()
        except RuntimeError as error:
            self._most_tokens = 0
            self.drop()
            cause = error.__context__ or error
            warnings.warn(
                f"MicroSteps: training goes on without CUDA graphs, as a capture failed: {cause}",
                stacklevel=3,
            )
        return shape in self.graphs

    def _replay(self, ids: Tensor, labels: Tensor, num_items: float) -> Tensor:
        graph = self.graphs[tuple(ids.shape)]
        graph.ids.copy_(ids)
        graph.labels.copy_(labels)
        graph.num_items.fill_(num_items)
        graph.graph.replay()
        return graph.loss.clone()

    def _place_gradients(self) -> None:
        """What was added up so far goes where graphs add to it."""
        self.optimizer.pager.settle()
        fresh = []
        for param, place in self._gradients.items():
            if place is None:
                place = self._gradients[param] = torch.empty_like(param)
            if param.grad is None:
                fresh.append(place)
            elif param.grad is not place:
                place.copy_(param.grad)
            param.grad = place
        if fresh:
            torch._foreach_zero_(fresh)

    def _capture(self, ids: Tensor, labels: Tensor) -> _Graph:
        inputs = ids.clone(), labels.clone(), ids.new_ones((), dtype=torch.float32)
        # A capture frees what has ended, which would hide some of what it takes.
        torch.cuda.synchronize(ids.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(ids.device)
        graph, loss = self._pool.capture(partial(self._work, *inputs))
        self._held += torch.cuda.memory_reserved(ids.device) - before
        return _Graph(graph, *inputs, loss)


def _padded(x: Tensor, value: int) -> Tensor:
    """[B, T] with T to a sixteenth of the next power of two, eight at least; no token sees it."""
    length = x.shape[1]
    step = max(8, (1 << (length - 1).bit_length()) // 16)
    return F.pad(x, (0, -length % step), value=value)


class _Watch:
    """What could make a model launch something else each time; gathered, as a look is due often."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.hooks = [
            hooks
            for m in modules
            for hooks in (m._forward_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.pre_hooks = [m._forward_pre_hooks for m in modules]
        self.dropouts = [m for m in modules if isinstance(m, nn.Dropout)]
        self.embeddings = [m for m in modules if isinstance(m, nn.Embedding)]
        self.params = [(p, p.requires_grad) for p in model.parameters()]

    def sees_change(self) -> bool:
        before = (hook for hooks in self.pre_hooks if hooks for hook in hooks.values())
        return (
            any(self.hooks)
            or not all(map(waits_for_update, before))
            or any(m.p > 0 and m.training for m in self.dropouts)
            or any(m.weight.requires_grad for m in self.embeddings)
            or any(
                p.requires_grad != was or p._backward_hooks or p._post_accumulate_grad_hooks
                for p, was in self.params
            )
        )
