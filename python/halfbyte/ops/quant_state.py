"""QuantState: everything beside the packed bytes that gives a 4-bit tensor its values."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.errors import CheckpointError

NESTED_BLOCKSIZE = 256
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4", "int4")
# int4 is ours alone, for comparison: bitsandbytes' files know these two.
FILE_QUANT_TYPES = ("nf4", "fp4")


@dataclasses.dataclass(frozen=True)
class Nested:
    """Second level of double quantization: absmax of the absmax.

    absmax: fp32 [ceil(nblocks / 256)]; map: fp32 [256], the 8-bit codebook.
    """

    absmax: Tensor
    map: Tensor

    def to(self, device: torch.device | str) -> Nested:
        """The same on `device`, with the one copy there is of a map, so that kernels can tell."""
        absmax = self.absmax.to(device)
        if absmax.is_meta:
            return Nested(absmax, self.map.to(device))
        return Nested(absmax, _shared_map(self.map.cpu().numpy().tobytes(), absmax.device))


@functools.cache
def _shared_map(values: bytes, device: torch.device) -> Tensor:
    # An inference tensor could not be used in training later.
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray(values), dtype=torch.float32).to(device)


@dataclasses.dataclass(frozen=True)
class QuantState:
    """Scales and shape of one 4-bit tensor, named as in bitsandbytes.

    absmax: fp32 [nblocks], or uint8 [nblocks] with double quantization (then `nested` is set
    and a block's scale is `nested.map[absmax] * nested.absmax[i // 256] + offset`, in fp32).
    offset: the fp32 mean of all scales, as a float; 0.0 without double quantization.
    blocksize: weights per scale. quant_type: "nf4", "fp4" or "int4".
    shape, dtype: of the tensor before quantization.
    """

    absmax: Tensor
    nested: Nested | None
    offset: float
    blocksize: int
    quant_type: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def scale_args(self) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
        """(absmax, nested_absmax, nested_map, offset): the order every kernel takes them in."""
        if self.nested is None:
            return self.absmax, None, None, 0.0
        return self.absmax, self.nested.absmax, self.nested.map, self.offset

    def to(self, device: torch.device | str) -> QuantState:
        """The same state on `device`; dtypes never change."""
        nested = self.nested and self.nested.to(device)
        return dataclasses.replace(self, absmax=self.absmax.to(device), nested=nested)

    def as_tensors(self, prefix: str) -> dict[str, Tensor]:
        """The bitsandbytes tensors that stand beside `prefix` (e.g. "...q_proj.weight").

        Raises CheckpointError for int4, which bitsandbytes' format does not have.
        """
        if self.quant_type not in FILE_QUANT_TYPES:
            raise CheckpointError(
                f"{prefix}: quant_type {self.quant_type!r} has no on-disk format; expected one of "
                f"{FILE_QUANT_TYPES}. Hint: quantize with quant_type='nf4' to save"
            )
        tensors = {
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": _codebook(self.quant_type),
        }
        if self.nested is not None:
            tensors[f"{prefix}.nested_absmax"] = self.nested.absmax
            tensors[f"{prefix}.nested_quant_map"] = self.nested.map.clone()
        blob = json.dumps(self._json()).encode()
        tensors[f"{prefix}.quant_state.bitsandbytes__{self.quant_type}"] = torch.tensor(
            list(blob), dtype=torch.uint8, device="cpu"
        )
        return tensors

    def _json(self) -> dict[str, object]:
        """The blob's fields in bitsandbytes' order."""
        fields: dict[str, object] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        if self.nested is not None:
            fields["nested_blocksize"] = NESTED_BLOCKSIZE
            fields["nested_dtype"] = "float32"
            fields["nested_offset"] = self.offset
        return fields

    @classmethod
    def from_tensors(cls, prefix: str, tensors: dict[str, Tensor]) -> QuantState:
        """Read the tensors that `as_tensors` (or bitsandbytes) wrote under `prefix`.

        Raises CheckpointError naming the tensor that is missing or does not fit.
        """
        fields = _read_blob(prefix, tensors)
        blocksize, quant_type = fields["blocksize"], fields["quant_type"]
        shape = tuple(fields["shape"])
        nblocks = -(-math.prod(shape) // blocksize)
        absmax_dtype = torch.uint8 if _is_nested(prefix, tensors) else torch.float32
        absmax = _take(tensors, f"{prefix}.absmax", absmax_dtype, nblocks)
        _check_codebook(prefix, tensors, quant_type)
        nested = None
        if _is_nested(prefix, tensors):
            count = -(-nblocks // NESTED_BLOCKSIZE)
            nested = Nested(
                _take(tensors, f"{prefix}.nested_absmax", torch.float32, count),
                _take(tensors, f"{prefix}.nested_quant_map", torch.float32, 256),
            ).to(absmax.device)
        offset = float(fields["nested_offset"]) if nested else 0.0
        dtype = getattr(torch, fields["dtype"])
        return cls(absmax, nested, offset, blocksize, quant_type, shape, dtype)


def _is_nested(prefix: str, tensors: dict[str, Tensor]) -> bool:
    return f"{prefix}.nested_absmax" in tensors


def _read_blob(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Parse and check the one JSON blob of a quantized tensor."""
    marker = f"{prefix}.quant_state.bitsandbytes__"
    keys = [key for key in tensors if key.startswith(marker)]
    if len(keys) != 1:
        raise CheckpointError(
            f"{prefix}: expected exactly one tensor {marker}nf4 or {marker}fp4, got {keys}"
        )
    key = keys[0]
    fields = _parse_blob(key, tensors[key])
    checks = BLOB_FIELDS | (NESTED_FIELDS if _is_nested(prefix, tensors) else {})
    for name, (expected, fits) in checks.items():
        if not fits(fields.get(name)):
            raise CheckpointError(
                f"{key}: {name}: expected {expected}, got {_cut(fields.get(name, 'none'))}"
            )
    if key != marker + fields["quant_type"]:
        raise CheckpointError(f"{key}: quant_type: expected its name's, got {fields['quant_type']}")
    return fields


def _parse_blob(key: str, blob: Tensor) -> dict[str, Any]:
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise CheckpointError(f"{key}: expected uint8 [n], got {blob.dtype} {list(blob.shape)}")
    try:
        fields = json.loads(bytes(blob.tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{key}: not a bitsandbytes quant state: {error!r}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{key}: expected a JSON object, got {_cut(fields)}")
    return fields


def _cut(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _is_shape(value: Any) -> bool:
    sizes = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    return sizes and math.prod(value) < 1 << 63


def _is_fp32(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max


# Field of the blob -> what it must be, in words and as a test. JSON's true and 64.0 are no sizes.
Check = tuple[str, Callable[[Any], bool]]
BLOB_FIELDS: dict[str, Check] = {
    "quant_type": (f"one of {FILE_QUANT_TYPES}", lambda v: v in FILE_QUANT_TYPES),
    "blocksize": (f"one of {BLOCKSIZES}", lambda v: type(v) is int and v in BLOCKSIZES),
    "dtype": ("a float dtype", lambda v: v in ("float32", "float16", "bfloat16")),
    "shape": ("a list of sizes", _is_shape),
}
NESTED_FIELDS: dict[str, Check] = {
    "nested_blocksize": (f"{NESTED_BLOCKSIZE}", lambda v: type(v) is int and v == NESTED_BLOCKSIZE),
    "nested_dtype": ("'float32'", lambda v: v == "float32"),
    "nested_offset": ("a finite fp32 number", _is_fp32),
}


def _take(tensors: dict[str, Tensor], key: str, dtype: torch.dtype, numel: int) -> Tensor:
    """One stored tensor, checked against what the shape and block size imply."""
    if key not in tensors:
        raise CheckpointError(f"{key}: missing from the checkpoint")
    tensor = tensors[key]
    if tensor.dtype != dtype or tensor.numel() != numel:
        raise CheckpointError(
            f"{key}: expected {dtype} [{numel}], got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


def _codebook(quant_type: str) -> Tensor:
    return torch.tensor(_core.codebook(quant_type), dtype=torch.float32, device="cpu")


def _check_codebook(prefix: str, tensors: dict[str, Tensor], quant_type: str) -> None:
    """The kernels hold the codebook as constants, so another one must not pass unnoticed."""
    stored = _take(tensors, f"{prefix}.quant_map", torch.float32, 16).tolist()
    if stored != _codebook(quant_type).tolist():
        raise CheckpointError(
            f"{prefix}.quant_map: expected the {quant_type} codebook, got {stored}"
        )
