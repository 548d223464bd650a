"""GGUF files: every tensor type, the rope permutation, the config, and the converter's tensors."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import (
    CONFIG,
    linear_shapes,
    load_transformers,
    random_tensors,
    write_folder,
)

from halfbyte import Linear4bit, quantize_4bit
from halfbyte.checkpoint import gguf as gguf_source
from halfbyte.checkpoint import load, open_source, quantize
from halfbyte.errors import CheckpointError, UnsupportedModelError
from halfbyte.models import DecoderConfig
from halfbyte.models.rope import inverse_frequencies

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType

# Rows of 256 and 512 are whole blocks of every type.
WIDE = CONFIG | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 1,
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs, ours)
    return name.replace("model.layers", "blk")


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py LlamaModel.permute."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stored_array(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> np.ndarray:
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    part = name.split(".")[-2]
    array = tensor.float().numpy()
    if config["model_type"] == "llama" and part in heads:
        return permuted(array, config[heads[part]])
    return array


def write_gguf(
    path: Path,
    config: dict[str, Any] = WIDE,
    kind: Any = TYPES.F32,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    endianess: Any = gguf.GGUFEndian.LITTLE,
) -> Path:
    """The model of random_tensors(config) as llama.cpp would have converted it."""
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for key, value in (metadata or {}).items():
        adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adders[bool] = writer.add_bool
        adders[type(value)](key.replace("ARCH", architecture), value)
    for name, tensor in random_tensors(config).items():
        array = stored_array(name, tensor, config)
        plain = array.ndim == 1 or kind == TYPES.F32
        data = array if plain else gguf.quants.quantize(array, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=TYPES.F32 if plain else kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_cpu(path, quant_type=None, dtype=torch.float32, **arguments):
    return load(path, quant_type, dtype=dtype, device="cpu", progress=False, **arguments)


QWEN2 = WIDE | {"model_type": "qwen2"}
QWEN3 = WIDE | {"model_type": "qwen3", "head_dim": 64, "num_attention_heads": 4}
FAMILIES = {
    "llama": WIDE,
    "llama biased": WIDE | {"attention_bias": True},
    "llama tied": WIDE | {"tie_word_embeddings": True},
    "llama odd": CONFIG,
    "qwen2": QWEN2,
    "qwen2 tied": QWEN2 | {"tie_word_embeddings": True},
    "qwen3": QWEN3,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_tensors_they_were_made_of(tmp_path, family):
    config = FAMILIES[family]
    model = load_cpu(write_gguf(tmp_path / "m.gguf", config))
    expected, parameters = random_tensors(config), dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(parameters[name], tensor), name
    names = {n: v for n, v in config.items() if n not in ("architectures", "torch_dtype")}
    ours = DecoderConfig.from_dict(names | {"bos_token_id": None, "eos_token_id": None})
    assert model.config == ours
    assert model.tokenizer is None and model.generation_config == {}


def test_linear_layers_are_quantized_from_the_permuted_back_weights(tmp_path):
    model = load_cpu(write_gguf(tmp_path / "m.gguf"), "nf4", torch.bfloat16)
    tensors = random_tensors(WIDE)
    for path in linear_shapes(WIDE):
        name = f"model.layers.0.{path}"
        packed, _ = quantize_4bit(tensors[f"{name}.weight"].bfloat16())
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear4bit) and torch.equal(layer.weight, packed), path


WRITABLE = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]


@pytest.mark.parametrize("kind", WRITABLE)
@pytest.mark.parametrize("piece", [1 << 20, 1000])
def test_types_the_library_writes(tmp_path, monkeypatch, kind, piece):
    monkeypatch.setattr(gguf_source, "PIECE_BYTES", piece)
    kind = TYPES[kind]
    model = load_cpu(write_gguf(tmp_path / "m.gguf", QWEN2, kind))
    for name, tensor in random_tensors(QWEN2).items():
        expected = tensor
        if tensor.dim() == 2:
            packed = gguf.quants.quantize(tensor.numpy(), kind)
            expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        assert torch.equal(model.get_parameter(name), expected), name


READABLE = [
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip


@pytest.mark.parametrize("kind", READABLE)
def test_types_the_library_only_reads(tmp_path, kind):
    """Random bytes, kept to small codes so that their scales are finite, in place of a weight."""
    kind = TYPES[kind]
    path = write_gguf(tmp_path / "m.gguf", QWEN2)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = QWEN2["intermediate_size"], QWEN2["hidden_size"]
    raw = np.random.default_rng(0).integers(0, 60, (rows, columns // block * size), np.uint8)
    replaced = tmp_path / "replaced.gguf"
    copy_with(path, replaced, "blk.0.ffn_up.weight", raw, kind)
    expected = gguf.quants.dequantize(raw, kind)
    assert expected.shape == (rows, columns) and np.isfinite(expected).all()
    up = load_cpu(replaced).model.layers[0].mlp.up_proj.weight
    assert torch.equal(up, torch.from_numpy(expected))


def copy_with(source: Path, path: Path, name: str, data: np.ndarray, kind: Any) -> None:
    """The GGUF file again, with other bytes and type for one tensor."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        chosen = (data, kind) if tensor.name == name else (tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.array(chosen[0]), raw_dtype=chosen[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py LlamaModel.generate_extra_tensors."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        length = 2 * np.pi / frequency
        if length < 8192 / 4.0:
            factors.append(1.0)
        elif length > 8192 / 1.0:
            factors.append(factor)
        else:
            smooth = (8192 / length - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_is_recovered_from_its_factors(tmp_path):
    config = WIDE | {"rope_theta": 500000.0, "head_dim": 128, "num_attention_heads": 2}
    factors = llama3_factors(128, 500000.0, 32.0)
    assert len({*factors}) > 5
    path = write_gguf(tmp_path / "m.gguf", config, extra={"rope_freqs.weight": factors})
    model = load_cpu(path)
    assert model.config.raw["rope_scaling"] == LLAMA3
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    scaled = inverse_frequencies(model.config.rope, 128)
    torch.testing.assert_close(scaled, plain / torch.from_numpy(factors), rtol=1e-5, atol=0)
    ones = write_gguf(tmp_path / "ones.gguf", extra={"rope_freqs.weight": np.ones(16, np.float32)})
    assert load_cpu(ones).config.raw["rope_scaling"] is None


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"ARCH.rope.scaling.type": "none"}, None),
        ({"ARCH.rope.scaling.type": "linear", "ARCH.rope.scaling.factor": 2.5},
         {"rope_type": "linear", "factor": 2.5}),
        ({"ARCH.rope.scaling.type": "yarn", "ARCH.rope.scaling.factor": 4.0,
          "ARCH.rope.scaling.original_context_length": 16},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    ],
)  # fmt: skip
def test_rope_scaling(tmp_path, metadata, expected):
    model = load_cpu(write_gguf(tmp_path / "m.gguf", QWEN2, metadata=metadata))
    assert model.config.raw["rope_scaling"] == expected


