"""What a config.json says about a decoder, checked and in one spelling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from halfbyte.errors import UnsupportedModelError
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
        layers = _size(raw, "num_hidden_layers")
        heads = _size(raw, "num_attention_heads")
        kv_heads = _size(raw, "num_key_value_heads", family.num_key_value_heads or heads, heads)
        if heads % kv_heads:
            _unsupported("num_key_value_heads", f"a divisor of {heads} attention heads", kv_heads)
        context = _size(raw, "max_position_embeddings", family.max_position_embeddings)
        return cls(
            model_type=model_type,
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=_size(raw, "hidden_size"),
            intermediate_size=_size(raw, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_head_dim(raw, family, heads),
            max_position_embeddings=context,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=RopeConfig.from_dict(raw, context),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=_flag(raw, family.qkv_bias),
            o_bias=_flag(raw, family.o_bias),
            mlp_bias=_flag(raw, family.mlp_bias),
            qk_norm=family.qk_norm,
            attention_dropout=float(raw.get("attention_dropout") or 0.0),
            sliding_windows=_sliding_windows(raw, model_type, layers),
            bos_token_id=_first_id(raw.get("bos_token_id")),
            eos_token_ids=token_ids(raw.get("eos_token_id")),
            pad_token_id=_first_id(raw.get("pad_token_id")),
            dtype=raw.get("dtype") or raw.get("torch_dtype"),
            raw=dict(raw),
        )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A config's token id field, which may be absent, one id or a list, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _unsupported(name: str, expected: str, got: object) -> NoReturn:
    raise UnsupportedModelError(f"config field {name}: expected {expected}, got {got!r}")


def _model_type(raw: Mapping[str, Any]) -> str:
    by_architecture = {family.architecture: name for name, family in FAMILIES.items()}
    architectures = raw.get("architectures") or []
    for architecture in architectures:
        if architecture not in by_architecture:
            _unsupported("architectures", f"one of {', '.join(by_architecture)}", architecture)
    named = by_architecture[architectures[0]] if architectures else None
    model_type = raw.get("model_type", named)
    if model_type not in FAMILIES:
        _unsupported("model_type", f"one of {', '.join(FAMILIES)}", model_type)
    if named not in (None, model_type):
        _unsupported("model_type", f"{named!r} as in architectures", model_type)
    return model_type


def _check_neutral(raw: Mapping[str, Any]) -> None:
    for name, neutral in NEUTRAL.items():
        if raw.get(name) not in neutral:
            _unsupported(name, " or ".join(map(repr, neutral)), raw[name])
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        _unsupported("hidden_act", "'silu'", activation)


def _size(raw: Mapping[str, Any], name: str, missing: int | None = None, null: int = 0) -> int:
    """A positive integer; `missing` stands for an absent field, `null` for an explicit null."""
    value = raw.get(name, missing)
    if value is None and null:
        return null
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _unsupported(name, "a positive integer", value)
    return value


def _head_dim(raw: Mapping[str, Any], family: Family, heads: int) -> int:
    head_dim = raw.get("head_dim", family.head_dim)
    hidden = _size(raw, "hidden_size")
    if head_dim is None:
        if hidden % heads:
            _unsupported("hidden_size", f"a multiple of {heads} attention heads", hidden)
        head_dim = hidden // heads
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        _unsupported("head_dim", "an even positive integer", head_dim)
    return head_dim


def _flag(raw: Mapping[str, Any], rule: bool | str) -> bool:
    """A family's own answer, or the config field that it leaves the answer to."""
    return bool(raw.get(rule, False)) if isinstance(rule, str) else rule


def _sliding_windows(
    raw: Mapping[str, Any], model_type: str, layers: int
) -> tuple[int | None, ...]:
    """The attention window of each layer in tokens, None where it attends to everything."""
    window = raw.get("sliding_window", 4096)
    switched_off = model_type.startswith("qwen") and not raw.get("use_sliding_window", False)
    if model_type == "llama" or switched_off:
        window = None
    types = _layer_types(raw, model_type, layers, window)
    if SLIDING in types and (not isinstance(window, int) or window < 1):
        _unsupported("sliding_window", "a positive integer for its sliding layers", window)
    return tuple(window if kind == SLIDING else None for kind in types)


def _layer_types(
    raw: Mapping[str, Any], model_type: str, layers: int, window: int | None
) -> list[str]:
    first = raw.get("max_window_layers", 28) if model_type.startswith("qwen") else 0
    derived = [FULL if window is None or i < first else SLIDING for i in range(layers)]
    types = raw.get("layer_types") or derived
    if len(types) != layers or set(types) - {FULL, SLIDING}:
        _unsupported("layer_types", f"{layers} of {FULL!r} or {SLIDING!r}", types)
    if not model_type.startswith("qwen") and types != derived:
        _unsupported("layer_types", f"{derived} for {model_type}", types)
    return types


def _first_id(value: int | list[int] | None) -> int | None:
    ids = token_ids(value)
    return ids[0] if ids else None
