"""Layers that keep their input alone for the backward, and run again there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor


def recomputed(layer: Callable[..., Tensor], x: Tensor, *rest: object) -> Tensor:
    """layer(x, *rest, unread), with x kept for the backward, which runs it again with gradients.

    x must require a gradient. unread: True when it runs again, as its output has been read then.
    torch.utils.checkpoint keeps the same, but passes each tensor that the layer saves through
    Python, in the forward and when it runs again.

    The backward raises RuntimeError under torch.autograd.grad: it adds to the leaves' own `grad`.
    """
    return _Recomputed.apply(layer, rest, x)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, rest, x):
        ctx.layer, ctx.rest = layer, rest
        ctx.save_for_backward(x)
        ctx.autocast = None
        if torch.is_autocast_enabled(x.device.type):
            ctx.autocast = torch.get_autocast_dtype(x.device.type)
        before = _random_state(x.device)
        # Without gradients some operations round otherwise on a CPU.
        with torch.set_grad_enabled(x.is_cpu):
            out = layer(x, *rest, False).detach()
        # Most layers draw nothing, and on a GPU it shows: the generator need not be set back.
        drawn = isinstance(before, Tensor) or before != _random_state(x.device)
        ctx.random = before if drawn else None
        return out

    @staticmethod
    def backward(ctx, grad):
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "recomputed: expected loss.backward() without `inputs`, got torch.autograd.grad. "
                "Hint: set gradient_checkpointing = False for it"
            )
        (x,) = ctx.saved_tensors
        again = x.detach().requires_grad_()
        autocast = nullcontext()
        if ctx.autocast is not None:
            autocast = torch.autocast(x.device.type, ctx.autocast)
        after = _random_state(x.device)
        if ctx.random is not None:
            _set_random_state(x.device, ctx.random)
        with torch.enable_grad(), autocast:
            out = ctx.layer(again, *ctx.rest, True)
        if ctx.random is not None:
            _set_random_state(x.device, after)
        # What the layer computed is not needed any more, only where its gradient goes.
        edge = torch.autograd.graph.get_gradient_edge(out)
        del out
        torch.autograd.backward(edge, grad)
        return None, None, again.grad


def _generator(device: torch.device) -> torch.Generator:
    return (
        torch.cuda.default_generators[device.index]
        if device.type == "cuda"
        else torch.default_generator
    )


def _random_state(device: torch.device) -> int | Tensor:
    """Where the generator of a device stands: on a GPU how far it is from its seed."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return 0  # nobody may ask; what draws is not captured
    generator = _generator(device)
    return generator.get_offset() if device.type == "cuda" else generator.get_state()


def _set_random_state(device: torch.device, state: int | Tensor) -> None:
    generator = _generator(device)
    if isinstance(state, Tensor):
        generator.set_state(state)
    else:
        generator.set_offset(state)
