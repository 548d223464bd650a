"""What a config.json says about a decoder, checked and in one spelling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from halfbyte.models.fields import flag, number, size, token_ids, unsupported
from halfbyte.models.rope import RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """How one model_type differs; the defaults are those of its class in transformers."""

    architecture: str
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    head_dim: int | None
    num_key_value_heads: int | None
    max_position_embeddings: int


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", "attention_bias", "attention_bias", "mlp_bias", False, None, None, 2048
    ),
    "mistral": Family("MistralForCausalLM", False, False, False, False, None, 8, 131072),
    "qwen2": Family("Qwen2ForCausalLM", True, False, False, False, None, 32, 32768),
    "qwen3": Family(
        "Qwen3ForCausalLM", "attention_bias", "attention_bias", False, True, 128, 32, 32768
    ),
}

# Fields of other architectures that change the arithmetic, with the values that do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "use_mrope": (None, False),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "is_encoder_decoder": (None, False),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a decoder; `raw` is the config.json it was read from."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    attention_dropout: float
    sliding_windows: tuple[int | None, ...]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str | None
    raw: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "DecoderConfig":
        """Read a transformers config.json, of version 4 or 5.

        Raises UnsupportedModelError, naming the field, expected and got, for an architecture,
        activation, rope type or field value that this decoder does not compute.
        """
        model_type = _model_type(raw)
        family = FAMILIES[model_type]
        _check_neutral(raw)
        layers = size(raw, "num_hidden_layers")
        heads = size(raw, "num_attention_heads")
        context = size(raw, "max_position_embeddings", family.max_position_embeddings)
        return cls(
            model_type=model_type,
            vocab_size=size(raw, "vocab_size"),
            hidden_size=size(raw, "hidden_size"),
            intermediate_size=size(raw, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_kv_heads(raw, family, heads),
            head_dim=_head_dim(raw, family, heads),
            max_position_embeddings=context,
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
            rope=RopeConfig.from_dict(raw, context),
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            qkv_bias=_flag(raw, family.qkv_bias),
            o_bias=_flag(raw, family.o_bias),
            mlp_bias=_flag(raw, family.mlp_bias),
            qk_norm=family.qk_norm,
            attention_dropout=_dropout(raw),
            sliding_windows=_sliding_windows(raw, model_type, layers),
            bos_token_id=_first_id(raw, "bos_token_id"),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
            pad_token_id=_first_id(raw, "pad_token_id"),
            dtype=_dtype(raw),
            raw=dict(raw),
        )


def _model_type(raw: Mapping[str, Any]) -> str:
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        unsupported("architectures", "a list", architectures)
    for architecture in architectures:
        if architecture not in tuple(by_architecture):
            unsupported("architectures", f"one of {', '.join(by_architecture)}", architecture)
    named = by_architecture[architectures[0]] if architectures else None
    model_type = raw.get("model_type", named)
    if model_type not in tuple(FAMILIES):
        unsupported("model_type", f"one of {', '.join(FAMILIES)}", model_type)
    if named not in (None, model_type):
        unsupported("model_type", f"{named!r} as in architectures", model_type)
    return model_type


def _check_neutral(raw: Mapping[str, Any]) -> None:
    for name, neutral in NEUTRAL.items():
        if raw.get(name) not in neutral:
            unsupported(name, " or ".join(map(repr, neutral)), raw[name])
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        unsupported("hidden_act", "'silu'", activation)


def _kv_heads(raw: Mapping[str, Any], family: Family, heads: int) -> int:
    """Null means one for each head, as in transformers; absent means the family's default."""
    if raw.get("num_key_value_heads", 0) is None:
        return heads
    kv_heads = size(raw, "num_key_value_heads", family.num_key_value_heads or heads)
    if heads % kv_heads:
        unsupported("num_key_value_heads", f"a divisor of {heads} attention heads", kv_heads)
    return kv_heads


def _head_dim(raw: Mapping[str, Any], family: Family, heads: int) -> int:
    head_dim = raw.get("head_dim", family.head_dim)
    hidden = size(raw, "hidden_size")
    if head_dim is None:
        if hidden % heads:
            unsupported("hidden_size", f"a multiple of {heads} attention heads", hidden)
        head_dim = hidden // heads
    if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
        unsupported("head_dim", "an even positive integer", head_dim)
    return head_dim


def _dropout(raw: Mapping[str, Any]) -> float:
    value = raw.get("attention_dropout")
    if value is not None and (type(value) not in (int, float) or not 0 <= value < 1):
        unsupported("attention_dropout", "a number from 0 to below 1", value)
    return float(value or 0.0)


def _dtype(raw: Mapping[str, Any]) -> str | None:
    value = raw.get("dtype") or raw.get("torch_dtype")
    if value is not None and not isinstance(value, str):
        unsupported("dtype", "a name such as 'bfloat16'", value)
    return value


def _flag(raw: Mapping[str, Any], rule: bool | str) -> bool:
    """A family's own answer, or the config field that it leaves the answer to."""
    return flag(raw, rule) if isinstance(rule, str) else rule


def _sliding_windows(
    raw: Mapping[str, Any], model_type: str, layers: int
) -> tuple[int | None, ...]:
    """The attention window of each layer in tokens, None where it attends to everything."""
    window = raw.get("sliding_window", 4096)
    switched_off = model_type.startswith("qwen") and not flag(raw, "use_sliding_window")
    if model_type == "llama" or switched_off:
        window = None
    types = _layer_types(raw, model_type, layers, window)
    if SLIDING in types and (type(window) is not int or window < 1):
        unsupported("sliding_window", "a positive integer for its sliding layers", window)
    return tuple(window if kind == SLIDING else None for kind in types)


def _layer_types(
    raw: Mapping[str, Any], model_type: str, layers: int, window: int | None
) -> list[str]:
    first = size(raw, "max_window_layers", 28, 0) if model_type.startswith("qwen") else 0
    derived = [FULL if window is None or i < first else SLIDING for i in range(layers)]
    types = raw.get("layer_types") or derived
    known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
    if not known or len(types) != layers:
        unsupported("layer_types", f"{layers} of {FULL!r} or {SLIDING!r}", types)
    if not model_type.startswith("qwen") and types != derived:
        unsupported("layer_types", f"{derived} for {model_type}", types)
    return types


def _first_id(raw: Mapping[str, Any], name: str) -> int | None:
    ids = token_ids(raw.get(name), name)
    return ids[0] if ids else None
