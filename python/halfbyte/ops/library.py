"""What operations share: the one torch.library namespace, and how they use torch and a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# The kernel of each operation, for CPU and CUDA.
KERNELS: dict[object, Callable] = {}
_library = torch.library.Library("halfbyte", "DEF")


def is_left_to_torch(x: Tensor) -> bool:
    """Whether a norm or a gate is torch's to compute: on the CPU, in training, but for bf16.

    In fp32 it then has the bits of transformers, and of a compiled model. In bf16 ours takes a
    third of the time, and for a decode step's row, where torch takes 15 us and more, 1.
    """
    if not x.is_cpu or x.dtype == torch.float64 or is_transformed():
        return x.is_cpu
    return x.dtype != torch.bfloat16 and not torch.is_inference_mode_enabled()


def is_transformed() -> bool:
    """Whether torch compiles, vectorizes or differentiates what it sees in ways of its own."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


def product_fp32(x: Tensor, y: Tensor) -> Tensor:
    """x y as it is accumulated: a parameter's gradient is not rounded to 16 bits first."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x.float(), y.float())


def define(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Register `halfbyte::<schema>` with one kernel for CPU and CUDA and its shape function.

    define + impl costs half of torch.library.custom_op per call. Returns what calls the kernel
    without torch's dispatcher, which costs as much as a launch, where nothing has to see the
    operation and no gradient is recorded.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for backend in ("CPU", "CUDA"):
        _library.impl(name, kernel, backend)
    operation = getattr(torch.ops.halfbyte, name).default
    KERNELS[operation] = kernel
    torch.library.register_fake(f"halfbyte::{name}", fake, lib=_library)

    def call(*args: Any) -> Any:
        seen = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return operation(*args) if seen else kernel(*args)

    return call
