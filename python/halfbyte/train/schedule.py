"""Learning-rate schedules: transformers' get_scheduler as functions of the step."""

from __future__ import annotations

import math


def _constant(step: int, warmup: int, total: int) -> float:
    return 1.0


def _constant_with_warmup(step: int, warmup: int, total: int) -> float:
    return step / warmup if step < warmup else 1.0


def _linear(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


SCHEDULES = {
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "linear": _linear,
    "cosine": _cosine,
}


def lr_factor(name: str, step: int, warmup_ratio: float, total: int) -> float:
    """What the learning rate is multiplied by at step `step`, counted from 0, of `total`.

    Warm-up lasts ceil(warmup_ratio * total) steps. "constant" has none, as in transformers, so
    that qlora.py's warmup_ratio of 0.03 has no effect there.
    """
    return SCHEDULES[name](step, math.ceil(warmup_ratio * total), total)
