"""The parts of bitsandbytes' 4-bit folder format that lie outside one layer's tensors."""

from __future__ import annotations

import re
from typing import Any

from halfbyte.errors import CheckpointError

COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE = "quant_state.bitsandbytes__"
# `bnb_4bit_quant_storage`: the dtypes under which the packed bytes may be stored.
STORAGE_DTYPES = ("U8", "BF16", "F16", "F32")


def quantization_config(config: dict[str, Any], location: str) -> dict[str, Any] | None:
    """The bitsandbytes 4-bit settings of a config.json; None when it is not quantized.

    Raises CheckpointError for another method or for bitsandbytes' 8-bit mode.
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    if not isinstance(stored, dict):
        raise CheckpointError(
            f"{location}: quantization_config: expected a JSON object, got {stored!r}"
        )
    # The first 4-bit configs named no method, as there was but this one.
    method = stored.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise CheckpointError(
            f"{location}: quantization_config.quant_method: expected 'bitsandbytes', got "
            f"{method!r}. Hint: use the unquantized model, halfbyte quantizes it while loading"
        )
    if stored.get("load_in_8bit") or not stored.get("load_in_4bit"):
        raise CheckpointError(
            f"{location}: quantization_config: expected load_in_4bit, got load_in_8bit = "
            f"{stored.get('load_in_8bit')!r}, load_in_4bit = {stored.get('load_in_4bit')!r}. "
            "Hint: use the unquantized model or its 4-bit version"
        )
    _check_skip_modules(stored.get("llm_int8_skip_modules"), location)
    return stored


def _check_skip_modules(patterns: Any, location: str) -> None:
    fits = patterns is None or isinstance(patterns, list)
    if not fits or not all(map(_is_pattern, patterns or ())):
        raise CheckpointError(
            f"{location}: quantization_config.llm_int8_skip_modules: expected null or a list of "
            f"module names or patterns, got {patterns!r}"
        )


def _is_pattern(pattern: Any) -> bool:
    try:
        return isinstance(pattern, str) and bool(re.compile(pattern))
    except (re.error, OverflowError, RecursionError):
        return False


def new_quantization_config(quant_type: str, double_quant: bool, dtype: str) -> dict[str, Any]:
    """What transformers writes into config.json for a model quantized to 4 bits."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def is_skipped(module: str, stored: dict[str, Any]) -> bool:
    """Whether `llm_int8_skip_modules` leaves the module in 16 bits, by transformers' rule.

    A pattern matches from the start of the path up to a component's end, or as a suffix; without
    a list it is the head that is left.
    """
    patterns = stored.get("llm_int8_skip_modules")
    if patterns is None:
        patterns = ["lm_head"]
    return any(
        re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module) or module.endswith(pattern)
        for pattern in patterns
    )


def companion_of(name: str) -> str | None:
    """The packed weight that the tensor `name` belongs to: "P.weight" of "P.weight.absmax"."""
    weight, dot, part = name.partition(".weight.")
    known = part in COMPANIONS or part in (f"{STATE}nf4", f"{STATE}fp4")
    return f"{weight}.weight" if dot and known else None
