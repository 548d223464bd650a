"""AdamW whose state lives in pages: on the device or in host memory, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakMethod, finalize

import torch
from torch import Tensor

from halfbyte.ops import dequantize_blockwise, dynamic_map, quantize_blockwise
from halfbyte.ops.quantize_4bit import FLOAT_DTYPES
from halfbyte.pager import BLOCKSIZE, Pager, Slab

# As bitsandbytes: below this an 8-bit state saves nothing worth its noise.
MIN_8BIT_SIZE = 4096
LAYOUTS = ("halfbyte", "torch", "bitsandbytes")
# Where bitsandbytes puts the tensors of an 8-bit state inside a parameter's state.
WRAPPED = "__bnb_optimizer_quant_state__"


@dataclass(frozen=True)
class _Member:
    """A parameter, the number of its group, and its entry of the optimizer's state."""

    param: Tensor
    group: int
    state: dict[str, Any]


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's results with fp32 state, bitsandbytes' with 8-bit state.

    params: tensors or parameter groups, fp32, fp16 or bf16. lr, betas, eps, weight_decay: as in
    torch (decay is applied before the update). state: "fp32" or "8bit" (moments of parameters
    with at least 4096 elements as 8-bit codes in blocks of 256). max_grad_norm: clip all
    gradients of all groups to this global 2-norm inside `step`; `grad_norm` then holds the norm
    before clipping, on the device. placement: "auto", "device" or "host", see `pager.Pager`;
    results do not depend on it. host_limit: most bytes of host memory to reserve.

    `step` is one launch a state format and never waits for the device.

    Raises ValueError for options out of range, HostMemoryError (a MemoryError) where host memory
    for the state is short.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state: str = "fp32",
        placement: str = "auto",
        max_grad_norm: float | None = None,
        host_limit: int | None = None,
    ):
        if state not in ("fp32", "8bit"):
            raise ValueError(f"AdamW: state: expected 'fp32' or '8bit', got {state!r}")
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"AdamW: {name}: expected >= 0, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: betas: expected two values in [0, 1), got {betas!r}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"AdamW: max_grad_norm: expected > 0 or None, got {max_grad_norm!r}")
        self.state_kind = state
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self.pager = Pager(placement, host_limit)
        self._waiting: list[Tensor] | None = []
        self._members: dict[Slab, list[_Member]] = {}
        self._overlapping = False
        # By number of the slab: gradients that an update under way reads, and the parameters of no
        # module of `overlap`.
        self._pending: dict[int, list[Tensor | None]] = {}
        self._apart: dict[int, Sequence[int]] = {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        waiting, self._waiting = self._waiting, None
        self._place(waiting)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's state gets pages of its own."""
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        # The groups of the constructor share pages.
        if self._waiting is not None:
            self._waiting += params
            return
        placed = len(self.pager.slabs)
        try:
            self._place(params)
        except Exception:
            # What has no pages would never be updated.
            self.param_groups.pop()
            del self.pager.slabs[placed:]
            raise

    def _place(self, params: Sequence[Tensor]) -> None:
        """Give parameters pages, a slab for each device and format."""
        slabs: dict[tuple[torch.device, str], list[Tensor]] = {}
        for param in params:
            if param.dtype not in FLOAT_DTYPES:
                raise ValueError(
                    f"AdamW: params: expected fp32, fp16 or bf16, got {param.dtype} "
                    f"{list(param.shape)}. Hint: lora.adapter_parameters(model) is what trains"
                )
            small = param.numel() < MIN_8BIT_SIZE
            slabs.setdefault((param.device, "fp32" if small else self.state_kind), []).append(param)
        for (_, moments), members in slabs.items():
            self.pager.add(members, moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._grad_scale()
        self.pager.settle()
        self._pending.clear()
        for number, slab in enumerate(self.pager.slabs):
            grads = [param.grad for param in slab.params]
            rules, rule_of = self._rules(slab, grads)
            grads = [None if grad is None else grad.contiguous() for grad in grads]
            factor = scale.get(slab.device)
            overlapped = self._overlapping and slab.bytes_on_device < slab.nbytes
            timing = ("update_ms",) if overlapped else ("update_ms", "exposed_ms")
            with self.pager.timed(slab, *timing, there=overlapped):
                slab.core.step(slab.params, grads, rules, rule_of, factor, overlapped)
            if overlapped:
                self._pending[number] = [*grads, factor]
                # A group added after `overlap` belongs to none of its modules.
                self._wait_for({number: self._apart.get(number, range(len(grads)))})
        self.pager.stepped()
        return loss

    def overlap(self, modules: Iterable[torch.nn.Module]) -> None:
        """Let updates of state in host memory run beside the next forward pass.

        The forward of each of `modules` (say, a decoder's layers) waits for the updates of its
        own parameters, and `step` for all others. Whatever else reads a parameter after `step`
        calls `pager.settle()` before; `state_dict` does.
        """
        slabs = list(enumerate(self.pager.slabs))
        inside: set[Tensor] = set()
        wait = WeakMethod(self._wait_for)
        for module in modules:
            mine = set(module.parameters())
            inside |= mine
            places = {
                number: [i for i, param in enumerate(slab.params) if param in mine]
                for number, slab in slabs
            }
            handle = module.register_forward_pre_hook(partial(_call_if_alive, wait, places))
            # A model outlives its optimizers, which hold memory.
            finalize(self, handle.remove)
        self._apart = {
            number: [i for i, param in enumerate(slab.params) if param not in inside]
            for number, slab in slabs
        }
        self._overlapping = True

    def _wait_for(self, places: dict[int, Sequence[int]]) -> None:
        """Let torch's stream wait for updates under way, and let go of their gradients.

        places: numbers of parameters by the number of their slab.
        """
        for number, params in places.items():
            held = self._pending.get(number)
            waiting = [param for param in params if held and held[param] is not None]
            if not held or not waiting:
                continue
            slab = self.pager.slabs[number]
            with self.pager.timed(slab, "exposed_ms"):
                slab.core.wait_for(waiting)
            for param in waiting:
                held[param] = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; gradients that are to be zeroed in place are waited for first."""
        if not set_to_none:
            self.pager.settle()
        super().zero_grad(set_to_none)

    def _rules(
        self, slab: Slab, grads: Sequence[Tensor | None]
    ) -> tuple[list[tuple[float, float, float, float, float, int]], list[int]]:
        """The scalars in use, and which of them each parameter has; counts the steps."""
        numbers: dict[tuple[int, int], int] = {}
        rule_of = []
        for member, grad in zip(self._members_of(slab), grads, strict=True):
            state = member.state
            step = state.get("step", 0)
            if grad is not None:
                if not state:
                    self.state[member.param] = state
                step = state["step"] = step + 1
            # The scalars of what has no gradient are not used.
            rule_of.append(numbers.setdefault((member.group, step or 1), len(numbers)))
        rules = []
        for index, step in numbers:
            group = self.param_groups[index]
            scalars = (float(group["lr"]), *group["betas"], group["eps"], group["weight_decay"])
            rules.append((*scalars, step))
        return rules, rule_of

    def _members_of(self, slab: Slab) -> list[_Member]:
        """A slab's parameters with their groups and states: looking them up takes long."""
        if slab not in self._members:
            group_of = {p: i for i, group in enumerate(self.param_groups) for p in group["params"]}
            self._members[slab] = [
                _Member(param, group_of[param], self.state[param] if param in self.state else {})
                for param in slab.params
            ]
        return self._members[slab]

    def _grad_scale(self) -> dict[torch.device, Tensor]:
        """min(1, max_grad_norm / norm) as a one-element tensor on every device in use."""
        if self.max_grad_norm is None:
            return {}
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            return {}
        self.grad_norm = torch.nn.utils.get_total_norm(grads)
        scale = (self.max_grad_norm / (self.grad_norm.float() + 1e-6)).clamp(max=1.0).reshape(1)
        return {device: scale.to(device) for device in {grad.device for grad in grads}}

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "AdamW: expected to be saved by its state_dict(), got a copy or a pickle of the whole, "
            "whose state lies in pages"
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's layout of groups and states; the moments are CPU tensors, wherever they were.

        A parameter's state has step and, of its shape, fp32 exp_avg and exp_avg_sq, or uint8
        state1 and state2 with fp32 absmax1 and absmax2 [ceil(n / 256)]; none before its first step.
        """
        return self.export()

    def export(self, layout: str = "halfbyte") -> dict[str, Any]:
        """The state dict as "halfbyte", "torch" (torch.optim.AdamW) or "bitsandbytes" loads it.

        8-bit moments are dequantized for torch. Raises ValueError for another layout.
        """
        if layout not in LAYOUTS:
            raise ValueError(f"export: layout: expected one of {LAYOUTS}, got {layout!r}")
        packed = super().state_dict()
        numbers = {param: i for i, param in enumerate(self._params())}
        for slab in self.pager.slabs:
            for param, moments in zip(slab.params, slab.read(), strict=True):
                state = packed["state"].get(numbers[param])
                if state is not None:
                    step = state["step"]
                    packed["state"][numbers[param]] = {"step": step, **moments}
        if layout != "halfbyte":
            convert = _to_torch if layout == "torch" else _to_bitsandbytes
            packed["state"] = {i: convert(state) for i, state in packed["state"].items()}
        return packed

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class, of torch.optim.AdamW or of bitsandbytes' AdamW.

        Moments go straight to where the pages are; fp32 moments are quantized where this
        optimizer keeps 8 bits, and the other way round. Raises ValueError when groups or shapes
        do not fit, or for states of another kind of optimizer.
        """
        states = {number: _from_any(state) for number, state in state_dict["state"].items()}
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = self._params()
        if len(ids) != len(params):
            raise ValueError(f"AdamW: expected the state of {len(params)} params, got {len(ids)}")
        numbered = zip(params, ids, strict=True)
        found = {param: states[number] for param, number in numbered if number in states}
        values = [self._fitted(slab, found) for slab in self.pager.slabs]
        steps = {number: {"step": state["step"]} for number, state in states.items()}
        super().load_state_dict({**state_dict, "state": steps})
        for param in params:
            if param in found:
                self.state[param] = {"step": found[param]["step"]}
        self._members.clear()
        for slab, moments in zip(self.pager.slabs, values, strict=True):
            slab.write(moments)

    def _fitted(
        self, slab: Slab, found: dict[Tensor, dict[str, Any]]
    ) -> dict[int, dict[str, Tensor]]:
        """What a slab shall hold; fresh moments where nothing was saved."""
        values = {}
        for index, param in enumerate(slab.params):
            moments = found.get(param)
            if moments is None:
                zeros = torch.zeros(param.shape, dtype=torch.float32, device="cpu")
                moments = {"exp_avg": zeros, "exp_avg_sq": zeros}
            shape = next(value for name, value in moments.items() if name != "step").shape
            if shape.numel() != param.numel():
                raise ValueError(
                    f"AdamW: state: expected {list(param.shape)} for param {index} of its group, "
                    f"got {list(shape)}"
                )
            values[index] = _as_8bit(moments) if slab.moments == "8bit" else _as_fp32(moments)
        return values


def waits_for_update(hook: Callable[..., object]) -> bool:
    """Whether a module's hook is one that `AdamW.overlap` has registered."""
    return isinstance(hook, partial) and hook.func is _call_if_alive


def _call_if_alive(method: WeakMethod, argument: object, *_: object) -> None:
    bound = method()
    if bound is not None:
        bound(argument)


def _from_any(state: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter in this module's names."""
    state = {**state, **state.get(WRAPPED, {})}
    if "state1" in state and state["state1"].dtype != torch.uint8:
        names = ("state1", "state2")
    elif "state1" in state:
        for name, signed in (("qmap1", True), ("qmap2", False)):
            ours = dynamic_map(signed)
            if name in state and not torch.equal(state[name].cpu().float(), ours):
                raise ValueError(f"AdamW: {name}: expected the dynamic 8-bit map, got another")
        if state["absmax1"].numel() != -(-state["state1"].numel() // BLOCKSIZE):
            raise ValueError(
                f"AdamW: absmax1: expected one scale a block of {BLOCKSIZE}, "
                f"got {state['absmax1'].numel()} for {state['state1'].numel()} elements"
            )
        return {"step": int(state["step"])} | {
            name: state[name] for name in ("state1", "state2", "absmax1", "absmax2")
        }
    elif "exp_avg" in state and "max_exp_avg_sq" not in state:
        names = ("exp_avg", "exp_avg_sq")
    else:
        raise ValueError(
            "AdamW: state: expected exp_avg and exp_avg_sq, or state1 and state2, got "
            f"{sorted(state)}"
        )
    return {
        "step": int(state["step"]),
        "exp_avg": state[names[0]],
        "exp_avg_sq": state[names[1]],
    }


def _as_fp32(state: dict[str, Any]) -> dict[str, Tensor]:
    if "exp_avg" in state:
        return {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    m = dequantize_blockwise(state["state1"].cpu(), state["absmax1"].cpu(), signed=True)
    v = dequantize_blockwise(state["state2"].cpu(), state["absmax2"].cpu(), signed=False)
    return {"exp_avg": m, "exp_avg_sq": v}


def _as_8bit(state: dict[str, Any]) -> dict[str, Tensor]:
    if "state1" in state:
        return {name: state[name] for name in ("state1", "state2", "absmax1", "absmax2")}
    state1, absmax1 = quantize_blockwise(state["exp_avg"].cpu().float(), signed=True)
    state2, absmax2 = quantize_blockwise(state["exp_avg_sq"].cpu().float(), signed=False)
    return {"state1": state1, "state2": state2, "absmax1": absmax1, "absmax2": absmax2}


def _to_torch(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": torch.tensor(float(state["step"]), dtype=torch.float32, device="cpu"),
        **_as_fp32(state),
    }


def _to_bitsandbytes(state: dict[str, Any]) -> dict[str, Any]:
    if "exp_avg" in state:
        return {"step": state["step"], "state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
    return {**state, "qmap1": dynamic_map(True), "qmap2": dynamic_map(False)}
