"""Typed reading of config.json: a field of another type is named, never computed with."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from halfbyte.errors import UnsupportedModelError

# No size of a real model comes near, and products of two still fit 64 bits.
MAX_SIZE = 1 << 31


def unsupported(name: str, expected: str, got: object) -> NoReturn:
    raise UnsupportedModelError(f"config field {name}: expected {expected}, got {got!r:.200}")


def size(raw: Mapping[str, Any], name: str, missing: int | None = None, least: int = 1) -> int:
    """An integer of `least` or more; `missing` stands for an absent field, but not for null."""
    value = raw.get(name, missing)
    if type(value) is not int or not least <= value < MAX_SIZE:
        expected = "a positive integer" if least == 1 else f"an integer of {least} or more"
        unsupported(name, expected, value)
    return value


def number(
    raw: Mapping[str, Any], name: str, missing: float | None = None, inside: str = ""
) -> float:
    """A positive, finite number; `missing` stands for an absent field, but not for null."""
    value = raw.get(name, missing)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        unsupported(f"{name} of {inside}" if inside else name, "a positive number", value)
    return float(value)


def flag(raw: Mapping[str, Any], name: str, missing: bool = False) -> bool:
    """true or false; null counts as absent."""
    value = raw.get(name)
    if value is not None and type(value) is not bool:
        unsupported(name, "true or false", value)
    return missing if value is None else value


def mapping(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object; null counts as absent, and absent as empty."""
    value = raw.get(name)
    if value is not None and not isinstance(value, Mapping):
        unsupported(name, "an object", value)
    return dict(value or {})


def token_ids(value: Any, name: str = "eos_token_id") -> tuple[int, ...]:
    """A token id field, which may be absent, one id or a list, as a tuple."""
    if value is None:
        return ()
    ids = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(type(token) is int and 0 <= token < MAX_SIZE for token in ids):
        unsupported(name, "token ids of 0 or more", value)
    return ids
