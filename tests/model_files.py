"""Model folders written by hand, for tests of loading: small, odd sizes, nothing from halfbyte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# 45 columns and 81 rows: blocks straddle rows, and gate_proj has an odd number of elements.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 45,
    "intermediate_size": 81,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.float64: "F64",
}


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Path -> [out, in] of one layer's linear layers."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    return {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def random_tensors(
    config: dict[str, Any] = CONFIG, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """All tensors of the model that `config` describes, under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors = {"model.embed_tokens.weight": normal(vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for path, (rows, columns) in linear_shapes(config).items():
            tensors[f"{prefix}.{path}.weight"] = normal(rows, columns)
            biased = path.startswith("self_attn") and config["attention_bias"]
            if biased or (config["model_type"] == "qwen2" and path[-6] in "qkv"):
                tensors[f"{prefix}.{path}.bias"] = normal(rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = 1 + normal(hidden)
        for norm in ("q_norm", "k_norm") if config["model_type"] == "qwen3" else ():
            tensors[f"{prefix}.self_attn.{norm}.weight"] = 1 + normal(config["head_dim"])
    tensors["model.norm.weight"] = 1 + normal(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(vocab, hidden)
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A safetensors file with the data in the order of the dict, which the library never keeps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, end = [], 0
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(raw)],
        }
        data.append(raw)
        end += len(raw)
    encoded = json.dumps(dict(sorted(header.items()))).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(b"".join([struct.pack("<Q", len(encoded)), encoded, *data]))
    return path


def write_folder(
    path: Path,
    tensors: dict[str, Tensor] | None = None,
    config: dict[str, Any] = CONFIG,
    shards: int = 1,
) -> Path:
    """A Hugging Face folder; tensors are dealt to the shards in turn, so that layers are torn."""
    tensors = random_tensors(config) if tensors is None else tensors
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(path / "model.safetensors", tensors)
        return path
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    names = list(tensors)
    for i, file in enumerate(files):
        write_safetensors(path / file, {name: tensors[name] for name in names[i::shards]})
    weight_map = {name: files[i % shards] for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    fields = json.loads(path.read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    path.write_text(json.dumps(fields))


def load_transformers(folder: Path, **options: Any):
    """The folder as transformers loads it, computing in its own dtype.

    On CPUs with instructions for bf16, bitsandbytes would multiply in bf16 whatever the dtype is.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model