def test_keys_that_change_nothing_are_read_over(tmp_path):
    neutral = {"ARCH.attention.sliding_window": 64, "ARCH.logit_scale": 1.0}
    neutral |= {"ARCH.residual_scale": 0.0, "ARCH.attention.causal": True}
    load_cpu(write_gguf(tmp_path / "m.gguf", metadata=neutral))


def test_the_suffix_may_be_in_capitals(tmp_path):
    load_cpu(write_gguf(tmp_path / "M.GGUF"))
    (tmp_path / "M.GGUF").rename(tmp_path / "N.Gguf")
    with pytest.raises(CheckpointError, match="got none. Hint: pass the .gguf file itself"):
        load_cpu(tmp_path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", ["llama", "qwen2 tied", "qwen3"])
def test_transformers_loads_what_is_quantized_from_it(tmp_path, family):
    pytest.importorskip("transformers", reason="needs transformers")
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    path = write_gguf(tmp_path / "m.gguf", FAMILIES[family], TYPES.Q8_0)
    out = quantize(path, tmp_path / "out", dtype=torch.float32, device="cpu", progress=False)
    model = load_cpu(path, "nf4")
    theirs = load_transformers(out)
    for name in linear_shapes(WIDE):
        weight = theirs.get_submodule(f"model.layers.0.{name}").weight
        expected = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(model.get_submodule(f"model.layers.0.{name}").dequantize(), expected)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_no_experts_are_none(tmp_path):
    load_cpu(write_gguf(tmp_path / "m.gguf", metadata={"ARCH.expert_count": 0}))


def test_every_end_token_stops(tmp_path):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 7, "padding_token_id": 0}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in ids.items()}
    model = load_cpu(write_gguf(tmp_path / "m.gguf", metadata=metadata))
    assert model.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0}
    assert model.config.raw["eos_token_id"] == 2


