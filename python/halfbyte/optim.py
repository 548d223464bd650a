"""AdamW over adapters: 32-bit or 8-bit state, clipping without a host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from halfbyte.ops import AdamWScalars, adamw, adamw_8bit

# As bitsandbytes: below this an 8-bit state saves nothing worth its noise.
MIN_8BIT_SIZE = 4096
BLOCKSIZE = 256


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's results with fp32 state, bitsandbytes' layout with 8-bit state.

    params: tensors or parameter groups, fp32, fp16 or bf16. lr, betas, eps, weight_decay: as in
    torch (decay is applied before the update). state: "fp32" or "8bit" (moments of parameters
    with at least 4096 elements as 8-bit codes in blocks of 256). max_grad_norm: clip all
    gradients of all groups to this global 2-norm inside `step`; `grad_norm` then holds the norm
    before clipping, on the device.

    Raises ValueError for options out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state: str = "fp32",
        max_grad_norm: float | None = None,
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
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.state_kind = state
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._grad_scale()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group, scale.get(param.device))
        return loss

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

    def _update(self, param: Tensor, group: dict, scale: Tensor | None) -> None:
        state = self.state[param]
        if not state:
            state.update(self._fresh(param))
        state["step"] += 1
        scalars = AdamWScalars(
            float(group["lr"]),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            int(state["step"]),
            scale,
        )
        grad = param.grad.contiguous()
        if "state1" in state:
            moments = (state["state1"], state["state2"], state["absmax1"], state["absmax2"])
            adamw_8bit(param, grad, *moments, scalars)
        else:
            adamw(param, grad, state["exp_avg"], state["exp_avg_sq"], scalars)

    def _fresh(self, param: Tensor) -> dict[str, Any]:
        """Zero moments; code 127 is the signed map's zero, code 0 the unsigned map's."""
        if self.state_kind == "fp32" or param.numel() < MIN_8BIT_SIZE:
            zeros = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
            return {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        codes = torch.zeros(param.shape, dtype=torch.uint8, device=param.device)
        absmax = torch.zeros(-(-param.numel() // BLOCKSIZE), device=param.device)
        return {
            "step": 0,
            "state1": torch.full_like(codes, 127),
            "state2": codes,
            "absmax1": absmax,
            "absmax2": absmax.clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments keep their own dtype (torch would cast codes to the param's)."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for param, saved_id in zip(params, ids, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            self.state[param] = {
                key: value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }
