"""adamw, adamw_8bit: one fused in-place update of one parameter."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from halfbyte import _core


@dataclasses.dataclass(frozen=True)
class AdamWScalars:
    """The scalars of one update; `step` counts from 1, grad_scale is fp32 [1] or None."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: Tensor | None = None

    def args(self) -> tuple:
        return dataclasses.astuple(dataclasses.replace(self, grad_scale=None))[:-1] + (
            self.grad_scale,
        )


def adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: AdamWScalars
) -> None:
    """torch.optim.AdamW's update (Loshchilov & Hutter 2019), decay first, in place.

    param, grad: fp32, fp16 or bf16, same dtype and shape; exp_avg, exp_avg_sq: fp32.
    The gradient is multiplied by grad_scale (read on the device) before use.
    """
    _core.adamw(param.detach(), grad, exp_avg, exp_avg_sq, *s.args())


def adamw_8bit(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    s: AdamWScalars,
) -> None:
    """AdamW on 8-bit moments (Dettmers et al. 2022): blocks of 256, decay first, in place.

    state1 (signed map), state2 (unsigned map): uint8 of param's size; absmax1, absmax2: fp32
    [ceil(n / 256)]. The weight is updated from the fp32 moments before they are re-quantized.
    An element whose gradient is NaN or Inf keeps its weight and its state becomes 0.
    """
    _core.adamw_8bit(param.detach(), grad, state1, state2, absmax1, absmax2, *s.args())
