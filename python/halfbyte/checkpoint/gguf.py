"""A GGUF file of the llama, qwen2 or qwen3 architecture, read as a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.checkpoint.gguf_metadata import Metadata
from halfbyte.checkpoint.source import Source, Staging, StoredTensor
from halfbyte.errors import CheckpointError, UnsupportedModelError
from halfbyte.models.rope import RopeConfig, inverse_frequencies
from halfbyte.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gguf import ReaderTensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that change the arithmetic, with the values that do not: 0 stands for unset.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    ".logit_scale": (0, 1),
    ".residual_scale": (0, 1),
    ".embedding_scale": (0, 1),
    ".attention.scale": (0,),
    ".attention.clamp_kqv": (0,),
    ".attention.max_alibi_bias": (0,),
    ".attention.causal": (True,),
    ".attn_logit_softcapping": (0,),
    ".final_logit_softcapping": (0,),
    ".use_parallel_residual": (False,),
}
ROPE_FACTORS = "rope_freqs.weight"
INTEGER_TYPES = ("I8", "I16", "I32", "I64", "F64")
# The decoded fp32 piece and the library's temporaries are several times the bytes read.
PIECE_BYTES = 1 << 20


class GGUF(Source):
    """A .gguf file; tensors are dequantized to fp32 by the gguf library, piece by piece.

    Raises CheckpointError for a damaged file, UnsupportedModelError for another architecture or
    rope scaling.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGMLQuantizationType

        self.location = str(path)
        self.metadata = Metadata(path)
        self._check_architecture()
        self._check_arithmetic()
        self.types = {kind.name: kind for kind in GGMLQuantizationType}
        self.float_dtypes = tuple(t.name for t in GGMLQuantizationType if _decodes(t))
        self.tensors = self._tensors(path)
        self.config = self._config()
        self.generation_config = self._generation_config()

    def pieces(self, tensor: StoredTensor, staging: Staging) -> Iterator[Tensor]:
        from gguf import GGML_QUANT_SIZES
        from gguf.quants import dequantize

        kind = self.types[tensor.dtype]
        unit = GGML_QUANT_SIZES[kind][1]
        for part in staging.read(tensor, unit, PIECE_BYTES):
            yield torch.from_numpy(dequantize(part.numpy(), kind))

    def read(
        self, tensor: StoredTensor, dtype: torch.dtype, device: torch.device, staging: Staging
    ) -> Tensor:
        value = super().read(tensor, dtype, device, staging)
        heads = self._interleaved_heads(tensor.name)
        return value if heads is None else _undo_rope_permutation(value, heads)

    def tokenizer(self) -> Tokenizer | None:
        if "tokenizer.ggml.tokens" not in self.metadata.reader.fields:
            return None
        return Tokenizer.from_gguf(self.metadata.reader)

    def _check_architecture(self) -> None:
        metadata = self.metadata
        if metadata.count("split.count", 1) > 1:
            raise CheckpointError(
                f"{self.location}: expected a whole model, got one of "
                f"{metadata.count('split.count')} parts. "
                "Hint: join them with llama.cpp's `gguf-split --merge`"
            )
        architecture = metadata.architecture
        experts = metadata.count(".expert_count", 0, least=0) > 0
        if architecture not in ARCHITECTURES or experts:
            raise UnsupportedModelError(
                f"{self.location}: general.architecture: expected one of "
                f"{', '.join(ARCHITECTURES)}, got {architecture!r}{' with experts' * experts}"
            )

    def _check_arithmetic(self) -> None:
        metadata = self.metadata
        for key, neutral in NEUTRAL.items():
            self._refuse_unless(key, metadata.value(key, neutral[0]) in neutral, neutral[-1])
        context = metadata.count(".context_length")
        window = metadata.value(".attention.sliding_window", 0)
        unseen = type(window) is int and (window == 0 or window >= context)
        self._refuse_unless(".attention.sliding_window", unseen, f"none below {context} tokens")

    def _refuse_unless(self, key: str, neutral: bool, expected: object) -> None:
        if not neutral:
            raise UnsupportedModelError(
                f"{self.location}: metadata {self.metadata.architecture}{key}: expected "
                f"{expected}, got {self.metadata.value(key, None)!r:.200}"
            )

    def _tensors(self, path: Path) -> list[StoredTensor]:
        found = self.metadata.reader.tensors
        stored = [_stored(path, tensor) for tensor in found if tensor.name != ROPE_FACTORS]
        return sorted(stored, key=lambda tensor: tensor.offset)

    def _interleaved_heads(self, name: str) -> int | None:
        """Heads of a tensor whose rows ggml's llama rope wants permuted; None for the others."""
        if self.metadata.architecture != "llama":
            return None
        if ".q_proj." in name:
            return self.config["num_attention_heads"]
        return self.config["num_key_value_heads"] if ".k_proj." in name else None

    def _config(self) -> dict[str, Any]:
        shapes = {tensor.name: tensor.shape for tensor in self.tensors}
        if len(shapes.get("model.embed_tokens.weight", ())) != 2:
            raise CheckpointError(f"{self.location}: expected a matrix token_embd.weight, got none")
        metadata = self.metadata
        heads, hidden = metadata.count(".attention.head_count"), metadata.count(".embedding_length")
        head_dim = metadata.count(".attention.key_length", max(1, hidden // heads))
        values = metadata.count(".attention.value_length", head_dim)
        self._refuse_unless(".attention.value_length", values == head_dim, head_dim)
        config = {
            "architectures": [ARCHITECTURES[metadata.architecture]],
            "model_type": metadata.architecture,
            "vocab_size": shapes["model.embed_tokens.weight"][0],
            "hidden_size": hidden,
            "intermediate_size": metadata.count(".feed_forward_length"),
            "num_hidden_layers": metadata.count(".block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.count(".attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": metadata.count(".context_length"),
            "rms_norm_eps": _shortest(metadata.number(".attention.layer_norm_rms_epsilon", 1e-6)),
            "hidden_act": "silu",
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
            "tie_word_embeddings": "lm_head.weight" not in shapes,
            "bos_token_id": metadata.token_id("bos_token_id"),
            "eos_token_id": metadata.token_id("eos_token_id"),
            "pad_token_id": metadata.token_id("padding_token_id"),
            "use_cache": True,
            "initializer_range": 0.02,
        }
        return config | self._rope(head_dim)

    def _rope(self, head_dim: int) -> dict[str, Any]:
        rotated = self.metadata.count(".rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise UnsupportedModelError(
                f"{self.location}: rope.dimension_count: expected {head_dim}, the whole head, "
                f"got {rotated}"
            )
        theta = float(self.metadata.number(".rope.freq_base", 10000.0))
        return {"rope_theta": theta, "rope_scaling": self._rope_scaling(theta, head_dim)}

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        metadata = self.metadata
        factors = next((t for t in metadata.reader.tensors if t.name == ROPE_FACTORS), None)
        if factors is not None:
            stored = torch.from_numpy(np.array(factors.data, dtype=np.float32))
            return self._llama3_scaling(stored, theta, head_dim)
        kind = metadata.text(".rope.scaling.type", "none")
        if kind == "none":
            return None
        attention = metadata.number(".rope.scaling.attn_factor", 1.0)
        if kind not in ("linear", "yarn") or attention != 1:
            raise UnsupportedModelError(
                f"{self.location}: rope.scaling.type: expected none, linear or yarn with an "
                f"attn_factor of 1, got {kind!r} with {attention:g}"
            )
        factor = float(metadata.number(".rope.scaling.factor"))
        scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            original = metadata.count(".rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = original
        return scaling

    def _llama3_scaling(
        self, factors: Tensor, theta: float, head_dim: int
    ) -> dict[str, Any] | None:
        """Llama 3's rope parameters from what they were turned into: a divisor per frequency.

        All published models share three of the four parameters, and the result is checked.
        """
        factor = float(factors.max())
        if factor == 1.0:
            return None
        scaling: dict[str, Any] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        plain = inverse_frequencies(RopeConfig(rope_theta=theta), head_dim)
        scaled = inverse_frequencies(RopeConfig(rope_theta=theta, **scaling), head_dim)
        if factors.shape != plain.shape or not torch.allclose(factors, plain / scaled, rtol=1e-3):
            raise UnsupportedModelError(
                f"{self.location}: tensor {ROPE_FACTORS}: expected the factors of Llama 3's rope "
                f"scaling by {factor:g} from 8192 tokens, got others"
            )
        return scaling

    def _generation_config(self) -> dict[str, Any]:
        ends = ("eos_token_id", "eot_token_id", "eom_token_id")
        ids = [self.metadata.token_id(name) for name in ends]
        eos = list(dict.fromkeys(i for i in ids if i is not None))
        fields = {
            "bos_token_id": self.config["bos_token_id"],
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": self.config["pad_token_id"],
        }
        return {name: value for name, value in fields.items() if value not in (None, [])}


def _decodes(kind: Any) -> bool:
    """Whether the library can dequantize the type: it only tells by trying."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    if kind.name in INTEGER_TYPES:
        return False
    try:
        dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _shortest(value: float) -> float:
    """Numbers are stored as fp32; the shortest decimal is the one that was meant."""
    return float(str(np.float32(value)))


def _stored(path: Path, tensor: ReaderTensor) -> StoredTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    name = _hugging_face_name(tensor.name)
    if name == tensor.name and name.startswith(("model.", "lm_head.")):
        # It would pass for the tensor that ggml's own name stands for.
        raise CheckpointError(f"{path}: tensor {name}: expected ggml's names, got Hugging Face's")
    kind = tensor.tensor_type.name
    return StoredTensor(name, kind, shape, path, int(tensor.data_offset), int(tensor.n_bytes))


def _hugging_face_name(name: str) -> str:
    """A name that has no counterpart stays, to be refused under the name the file gives it."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, leaf = rest.partition(".")
    if not name.startswith("blk.") or part not in BLOCK_NAMES:
        return name
    return f"model.layers.{block}.{BLOCK_NAMES[part]}.{leaf}"


def _undo_rope_permutation(value: Tensor, heads: int) -> Tensor:
    """ggml's llama rotates neighbouring rows, transformers the two halves of a head."""
    rows = value.shape[0] // heads // 2
    return value.view(heads, rows, 2, -1).transpose(1, 2).reshape(value.shape)
