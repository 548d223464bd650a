"""The header of a safetensors file, read strictly.

The format: 8 bytes little-endian length of the header, the header as JSON, then the data, whose
`data_offsets` cover it without a gap (https://huggingface.co/docs/safetensors). The safetensors
library tells neither the offsets, which give the file order, nor which tensor is damaged.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.source import StoredTensor
from halfbyte.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
MAX_DIMS = 64
TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of the safetensors file `path`, in the order of their data.

    Raises CheckpointError, naming file, tensor, expected and got, for anything that is not a
    whole, well-formed safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: expected a safetensors header within {size} bytes of file, got a header "
                f"length of {length if len(prefix) == 8 else 'less than 8 bytes'}. {_hint(prefix)}"
            )
        raw = file.read(length)
    entries = _parse(path, raw)
    tensors = [_entry(path, name, fields, 8 + length) for name, fields in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_cover(path, tensors, 8 + length, size)
    return tensors


def _hint(prefix: bytes) -> str:
    if prefix.startswith(b"version "):
        return "Hint: this is a Git LFS pointer, fetch the file itself with `git lfs pull`"
    return "Hint: the file is truncated or is not safetensors, download it again"


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON header, got {error}. Hint: the file is corrupt"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: expected a JSON object as header, got {type(header)}")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        repeated = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the name {repeated!r} twice")
    return names


def _entry(path: Path, name: str, fields: Any, base: int) -> StoredTensor:
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        sizes = (*shape, begin, end)
        whole = len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n < 1 << 63 for n in sizes)
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"{path}: tensor {name}: expected dtype, shape and data_offsets, got {fields!r}"
        )
    if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name}: expected a dtype of {', '.join(TORCH_DTYPES)}, got {dtype!r}"
        )
    nbytes = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name}: expected {nbytes} bytes for {dtype} {list(shape)}, "
            f"got data_offsets of {end - begin}"
        )
    return StoredTensor(name, dtype, shape, path, base + begin, nbytes)


def _check_cover(path: Path, tensors: list[StoredTensor], base: int, size: int) -> None:
    """Offsets must follow each other without gap or overlap up to the end of the file."""
    position = base
    for tensor in tensors:
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: expected its data at byte {position}, "
                f"got {tensor.offset}. Hint: the header is corrupt"
            )
        position += tensor.nbytes
        if position > size:
            raise CheckpointError(
                f"{path}: tensor {tensor.name}: expected data up to byte {position}, got a file "
                f"of {size} bytes. Hint: the file is truncated, download it again"
            )
    if position != size:
        raise CheckpointError(
            f"{path}: expected {position} bytes, got a file of {size} bytes. "
            "Hint: the file is corrupt, download it again"
        )
