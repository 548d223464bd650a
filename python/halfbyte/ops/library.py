"""The one torch.library namespace: schemas live beside their op, this holds the handle."""

from __future__ import annotations

from collections.abc import Callable

import torch

# The kernel of each operation, for CPU and CUDA.
KERNELS: dict[object, Callable] = {}
_library = torch.library.Library("halfbyte", "DEF")


def define(schema: str, kernel: Callable, fake: Callable) -> None:
    """Register `halfbyte::<schema>` with one kernel for CPU and CUDA and its shape function.

    define + impl costs half of torch.library.custom_op per call.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    for backend in ("CPU", "CUDA"):
        _library.impl(name, kernel, backend)
    KERNELS[getattr(torch.ops.halfbyte, name).default] = kernel
    torch.library.register_fake(f"halfbyte::{name}", fake, lib=_library)
