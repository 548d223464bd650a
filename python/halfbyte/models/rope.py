"""Rotary position embeddings: default, linear, llama3 and yarn."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.models.fields import flag, mapping, number, size, unsupported

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_FIELDS = {
    "type",
    "rope_type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
    "finetuned",
}


@dataclass(frozen=True)
class RopeConfig:
    """Rope parameters of one model, whichever way its config.json spells them."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], max_position_embeddings: int) -> "RopeConfig":
        """Read `rope_theta` + `rope_scaling` (older) or `rope_parameters` of a config.json.

        Raises UnsupportedModelError for an unknown rope type, an unknown or missing field.
        """
        fields = mapping(raw, "rope_parameters") | mapping(raw, "rope_scaling")
        _check_known(fields)
        rope_type = fields.get("rope_type") or fields.get("type") or "default"
        if rope_type not in ROPE_TYPES:
            unsupported("rope_type", f"one of {', '.join(ROPE_TYPES)}", rope_type)
        original = _original_context(raw, fields, max_position_embeddings)
        if rope_type == "yarn" and fields.get("factor") is None:
            fields["factor"] = max_position_embeddings / original
        rope = cls(
            rope_type=rope_type,
            rope_theta=_number(fields, "rope_theta", raw.get("rope_theta", 10000.0)),
            factor=_number(fields, "factor", 1.0 if rope_type == "default" else None),
            original_max_position_embeddings=original,
            low_freq_factor=_number(fields, "low_freq_factor", _llama3_only(rope_type, 1.0)),
            high_freq_factor=_number(fields, "high_freq_factor", _llama3_only(rope_type, 4.0)),
            attention_factor=_attention_factor(fields) if rope_type == "yarn" else 1.0,
            beta_fast=_or_null(fields, "beta_fast", 32.0),
            beta_slow=_or_null(fields, "beta_slow", 1.0),
            truncate=flag(fields, "truncate", True),
        )
        _check_divisors(rope)
        return rope


def _original_context(raw: Mapping[str, Any], fields: Mapping[str, Any], longest: int) -> int:
    """The top level wins; null and 0 count as absent."""
    name = "original_max_position_embeddings"
    place = next((place for place in (raw, fields) if place.get(name)), {})
    return size(place, name, longest)


def _or_null(fields: Mapping[str, Any], name: str, missing: float) -> float:
    """A positive number; null and 0 count as absent, as in transformers."""
    return _number(fields, name) if fields.get(name) else missing


def _check_divisors(rope: RopeConfig) -> None:
    """What the formulas divide by: the width of llama3's ramp, the logarithm of theta."""
    if rope.rope_theta <= 1:
        unsupported("rope_theta", "more than 1", rope.rope_theta)
    if rope.rope_type == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        expected = f"more than low_freq_factor {rope.low_freq_factor}"
        unsupported("high_freq_factor", expected, rope.high_freq_factor)


def _check_known(fields: Mapping[str, Any]) -> None:
    if unknown := sorted(set(fields) - ROPE_FIELDS):
        expected = f"only {', '.join(sorted(ROPE_FIELDS))}"
        unsupported("rope_parameters", expected, ", ".join(unknown))
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        expected = "1.0 (the whole head is rotated)"
        unsupported("partial_rotary_factor", expected, fields["partial_rotary_factor"])


def _number(fields: Mapping[str, Any], name: str, missing: float | None = None) -> float:
    return number(fields, name, missing, "rope_parameters")


def _llama3_only(rope_type: str, unused: float) -> float | None:
    return None if rope_type == "llama3" else unused


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(fields: Mapping[str, Any]) -> float:
    """Scale of cos and sin, YaRN (arXiv 2309.00071) section 3.4."""
    if fields.get("attention_factor") is not None:
        return _number(fields, "attention_factor")
    factor = _number(fields, "factor")
    if fields.get("mscale") and fields.get("mscale_all_dim"):
        scales = (_number(fields, name) for name in ("mscale", "mscale_all_dim"))
        mscale, all_dim = (_mscale(factor, scale) for scale in scales)
        return mscale / all_dim
    return _mscale(factor)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """fp32 [head_dim / 2] angular frequencies, radians per position, on the CPU."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / rope.rope_theta**exponent
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    if rope.rope_type == "yarn":
        return _yarn(frequencies, rope, head_dim)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's rule: long waves are divided by `factor`, short ones kept, a ramp between."""
    waves = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    ramp = (waves - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * frequencies / rope.factor + ramp * frequencies


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN's "NTK by parts", arXiv 2309.00071 section 3.2."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((index - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


class RotaryEmbedding(nn.Module):
    """cos and sin of the positions of one forward."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        frequencies = inverse_frequencies(rope, head_dim)
        # A plain attribute, not a buffer: `.to(bfloat16)` would round it and `meta` would lose it.
        self.inv_freq = torch.cat((-frequencies, frequencies))
        self.attention_factor = rope.attention_factor

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions int64 [B or 1, T] -> cos, sin [B or 1, T, 1, head_dim] in `dtype`.

        The first half of sin is negated, so that a rotation is x cos + x.roll(head_dim / 2) sin.
        """
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        # Few operations: in a decode step on a CPU each has to be fetched from memory.
        angles = positions[:, :, None, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(dtype), sin.to(dtype)
