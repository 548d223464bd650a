"""Which tensors a model needs from a source, and whether the source's headers promise them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import nn

from halfbyte.checkpoint.bnb import STATE, STORAGE_DTYPES, companion_of, is_skipped
from halfbyte.checkpoint.source import Source, StoredTensor
from halfbyte.errors import CheckpointError
from halfbyte.models import Decoder

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What each stored tensor is to the model.

    floats: shapes of the tensors that are stored in floating point. packed: shapes [N, K] of the
    weights that the source holds in 4 bits. parts: for each of these, all tensors it is made of.
    """

    floats: dict[str, tuple[int, ...]]
    packed: dict[str, tuple[int, ...]]
    parts: dict[str, set[str]]


def linear_layers(model: Decoder) -> set[str]:
    """Paths of the layers that are quantized: every linear layer but the output head."""
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return linears - {"lm_head"}


def plan(
    source: Source, tensors: list[StoredTensor], model: Decoder, stored: dict[str, Any] | None
) -> Layout:
    """Match the headers of `tensors` with `model`, whose parameters are still empty.

    stored: the source's 4-bit settings, None for a floating point source.
    Raises CheckpointError for missing, surplus or mismatched tensors, before any data is read.
    """
    names = {tensor.name for tensor in tensors}
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    parts = {} if stored is None else _parts(names, linear_layers(model), stored)
    packed = {name: shapes[name] for name in parts}
    layout = Layout({n: s for n, s in shapes.items() if n not in packed}, packed, parts)
    _check_names(source, names, layout, model.config.tie_word_embeddings, stored)
    for tensor in tensors:
        _check_header(tensor, layout, source.float_dtypes)
    return layout


def _parts(names: set[str], linears: set[str], stored: dict[str, Any]) -> dict[str, set[str]]:
    """The tensors of each 4-bit weight; a missing mandatory one is listed all the same."""
    quantized = {name.partition(f".weight.{STATE}")[0] for name in names if STATE in name}
    announced = {name for name in linears if not is_skipped(name, stored)}
    parts: dict[str, set[str]] = {}
    # The head is in 4 bits in the rare folder that says so by its tensors.
    for linear in announced | quantized & {*linears, "lm_head"}:
        weight = f"{linear}.weight"
        parts[weight] = {weight, f"{weight}.absmax", f"{weight}.quant_map"}
        if linear not in quantized:
            parts[weight].add(f"{weight}.{STATE}{stored.get('bnb_4bit_quant_type', 'fp4')}")
    for name in names:
        parts.get(companion_of(name) or name, set()).add(name)
    return parts


def _check_names(
    source: Source, names: set[str], layout: Layout, tied: bool, stored: dict[str, Any] | None
) -> None:
    if tied and HEAD in layout.packed:
        raise CheckpointError(
            f"{source.location}: tensor {HEAD}: expected the embedding, which config.json ties, "
            "got 4-bit codes. Hint: set tie_word_embeddings to false"
        )
    known = set(layout.floats).union(*layout.parts.values())
    missing, unexpected = known - names, names - known
    if tied and len(missing & {HEAD, EMBEDDING}) < 2:
        missing -= {HEAD, EMBEDDING}
    if missing == {HEAD}:
        hint = "if the head is the embedding, config.json must say tie_word_embeddings: true"
    elif stored is None and any(companion_of(name) for name in unexpected):
        hint = "4-bit tensors need the quantization_config of their own config.json"
    elif stored is not None and any(STATE in name for name in missing):
        hint = "config.json announces 4-bit weights; layers in 16 bits go to llm_int8_skip_modules"
    else:
        hint = "the files are incomplete, or config.json belongs to another model"
    if missing:
        raise CheckpointError(f"{source.location}: missing tensor {_some(missing)}. Hint: {hint}")
    if unexpected:
        raise CheckpointError(
            f"{source.location}: unexpected tensor {_some(unexpected)}. Hint: {hint}"
        )


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:5])
    return f"{first} and {len(names) - 5} more" if len(names) > 5 else first


def _check_header(tensor: StoredTensor, layout: Layout, float_dtypes: tuple[str, ...]) -> None:
    if tensor.name in layout.packed:
        nbytes = (math.prod(layout.packed[tensor.name]) + 1) // 2
        if tensor.dtype not in STORAGE_DTYPES or tensor.nbytes != nbytes:
            raise _mismatch(tensor, f"{nbytes} packed bytes stored as {_either(STORAGE_DTYPES)}")
    elif tensor.name in layout.floats:
        shape = layout.floats[tensor.name]
        if tensor.dtype not in float_dtypes or tensor.shape != shape:
            raise _mismatch(tensor, f"{_either(float_dtypes)} {list(shape)}")


def _either(dtypes: tuple[str, ...]) -> str:
    return f"{', '.join(dtypes[:-1])} or {dtypes[-1]}"


def _mismatch(tensor: StoredTensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {tensor.name}: expected {expected}, got {tensor.describe()}"
    )
