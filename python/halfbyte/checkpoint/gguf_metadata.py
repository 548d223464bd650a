"""The metadata of a GGUF file: the library's reader with its bounds and types checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFReader


class Metadata:
    """Typed access to the key-value part of the GGUF file `path`.

    A key that starts with a dot stands below the architecture's name. Each method raises
    CheckpointError, naming file and key, for a value of another type, and without `default` for
    an absent one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = open_reader(path)
        self.architecture = self.text("general.architecture")

    def text(self, key: str, default: str | None = None) -> str:
        return self._value(key, default, "a string", lambda value: isinstance(value, str))

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of `least` or more."""
        expected = f"an integer of at least {least}"
        return self._value(key, default, expected, lambda v: type(v) is int and v >= least)

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        return self._value(key, default, "a positive number", _is_positive)

    def value(self, key: str, default: Any) -> Any:
        """A value of whatever type."""
        return self._value(key, default, "a value", lambda value: not isinstance(value, Exception))

    def token_id(self, name: str) -> int | None:
        """`tokenizer.ggml.<name>`, None if absent."""
        key = f"tokenizer.ggml.{name}"
        return self.count(key, least=0) if key in self.reader.fields else None

    def _value(self, key: str, default: Any, expected: str, fits: Callable[[Any], bool]) -> Any:
        name = f"{self.architecture}{key}" if key.startswith(".") else key
        field = self.reader.fields.get(name)
        try:
            value = default if field is None else field.contents()
        except ValueError as error:
            value = error
        if not fits(value):
            raise CheckpointError(
                f"{self.path}: metadata {name}: expected {expected}, got {value!r:.200}"
            )
        return value


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def open_reader(path: Path) -> GGUFReader:
    try:
        reader = _strict_reader()(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: expected a GGUF file, got {path.stat().st_size} bytes that the gguf library "
            f"cannot read ({error}). Hint: the file is truncated or corrupt, download it again"
        ) from error
    if reader.endianess.name != "LITTLE":
        raise CheckpointError(
            f"{path}: expected a little-endian GGUF file, got a big-endian one. "
            "Hint: convert it with gguf's `gguf-convert-endian FILE little`"
        )
    return reader


def _strict_reader() -> type[GGUFReader]:
    """The library's reader, stopped where a damaged file would send it past the end."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    class StrictReader(GGUFReader):
        @property  # type: ignore[override]
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, value: np.ndarray) -> None:
            # Each slice of a memmap costs three times that of a plain array.
            self._data = np.asarray(value)

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            values = super()._get(offset, dtype, count, *order, **named)
            if len(values) < count:
                raise ValueError(f"it ends within the value at byte {offset}")
            return values

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            for field in fields:
                _, name, _, sizes, kind, offset = field.parts
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
                nbytes = math.prod(sizes.tolist()) // block * size
                end = start_offs + int(offset[0]) + nbytes
                if end > len(self.data):
                    raise CheckpointError(
                        f"tensor {bytes(name).decode()}: expected data up to byte {end}, got a "
                        f"file of {len(self.data)} bytes. Hint: the file is truncated, download "
                        "it again"
                    )
            super()._build_tensors(start_offs, fields)

    return StrictReader
