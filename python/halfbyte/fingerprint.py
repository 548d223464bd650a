"""What tells one base model from another, with or without an adapter on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.linear import Linear4bit
from halfbyte.ops import QuantState

HASHED_ELEMENTS = 1 << 22
# Paths of what lora.inject adds; the base's own modules move under "base_layer".
ADAPTER_PARTS = {"lora_A", "lora_B", "trained"}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells one base from another: {"sha256", "quant_type", "double_quant", "blocksize"}.

    The hash covers names, shapes and stored bytes of the 4-bit layers (codes and scales) and the
    values of all other parameters as fp32. It is the same on every device, with and without an
    adapter, and for every dtype of `load` that holds the weights exactly. Biases that an adapter
    trains in place count: take the fingerprint before training.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(model)):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        for part in tensor.detach().flatten().split(HASHED_ELEMENTS):
            part = part.float() if part.is_floating_point() else part
            digest.update(part.cpu().numpy().data)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    return {
        "sha256": digest.hexdigest(),
        "quant_type": layers[0].quant_type if layers else None,
        "double_quant": bool(layers) and layers[0].double_quant,
        "blocksize": layers[0].blocksize if layers else None,
    }


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model under the names they have without an adapter."""
    for path, module in model.named_modules():
        parts = path.split(".")
        if ADAPTER_PARTS.isdisjoint(parts):
            yield ".".join(part for part in parts if part != "base_layer"), module


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Codes, scales and parameters, each once however many modules share it."""
    seen: set[int] = set()
    for path, module in _base_modules(model):
        if isinstance(module, Linear4bit):
            state = stored_state(module, path)
            yield f"{path}.absmax", state.absmax
            if state.nested is not None:
                yield f"{path}.nested_absmax", state.nested.absmax
                yield f"{path}.nested_quant_map", state.nested.map
                yield (
                    f"{path}.nested_offset",
                    torch.tensor([state.offset], dtype=torch.float32, device="cpu"),
                )
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{leaf}", parameter


def stored_state(layer: Linear4bit, path: str) -> QuantState:
    """The layer's quant_state; ValueError naming `path` where it holds no weight yet."""
    if layer.quant_state is None:
        raise ValueError(f"{path}: expected a quantized weight, got a layer that holds none yet")
    return layer.quant_state
