"""What a training step knows and does when memory is short: predict, and try again exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from traceback import clear_frames
from types import TracebackType

import torch
from torch import Tensor


def total_memory(device: torch.device) -> int:
    """Bytes of the device that this process may use, its memory fraction counted; CPU: 2**62."""
    if device.type != "cuda":
        return 1 << 62
    total = torch.cuda.get_device_properties(device).total_memory
    # Before torch 2.8 a limit cannot be read: retries find it.
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    return int(total * fraction(device))


def free_memory(device: torch.device) -> int:
    """Bytes that torch can still hand out: free on the device, under the fraction, or cached."""
    if device.type != "cuda":
        return 1 << 62
    used = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - used
    return min(torch.cuda.mem_get_info(device)[0] + cached, total_memory(device) - used)


def join_segments(joined: bool = True) -> None:
    """From now on let torch's memory grow in place, so that what is freed lies together."""
    settings = f"expandable_segments:{joined}"
    if hasattr(torch._C, "_accelerator_setAllocatorSettings"):
        torch._C._accelerator_setAllocatorSettings(settings)
    else:  # torch before 2.10
        torch.cuda.memory._set_allocator_settings(settings)


class Predictor:
    """Peak bytes of a micro-batch as a + b * tokens, by least squares over those that ran."""

    def __init__(self) -> None:
        self.estimate: Callable[[int], int] | None = None
        self.samples = 0
        self.mean_tokens = self.mean_peak = 0.0
        self.variance = self.covariance = 0.0
        self.worst = 0.0
        self.errors: list[float] = []

    def learn(self, tokens: int, peak: int) -> None:
        predicted = self.predict(tokens)
        if predicted is not None:
            self.errors = [*self.errors[-999:], (predicted - peak) / max(peak, 1)]
        self.samples += 1
        away = tokens - self.mean_tokens
        self.mean_tokens += away / self.samples
        self.mean_peak += (peak - self.mean_peak) / self.samples
        self.variance += away * (tokens - self.mean_tokens)
        self.covariance += away * (peak - self.mean_peak)
        self.worst = max(self.worst, peak - self._line(tokens))

    def _line(self, tokens: int) -> float:
        if self.variance == 0:
            # One length was seen: a longer batch takes in proportion, a shorter one no more.
            return self.mean_peak * max(1.0, tokens / max(self.mean_tokens, 1))
        slope = max(0.0, self.covariance / self.variance)
        return self.mean_peak + slope * (tokens - self.mean_tokens)

    def predict(self, tokens: int) -> int | None:
        """Bytes above what is allocated before it, the largest miss so far added.

        Before anything was learnt it is what `estimate` says, None without one.
        """
        if self.samples == 0:
            return None if self.estimate is None else self.estimate(tokens)
        return math.ceil(self._line(tokens) + self.worst)

    def quantile(self, q: float) -> float:
        """Relative error (predicted over measured, less 1) of predictions so far."""
        return sorted(self.errors)[int(q * (len(self.errors) - 1))] if self.errors else 0.0


@dataclass
class RandomState:
    """The generators that a forward pass draws from."""

    cpu: Tensor
    device: torch.device
    cuda: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        on_gpu = device.type == "cuda"
        cuda = torch.cuda.get_rng_state(device) if on_gpu else None
        return cls(torch.get_rng_state(), device, cuda)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


class Gradients:
    """The gradients so far, set aside while a micro-batch makes its own.

    What autograd would add in place is added afterwards: the same sum, to the bit, but a
    micro-batch that fails leaves it untouched.
    """

    def __init__(self, params: Sequence[Tensor]):
        self.params = params
        self.aside = [param.grad for param in params]
        self.drop()

    def drop(self) -> None:
        """Forget what the micro-batch made."""
        for param in self.params:
            param.grad = None

    def to_host(self) -> int:
        """Move what was set aside to the CPU; returns the bytes that this frees."""
        freed = 0
        for index, grad in enumerate(self.aside):
            if grad is not None and grad.is_cuda:
                freed += grad.nbytes
                self.aside[index] = grad.cpu()
        return freed

    def add(self) -> None:
        """Add what the micro-batch made to what was set aside."""
        for param, before in zip(self.params, self.aside, strict=True):
            if before is not None:
                before = before.to(param.device)
                param.grad = before if param.grad is None else before.add_(param.grad)

    def restore(self) -> None:
        for param, before in zip(self.params, self.aside, strict=True):
            param.grad = None if before is None else before.to(param.device)


class Attempt:
    """Runs the body of one try; running out of memory ends the try, not the program."""

    def __init__(self, gradients: Gradients):
        self.gradients = gradients
        self.done = False
        self.failure: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if kind is None:
            self.done = True
            self.gradients.add()
            return False
        if not issubclass(kind, torch.OutOfMemoryError):
            self.gradients.restore()
            return False
        self.gradients.drop()
        self.failure = str(error).partition("\n")[0]
        # Its frames hold the tensors that have to go, and autograd's thread may still hold it.
        clear_frames(traceback)
        return True