def test_quantize_makes_a_folder_of_it(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", WIDE | {"tie_word_embeddings": True})
    out = quantize(path, tmp_path / "out", device="cpu", progress=False)
    one, two = load_cpu(path, "nf4", torch.bfloat16), load_cpu(out, "nf4", torch.bfloat16)
    ids = torch.arange(30)[None]
    assert torch.equal(one(ids).logits, two(ids).logits)
    assert one.config == dataclasses.replace(two.config, dtype=None)


# Errors

F32_UP = np.zeros((512, 256), np.float32)
REFUSED = {
    "another architecture": (
        {"config": WIDE | {"model_type": "gemma3"}},
        UnsupportedModelError,
        "general.architecture: expected one of llama, qwen2, qwen3, got 'gemma3'",
    ),
    "experts": (
        {"metadata": {"llama.expert_count": 8}},
        UnsupportedModelError,
        "got 'llama' with experts",
    ),
    "one part of several": (
        {"metadata": {"split.count": 3}},
        CheckpointError,
        "expected a whole model, got one of 3 parts. Hint: join",
    ),
    "another rope scaling": (
        {"metadata": {"llama.rope.scaling.type": "longrope"}},
        UnsupportedModelError,
        "rope.scaling.type: expected none, linear or yarn .* got 'longrope'",
    ),
    "a scaling without its factor": (
        {"metadata": {"llama.rope.scaling.type": "linear"}},
        CheckpointError,
        "metadata llama.rope.scaling.factor: expected a positive number, got None",
    ),
    "part of the head rotated": (
        {"metadata": {"llama.rope.dimension_count": 16}},
        UnsupportedModelError,
        "rope.dimension_count: expected 32, the whole head, got 16",
    ),
    "unknown rope factors": (
        {"extra": {"rope_freqs.weight": np.linspace(1, 9, 16, dtype=np.float32)}},
        UnsupportedModelError,
        "rope_freqs.weight: expected the factors of Llama 3's",
    ),
    "a sliding window": (
        {"metadata": {"llama.attention.sliding_window": 32}},
        UnsupportedModelError,
        "metadata llama.attention.sliding_window: expected none below 64 tokens, got 32",
    ),
    "scaled logits": (
        {"metadata": {"llama.logit_scale": 8.0}},
        UnsupportedModelError,
        "metadata llama.logit_scale: expected 1, got 8.0",
    ),
    "scaled residuals": (
        {"metadata": {"llama.residual_scale": 0.25}},
        UnsupportedModelError,
        "metadata llama.residual_scale: expected 1, got 0.25",
    ),
    "attention to later tokens": (
        {"metadata": {"llama.attention.causal": False}},
        UnsupportedModelError,
        "metadata llama.attention.causal: expected True, got False",
    ),
    "values of another width": (
        {"metadata": {"llama.attention.value_length": 16}},
        UnsupportedModelError,
        "metadata llama.attention.value_length: expected 32, got 16",
    ),
    "big-endian": (
        {"endianess": gguf.GGUFEndian.BIG},
        CheckpointError,
        "expected a little-endian GGUF file, got a big-endian one. Hint: convert it",
    ),
    "two names for one tensor": (
        {"extra": {"model.norm.weight": np.ones(256, np.float32)}},
        CheckpointError,
        "tensor model.norm.weight: expected ggml's names, got Hugging Face's",
    ),
    "an unknown tensor": (
        {"extra": {"blk.0.attn_qkv.weight": F32_UP}},
        CheckpointError,
        "unexpected tensor blk.0.attn_qkv.weight",
    ),
    "fewer layers than announced": (
        {"metadata": {"llama.block_count": 2}},
        CheckpointError,
        "missing tensor model.layers.1.input_layernorm.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files_are_named(tmp_path, case):
    arguments, kind, message = REFUSED[case]
    # Of two values for a key the writer keeps the later one.
    path = write_gguf(tmp_path / "m.gguf", **arguments)
    with pytest.raises(kind, match=message) as caught:
        load_cpu(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros(256, np.int32), r"expected F32, .* \[256\], got I32 \[256\]"),
        (np.full(256, np.nan, np.float32), "expected finite values, got NaN or Inf"),
        (np.zeros(128, np.float32), r"expected F32, .* \[256\], got F32 \[128\]"),
    ],
)
def test_tensors_that_cannot_be_weights_are_named(tmp_path, array, message):
    path = tmp_path / "m.gguf"
    copy_with(write_gguf(tmp_path / "whole.gguf"), path, "blk.0.attn_norm.weight", array, None)
    with pytest.raises(CheckpointError, match=f"layers.0.input_layernorm.weight: {message}"):
        load_cpu(path)


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 900])
def test_files_cut_in_the_metadata_are_named(tmp_path, keep):
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{path}: expected a GGUF file, got {keep} bytes"):
        load_cpu(path)


@pytest.mark.parametrize("lost, name", [(1, "output.weight"), (300_000, "blk.0.ffn_down.weight")])
def test_files_cut_in_the_data_name_the_tensor(tmp_path, lost, name):
    path = write_gguf(tmp_path / "m.gguf")
    size = path.stat().st_size - lost
    path.write_bytes(path.read_bytes()[:size])
    message = rf"{path}: tensor {name}: expected data up to byte \d+, got a file of {size} bytes"
    with pytest.raises(CheckpointError, match=message):
        load_cpu(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(4, 2500), byte=st.integers(0, 255))
def test_any_damaged_metadata_is_a_clear_error(tmp_path_factory, position, byte):
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    raw = bytearray(write_gguf(path).read_bytes())
    raw[position] = byte
    path.write_bytes(raw)
    try:
        open_source(path)
    except (CheckpointError, UnsupportedModelError) as error:
        assert str(path) in str(error)


def test_files_that_are_not_gguf(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\3\4" * 1000)
    with pytest.raises(CheckpointError, match="GGUF magic invalid"):
        load_cpu(path)


def test_types_the_library_cannot_read(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", QWEN2, TYPES.Q8_0)
    monkeypatch.delitem(gguf.quants._type_traits, TYPES.Q8_0)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight: expected .*, got Q8_0 \[67, "):
        load_cpu(path)


# The real model


@pytest.mark.slow
def test_smollm2_equals_the_converter(shared, tmp_path):
    path = shared / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    converter = shared / "tools/gguf_to_hf.py"
    out = tmp_path / "smollm2"
    subprocess.run([sys.executable, converter, path, out], check=True, capture_output=True)
    ours, theirs = load_cpu(path, dtype=torch.bfloat16), load_cpu(out, dtype=torch.bfloat16)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]
    for name in names:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name
    assert ours.config == dataclasses.replace(theirs.config, dtype=None)
    assert ours.generation_config == theirs.generation_config
    text = "Why is the sky blue? 123"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q5_1", "Q8_0"])
def test_synthetic_files_equal_the_converter(shared, tmp_path, kind):
    ids = {f"tokenizer.ggml.{n}": i for n, i in (("bos_token_id", 1), ("eos_token_id", 2))}
    path = write_gguf(tmp_path / "m.gguf", WIDE, TYPES[kind], ids)
    converter = shared / "tools/gguf_to_hf.py"
    command = [sys.executable, converter, path, tmp_path / "out", "fp32"]
    subprocess.run(command, check=True, capture_output=True)
    ours, theirs = load_cpu(path), load_cpu(tmp_path / "out")
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert ours.config == dataclasses.replace(theirs.config, dtype=None)


def test_open_source_of_a_gguf_lists_tensors_in_file_order(tmp_path):
    offsets = [t.offset for t in open_source(write_gguf(tmp_path / "m.gguf")).tensors]
    assert offsets == sorted(offsets)


def test_a_gguf_in_a_folder_is_pointed_at(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="got config.json, m.gguf"):
        load_cpu(tmp_path)
