"""Loading folders: values, order, memory, and every kind of damage by its message."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import (
    CONFIG,
    edit_json,
    linear_shapes,
    random_tensors,
    write_folder,
    write_safetensors,
)

from halfbyte import Linear4bit, _core, quantize_4bit
from halfbyte.checkpoint import default_device, load, open_source, save
from halfbyte.checkpoint.folder import Folder
from halfbyte.checkpoint.header import read_header
from halfbyte.errors import CheckpointError, UnsupportedModelError

GATE = "model.layers.1.mlp.gate_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIASED = CONFIG | {"attention_bias": True}


def load_cpu(path, quant_type=None, **arguments):
    return load(path, quant_type, device="cpu", progress=False, **arguments)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model")


@pytest.fixture
def quantized(tmp_path) -> Path:
    """A bitsandbytes folder with double quantization."""
    source = write_folder(tmp_path / "source", config=BIASED)
    save(load_cpu(source, "nf4"), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dict of a single-file folder's tensors."""
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    write_safetensors(file, tensors)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unquantized_weights_are_the_stored_ones_cast(tmp_path, stored, dtype, shards):
    tensors = random_tensors(BIASED, stored)
    model = load_cpu(write_folder(tmp_path, tensors, BIASED, shards), dtype=dtype)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(parameters[name], tensor.to(dtype)), name
    assert not model.training and not any(p.requires_grad for p in parameters.values())
    assert model.tokenizer is None and model.source == str(tmp_path)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_linear_layers_are_quantized_after_the_cast(tmp_path, quant_type, double_quant, blocksize):
    tensors = random_tensors(BIASED)
    model = load_cpu(
        write_folder(tmp_path, tensors, BIASED),
        quant_type,
        double_quant=double_quant,
        blocksize=blocksize,
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    paths = {f"model.layers.{i}.{path}" for i in range(2) for path in linear_shapes(BIASED)}
    assert layers.keys() == paths
    for path, layer in layers.items():
        weight = tensors[f"{path}.weight"].bfloat16()
        packed, state = quantize_4bit(weight, quant_type, blocksize, double_quant)
        assert torch.equal(layer.weight, packed), path
        assert torch.equal(layer.quant_state.absmax, state.absmax)
        assert layer.quant_state.dtype == torch.bfloat16
        if layer.bias is not None:
            assert torch.equal(layer.bias, tensors[f"{path}.bias"].bfloat16())
    assert torch.equal(model.lm_head.weight, tensors[HEAD].bfloat16())
    assert torch.equal(model.model.embed_tokens.weight, tensors[EMBEDDING].bfloat16())


def test_tensors_are_read_once_and_in_file_order(tmp_path, monkeypatch):
    tensors = random_tensors()
    names = sorted(tensors, key=lambda name: name[::-1])
    folder = write_folder(tmp_path, {name: tensors[name] for name in names}, shards=2)
    read, order = Folder.read, []

    def recorded(self, tensor, *arguments):
        order.append(tensor.name)
        return read(self, tensor, *arguments)

    monkeypatch.setattr(Folder, "read", recorded)
    load_cpu(folder, "nf4")
    assert order == names[0::2] + names[1::2]


def test_pieces_smaller_than_a_tensor_give_the_same_values(folder, monkeypatch):
    monkeypatch.setattr("halfbyte.checkpoint.source.PIECE_BYTES", 100)
    model = load_cpu(folder, dtype=torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, random_tensors()[EMBEDDING])


def test_rotary_leftovers_are_ignored(tmp_path):
    tensors = random_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    load_cpu(write_folder(tmp_path, tensors))


@pytest.mark.parametrize("stored", [{EMBEDDING}, {HEAD}, {EMBEDDING, HEAD}])
@pytest.mark.parametrize("quant_type", [None, "nf4"])
def test_tied_embeddings(tmp_path, stored, quant_type):
    config = CONFIG | {"tie_word_embeddings": True}
    tensors = random_tensors(config)
    table = tensors.pop(EMBEDDING)
    tensors |= dict.fromkeys(stored, table)
    model = load_cpu(write_folder(tmp_path, tensors, config), quant_type)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, table.bfloat16())


def test_sources_that_name_no_tokenizer_but_have_an_old_one_say_so(folder):
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.warns(UserWarning, match="expected tokenizer.json, got tokenizer.model"):
        assert load_cpu(folder).tokenizer is None


def test_generation_config_is_kept(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load_cpu(folder).generation_config == {"eos_token_id": [2, 5]}


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_drawn_on_a_terminal(folder, capsys, monkeypatch, progress):
    load(folder, device="cpu", progress=progress)
    assert capsys.readouterr() == ("", "")  # not a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    load(folder, device="cpu", progress=progress)
    drawn = capsys.readouterr()
    assert drawn.out == "" and ("loading model" in drawn.err) == progress


# Damage of an unquantized folder


def set_tensor(name, tensor):
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def drop_tensor(name):
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def poison(name, value, index=(3, 4)):
    def change(tensors):
        tensors[name][index] = value

    return lambda folder: rewrite(folder, change)


def cut(file, count):
    def change(folder):
        path = folder / file
        path.write_bytes(path.read_bytes()[:-count])

    return change


def append(file, content):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes() + content)


def replace(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def remove(file):
    return lambda folder: (folder / file).unlink()


def rename(file, other):
    return lambda folder: (folder / file).rename(folder / other)


def header(change):
    """Rewrite the JSON header by `change`, keeping the data."""

    def apply(folder):
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        fields = json.loads(raw[8 : 8 + length])
        encoded = json.dumps(change(fields) or fields).encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])

    return apply


def shift(fields):
    fields[GATE]["data_offsets"] = [offset + 4 for offset in fields[GATE]["data_offsets"]]


def twice(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].rstrip()
    text = text[:-1] + b', "' + GATE.encode() + b'": 1}'
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
DAMAGE = {
    "truncated": (
        cut("model.safetensors", 100),
        r"model.safetensors: tensor lm_head.weight: expected data up to byte \d+, "
        r"got a file of \d+ bytes. Hint: the file is truncated",
    ),
    "trailing bytes": (
        append("model.safetensors", b"x"),
        r"model.safetensors: expected \d+ bytes, got a file of \d+ bytes",
    ),
    "empty file": (replace("model.safetensors", b""), "got a header length of less than 8 bytes"),
    "cut in the header": (replace("model.safetensors", b"\xff\1\0\0\0\0\0\0{"), "length of 511"),
    "not safetensors": (replace("model.safetensors", b"PK\3\4" * 99), "or is not safetensors"),
    "an LFS pointer": (replace("model.safetensors", LFS), "git lfs pull"),
    "header not JSON": (
        replace("model.safetensors", struct.pack("<Q", 4) + b"{'a}"),
        "expected a JSON header",
    ),
    "header not an object": (
        replace("model.safetensors", struct.pack("<Q", 2) + b"[]"),
        "expected a JSON object as header",
    ),
    "a name twice": (twice, rf"the name '{GATE}' twice"),
    "gap in the data": (header(shift), rf"tensor {GATE}: expected its data at byte \d+, got \d+"),
    "size against shape": (
        header(lambda h: h[GATE].update(shape=[81, 44])),
        rf"tensor {GATE}: expected 14256 bytes for F32 \[81, 44\], got data_offsets of 14580",
    ),
    "negative size": (
        header(lambda h: h[GATE].update(shape=[-81, -45])),
        rf"tensor {GATE}: expected dtype, shape and data_offsets",
    ),
    "no offsets": (header(lambda h: h[GATE].pop("data_offsets") and None), rf"tensor {GATE}: exp"),
    "unknown dtype": (
        header(lambda h: h[GATE].update(dtype="F7")),
        rf"tensor {GATE}: expected a dtype of F64, .*, got 'F7'",
    ),
    "missing tensor": (drop_tensor(GATE), rf"missing tensor {GATE}\. Hint"),
    "missing head": (drop_tensor(HEAD), r"missing tensor lm_head.weight\. Hint: if the head is th"),
    "surplus tensor": (
        set_tensor("model.layers.2.mlp.up_proj.weight", torch.ones(2)),
        r"unexpected tensor model.layers.2.mlp.up_proj.weight\. Hint",
    ),
    "more layers than tensors": (
        config(num_hidden_layers=4),
        r"missing tensor model.layers.2.input_layernorm.weight, .* and 13 more",
    ),
    "wrong shape": (
        set_tensor(GATE, torch.ones(45, 81)),
        rf"model.safetensors: tensor {GATE}: expected F32, F16 or BF16 \[81, 45\], "
        r"got F32 \[45, 81\]",
    ),
    "wrong dtype": (
        set_tensor(GATE, torch.ones(81, 45, dtype=torch.int32)),
        rf"tensor {GATE}: expected F32, F16 or BF16 \[81, 45\], got I32 \[81, 45\]",
    ),
    "fp64": (
        set_tensor("model.norm.weight", torch.ones(45, dtype=torch.float64)),
        r"tensor model.norm.weight: expected F32, F16 or BF16 \[45\], got F64 \[45\]",
    ),
    "NaN in a linear layer": (
        poison(GATE, float("nan")),
        rf"model.safetensors: tensor {GATE}: expected finite values, got NaN or Inf",
    ),
    "Inf in the embedding": (poison(EMBEDDING, float("-inf")), f"tensor {EMBEDDING}: expected fin"),
    "NaN in a norm": (poison("model.norm.weight", float("nan"), 44), "tensor model.norm.weight: "),
    "untied values": (
        config(tie_word_embeddings=True),
        f"tensor lm_head.weight: expected {HEAD} equal to {EMBEDDING}",
    ),
    "no config": (remove("config.json"), "expected a config.json, got none"),
    "config not JSON": (replace("config.json", b"{"), "config.json: expected JSON, got"),
    "config a list": (replace("config.json", b"[]"), "config.json: expected a JSON object"),
    "config not UTF-8": (replace("config.json", b"\xff\xfe{}"), "config.json: expected JSON, got"),
    "no weights": (remove("model.safetensors"), "expected model.safetensors or .*, got config"),
    "pickled weights": (
        rename("model.safetensors", "pytorch_model.bin"),
        "expected safetensors weights, got pytorch_model.bin. Hint: pickled weights can run code",
    ),
    "config nested too deep": (
        replace("config.json", b"[" * 200_000),
        "config.json: expected JSON, got maximum recursion depth",
    ),
    "header nested too deep": (
        replace("model.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000),
        "expected a JSON header, got maximum recursion depth",
    ),
    "dtype a list": (
        header(lambda h: h[GATE].update(dtype=["F32"])),
        rf"tensor {GATE}: expected a dtype of F64, .*, got \['F32'\]",
    ),
    "sizes beyond 64 bits": (
        header(lambda h: h[GATE].update(shape=[10**30] * 200)),
        rf"tensor {GATE}: expected dtype, shape and data_offsets",
    ),
    "damaged tokenizer": (
        replace("tokenizer.json", b"{"),
        "tokenizer.json: expected a tokenizer",
    ),
    "gptq": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quant_method: expected 'bitsandbytes', got 'gptq'. Hint: use the unquantized",
    ),
    "quantization_config not an object": (
        config(quantization_config=[1]),
        r"quantization_config: expected a JSON object, got \[1\]",
    ),
    "8 bits": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "expected load_in_4bit, got load_in_8bit = True",
    ),
    "4 bits announced, 16 stored": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "missing tensor .*Hint: config.json announces 4-bit weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder, damage, quant_type):
    change, message = DAMAGE[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_cpu(folder, quant_type)
    assert str(folder) in str(caught.value)


def test_overflow_of_the_dtype_is_named(folder):
    poison(GATE, 1e6)(folder)
    load_cpu(folder)
    with pytest.raises(CheckpointError, match=rf"{GATE}: expected finite .* as torch.float16"):
        load_cpu(folder, dtype=torch.float16)


def test_the_tokenizer_is_opened_before_the_weights(folder, monkeypatch):
    (folder / "tokenizer.json").write_text("{")
    monkeypatch.setattr(Folder, "read", lambda *arguments: pytest.fail("read a tensor"))
    with pytest.raises(CheckpointError, match="tokenizer.json: expected a tokenizer"):
        load_cpu(folder)


def test_a_wrong_field_names_the_folder(folder):
    edit_json(folder / "config.json", rms_norm_eps="1e-5")
    with pytest.raises(UnsupportedModelError, match=rf"{folder}: config field rms_norm_eps: .*'1e"):
        load_cpu(folder)


def test_unsupported_architecture_names_the_folder(folder):
    edit_json(folder / "config.json", model_type="bert", architectures=["BertModel"])
    with pytest.raises(UnsupportedModelError, match=rf"{folder}: config field architectures"):
        load_cpu(folder)


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


def reindex(change):
    def apply(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return apply


SHARD_DAMAGE = {
    "missing shard": (remove(SHARD), rf"{SHARD}: expected a shard with 7 tensors by {INDEX}"),
    "truncated shard": (cut(SHARD, 8), rf"{SHARD}: tensor .*: expected data up to byte"),
    "index names a tensor that is not there": (
        reindex(lambda names: names.update({"model.extra": SHARD})),
        rf"{INDEX}: tensor model.extra: expected in {SHARD}, got no such tensor",
    ),
    "index names another shard": (
        reindex(lambda names: names.update({EMBEDDING: SHARD})),
        rf"{INDEX}: tensor {EMBEDDING}: expected in {SHARD}, got it in model-00001-of-00003",
    ),
    "index lacks a tensor": (
        reindex(lambda names: names.pop(EMBEDDING)),
        rf"tensor {EMBEDDING}: expected to be listed in {INDEX}",
    ),
    "index leads outside": (
        reindex(lambda names: names.update({EMBEDDING: "../x.safetensors"})),
        rf"tensor {EMBEDDING}: expected a safetensors file name, got '../x.safetensors'",
    ),
    "index names pickles": (
        reindex(lambda names: names.update({EMBEDDING: "pytorch_model.bin"})),
        "got 'pytorch_model.bin'. Hint: pickled weights",
    ),
    "index without map": (replace(INDEX, b"{}"), rf"{INDEX}: expected a weight_map"),
    "a tensor in two shards": (
        lambda f: write_safetensors(f / SHARD, random_tensors()),
        rf"tensor {EMBEDDING}: expected once, got it in model-00001-of-00003.safetensors too",
    ),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGE)
def test_damage_of_shards_is_named(tmp_path, damage):
    folder = write_folder(tmp_path / "model", shards=3)
    load_cpu(folder)
    change, message = SHARD_DAMAGE[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load_cpu(folder)


def test_a_file_cut_while_it_is_read_is_named(folder, monkeypatch):
    monkeypatch.setattr("halfbyte.checkpoint.header._check_cover", lambda *arguments: None)
    cut("model.safetensors", 100)(folder)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: expected 12060 bytes, got 11960"):
        load_cpu(folder)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 3000), byte=st.integers(0, 255), keep=st.integers(0, 4000))
def test_any_damaged_header_is_a_checkpoint_error(tmp_path_factory, position, byte, keep):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    path = write_folder(folder) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[position] = byte
    path.write_bytes(raw if keep > 3000 else raw[:keep])
    try:
        read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)


# Pre-quantized folders


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_quantized_folder_is_loaded_as_it_is(tmp_path, quant_type, double_quant):
    source = write_folder(tmp_path / "source", config=BIASED)
    made = load_cpu(source, quant_type, double_quant=double_quant)
    save(made, tmp_path / "model")
    model = load_cpu(tmp_path / "model", "nf4", double_quant=not double_quant, blocksize=128)
    assert_same_state(made, model)


def assert_same_state(model, other):
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, tensor in state.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
def test_quant_storage_is_read_as_bytes(tmp_path, storage):
    # bitsandbytes cannot store 7-byte weights as 4-byte floats, so all sizes are multiples here.
    config = CONFIG | {"hidden_size": 40, "intermediate_size": 80, "head_dim": 8}
    made = load_cpu(write_folder(tmp_path / "source", random_tensors(config), config), "nf4")
    save(made, tmp_path / "model")

    def restore(tensors):
        for name, tensor in tensors.items():
            if tensor.dtype == torch.uint8 and name.endswith("proj.weight"):
                tensors[name] = tensor.flatten().view(storage).reshape(-1, 1)

    rewrite(tmp_path / "model", restore)
    assert_same_state(made, load_cpu(tmp_path / "model", "nf4"))


def test_a_layer_may_be_spread_over_shards(quantized):
    from safetensors.torch import load_file

    made = load_cpu(quantized, "nf4")
    config = json.loads((quantized / "config.json").read_text())
    tensors = load_file(quantized / "model.safetensors")
    tensors = dict(sorted(tensors.items(), key=lambda item: item[0][::-1]))
    (quantized / "model.safetensors").unlink()
    assert_same_state(made, load_cpu(write_folder(quantized, tensors, config, shards=5), "nf4"))


def test_a_quantized_folder_can_be_dequantized(quantized):
    packed = load_cpu(quantized, "nf4")
    plain = load_cpu(quantized, None, dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            expected = module.dequantize(torch.float32)
            assert torch.equal(plain.get_submodule(name).weight, expected), name


def test_a_quantized_folder_keeps_its_codes_under_another_dtype(quantized):
    model = load_cpu(quantized, "nf4", dtype=torch.float32)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.quant_state.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32


def test_skipped_modules_stay_in_16_bits(quantized):
    skipped = "model.layers.0.mlp.down_proj"
    source = quantized.parent / "source"
    weight = load_cpu(source).get_submodule(skipped).weight.detach()

    def change(tensors):
        for name in [name for name in tensors if name.startswith(skipped)]:
            del tensors[name]
        tensors[f"{skipped}.weight"] = weight

    rewrite(quantized, change)
    with pytest.raises(CheckpointError, match=f"missing tensor {skipped}.weight.absmax"):
        load_cpu(quantized, "nf4")
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    config["llm_int8_skip_modules"] = ["lm_head", skipped]
    edit_json(quantized / "config.json", quantization_config=config)
    model = load_cpu(quantized, "nf4")
    assert torch.equal(model.get_submodule(skipped).weight, weight)
    assert isinstance(model.model.layers[1].mlp.down_proj, Linear4bit)


def test_a_4bit_head_is_kept(quantized):
    packed, state = quantize_4bit(load_cpu(quantized.parent / "source").lm_head.weight)
    rewrite(quantized, lambda tensors: tensors.update({HEAD: packed} | state.as_tensors(HEAD)))
    model = load_cpu(quantized, "nf4")
    assert isinstance(model.lm_head, Linear4bit) and torch.equal(model.lm_head.weight, packed)


Q = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"


def blob(**changes):
    def change(tensors):
        fields = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return lambda folder: rewrite(folder, change)


def unblob(name):
    def change(tensors):
        fields = json.loads(bytes(tensors[STATE].tolist()))
        del fields[name]
        tensors[STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return lambda folder: rewrite(folder, change)


def quantization(**changes):
    def change(folder):
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config=stored | changes)

    return change


def tie_to_4bit_head(folder):
    def change(tensors):
        parts = [name for name in tensors if name.startswith(Q)]
        tensors.update({HEAD + name.removeprefix(Q): tensors[name] for name in parts})

    rewrite(folder, change)
    edit_json(folder / "config.json", tie_word_embeddings=True)


QUANTIZED_DAMAGE = {
    "no absmax": (drop_tensor(f"{Q}.absmax"), rf"missing tensor {Q}.absmax"),
    "no state": (drop_tensor(STATE), rf"missing tensor {STATE}"),
    "no map": (drop_tensor(f"{Q}.quant_map"), rf"missing tensor {Q}.quant_map"),
    "no weight": (drop_tensor(Q), rf"missing tensor {Q}\."),
    "no nested map": (drop_tensor(f"{Q}.nested_quant_map"), f"{Q}.nested_quant_map: missing"),
    "no nested absmax": (drop_tensor(f"{Q}.nested_absmax"), rf"tensor {Q}.absmax: expected"),
    "an unknown part": (
        set_tensor(f"{Q}.scb", torch.ones(3)),
        rf"unexpected tensor {Q}.scb",
    ),
    "short codes": (
        set_tensor(Q, torch.zeros(600, 1, dtype=torch.uint8)),
        rf"model.safetensors: tensor {Q}: expected 675 packed bytes .*, got U8 \[600, 1\]",
    ),
    "16 bits in place of codes": (
        set_tensor(Q, torch.zeros(30, 45)),
        rf"tensor {Q}: expected 675 packed bytes stored as .*, got F32 \[30, 45\]",
    ),
    "short absmax": (
        set_tensor(f"{Q}.absmax", torch.zeros(7, dtype=torch.uint8)),
        rf"tensor {Q}.absmax: expected torch.uint8 \[22\], got torch.uint8 \[7\]",
    ),
    "another codebook": (
        set_tensor(f"{Q}.quant_map", torch.linspace(-1, 1, 16)),
        rf"tensor {Q}.quant_map: expected the nf4 codebook",
    ),
    "state not JSON": (
        set_tensor(STATE, torch.zeros(9, dtype=torch.uint8)),
        rf"tensor {STATE}: not a bitsandbytes quant state",
    ),
    "state of another shape": (
        blob(shape=[45, 30]),
        rf"tensor {Q}: expected shape \[30, 45\] by the config, got \[45, 30\]",
    ),
    "NaN offset": (
        blob(nested_offset=float("nan")),
        rf"tensor {STATE}: nested_offset: expected a finite fp32 number, got nan",
    ),
    "offset beyond fp32": (blob(nested_offset=1e39), rf"tensor {STATE}: nested_offset: .*1e\+39"),
    "offset beyond fp64": (blob(nested_offset=10**400), rf"tensor {STATE}: nested_offset: exp"),
    "null offset": (blob(nested_offset=None), rf"tensor {STATE}: nested_offset: .*got None"),
    "offset a text": (blob(nested_offset="0.1"), rf"tensor {STATE}: nested_offset: .*got '0.1'"),
    "no offset": (unblob("nested_offset"), rf"tensor {STATE}: nested_offset: .*got 'none'"),
    "another nested dtype": (
        blob(nested_dtype="float16"),
        rf"tensor {STATE}: nested_dtype: expected 'float32', got 'float16'",
    ),
    "another nested blocksize": (
        blob(nested_blocksize=256.0),
        rf"tensor {STATE}: nested_blocksize: expected 256, got 256.0",
    ),
    "blocksize a float": (blob(blocksize=64.0), rf"tensor {STATE}: blocksize: .*got 64.0"),
    "blocksize a flag": (blob(blocksize=True), rf"tensor {STATE}: blocksize: .*got True"),
    "shape of flags": (blob(shape=[True, 45]), rf"tensor {STATE}: shape: .*got \[True, 45\]"),
    "shape too large": (blob(shape=[2**62, 2**62]), rf"tensor {STATE}: shape: expected a list"),
    "dtype a list": (blob(dtype=["bfloat16"]), rf"tensor {STATE}: dtype: expected a float dtype"),
    "state a list": (
        set_tensor(STATE, torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        rf"tensor {STATE}: expected a JSON object, got \[1\]",
    ),
    "state of 0 dimensions": (
        set_tensor(STATE, torch.tensor(5, dtype=torch.uint8)),
        rf"tensor {STATE}: expected uint8 \[n\], got torch.uint8 \[\]",
    ),
    "state nested too deep": (
        set_tensor(STATE, torch.full((200_000,), ord("["), dtype=torch.uint8)),
        rf"tensor {STATE}: not a bitsandbytes quant state: RecursionError",
    ),
    "NaN scale": (
        poison(f"{Q}.nested_absmax", float("nan"), 0),
        rf"tensor {Q}.nested_absmax: expected finite values",
    ),
    "negative scale": (
        poison(f"{Q}.nested_absmax", -1.0, 0),
        rf"tensor {Q}.nested_absmax: expected scales of 0 or more, got -1",
    ),
    "NaN in the nested map": (
        poison(f"{Q}.nested_quant_map", float("nan"), 7),
        rf"tensor {Q}.nested_quant_map: expected finite values",
    ),
    "nested map out of order": (
        poison(f"{Q}.nested_quant_map", 2.0, 7),
        rf"tensor {Q}.nested_quant_map: expected 256 ascending values",
    ),
    "a skip list of numbers": (
        quantization(llm_int8_skip_modules=[1]),
        r"llm_int8_skip_modules: expected null or a list of module names or patterns, got \[1\]",
    ),
    "a skip list of one text": (quantization(llm_int8_skip_modules="lm_head"), "got 'lm_head'"),
    "a broken pattern": (quantization(llm_int8_skip_modules=["(q"]), r"got \['\(q'\]"),
    "no quantization_config": (
        config(quantization_config=None),
        "unexpected tensor .*Hint: 4-bit tensors need the quantization_config",
    ),
    "tied to a 4-bit head": (
        tie_to_4bit_head,
        rf"tensor {HEAD}: expected the embedding, which config.json ties, got 4-bit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", QUANTIZED_DAMAGE)
def test_damage_of_quantized_folders_is_named(quantized, damage):
    change, message = QUANTIZED_DAMAGE[damage]
    change(quantized)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_cpu(quantized, "nf4")
    assert str(quantized) in str(caught.value)


def test_a_negative_scale_without_double_quantization_is_named(tmp_path):
    save(load_cpu(write_folder(tmp_path / "source"), "nf4", double_quant=False), tmp_path / "model")
    poison(f"{Q}.absmax", -0.5, 3)(tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"{Q}.absmax: expected scales of 0 .* got -0.5"):
        load_cpu(tmp_path / "model", "nf4")


def test_another_quant_type_than_the_stored_one_is_refused(quantized):
    with pytest.raises(ValueError, match="quant_type: expected 'fp4', got a folder .* 'nf4'"):
        load_cpu(quantized, "fp4")


# Arguments and places


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"quant_type": "nf5"}, "quant_type: expected one of .*, got 'nf5'"),
        ({"dtype": torch.float64}, "dtype: expected one of .*, got torch.float64"),
        ({"dtype": "bf16"}, "dtype: expected one of .*, got 'bf16'"),
        ({"blocksize": 48}, "blocksize: expected one of .*, got 48"),
        ({"device": "meta"}, "device: expected cpu or cuda, got meta"),
    ],
)
def test_arguments_are_checked_before_anything_is_opened(arguments, message):
    with pytest.raises(ValueError, match=message):
        load("/no/such/place", **({"device": "cpu"} | arguments))


@pytest.mark.parametrize(
    "path",
    ["/no/such/place", "./nothing", "a/b/c", "owner//name", "gone.gguf", "owner/name.gguf", "..x"],
)  # fmt: skip
def test_a_path_where_nothing_is(path):
    with pytest.raises(FileNotFoundError, match="expected a model folder, a .gguf file or a hub"):
        load_cpu(path)
    with pytest.raises(FileNotFoundError):
        load_cpu(Path("owner/name"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.safetensors", "Hint: pass the folder that holds config.json"),
        ("pytorch_model.bin", "got a .bin file. Hint: pickled weights can run code"),
        ("weights", "got a nameless file"),
    ],
)
def test_other_files_are_refused(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        load_cpu(tmp_path / name)


@pytest.mark.parametrize(
    "name, hint", [("adapter_config.json", "this is an adapter"), ("x.gguf", "pass the .gguf")]
)
def test_folders_that_hold_something_else(tmp_path, name, hint):
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"expected a config.json, got none. Hint: {hint}"):
        load_cpu(tmp_path)


def test_default_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_core, "cuda_status", lambda: "built without nvcc")
    with pytest.warns(UserWarning, match="uses the CPU .*: built without nvcc"):
        assert default_device() == torch.device("cpu")
    with pytest.raises(RuntimeError, match="device cuda: built without nvcc"):
        load("/no/such/place", device="cuda")
    monkeypatch.setattr(_core, "cuda_status", lambda: "ok")
    assert default_device() == torch.device("cuda")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub: copies what the patterns ask for out of tmp_path / "remote"."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from fnmatch import fnmatch

    remote, cache = tmp_path / "remote", tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(repo_id, allow_patterns):
        assert repo_id == "owner/name"
        for file in remote.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                (cache / file.name).write_bytes(file.read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote


@pytest.mark.parametrize("shards", [1, 2])
def test_a_hub_id_downloads_only_what_is_needed(hub, shards):
    write_folder(hub, shards=shards)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md", "model.gguf"):
        (hub / name).write_bytes(b"x")
    model = load_cpu("owner/name", dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, random_tensors()[HEAD])
    assert model.source == "owner/name"
    cached = {file.name for file in (hub.parent / "cache").iterdir()}
    assert cached == {f.name for f in hub.iterdir() if f.name.startswith(("model-", "config"))} | (
        {"model.safetensors"} if shards == 1 else {INDEX}
    )


def test_a_hub_repository_without_safetensors(hub):
    write_folder(hub)
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="the model has other weights than safetensors"):
        load_cpu("owner/name")


@pytest.mark.parametrize(
    "error, expected, message",
    [
        ("LocalEntryNotFoundError", ConnectionError, "hub cannot be reached .*Hint: check the net"),
        ("OfflineModeIsEnabled", ConnectionError, "hub cannot be reached"),
        ("RepositoryNotFoundError", FileNotFoundError, "neither a local path nor a model on the"),
        ("GatedRepoError", PermissionError, "access is gated. Hint: accept the model's licence"),
        ("HfHubHTTPError", ConnectionError, "hub cannot be reached .boom"),
        ("HFValidationError", FileNotFoundError, "neither a local path nor a hub id"),
    ],
)
def test_hub_errors(monkeypatch, error, expected, message):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    kind = getattr(pytest.importorskip("huggingface_hub.errors"), error)

    def fail(*arguments, **keywords):
        exception = kind.__new__(kind)
        exception.args = ("boom\nsecond line",)
        raise exception

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=rf"owner/name: .*{message}") as caught:
        load_cpu("owner/name")
    assert "second line" not in str(caught.value)


@pytest.mark.parametrize("dropped", ["http", "xet"])
def test_a_connection_that_drops_is_a_connection_error(monkeypatch, dropped):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import HfHubHTTPError

    # The base error of the HTTP library that this version of the hub uses.
    kind = RuntimeError if dropped == "xet" else HfHubHTTPError.__mro__[1]

    def fail(*arguments, **keywords):
        raise kind("peer closed connection without sending complete message body")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ConnectionError, match=r"owner/name: .*\(peer closed connection"):
        load_cpu("owner/name")


@pytest.mark.parametrize(
    "index, message",
    [
        (b'{"weight_map": [1]}', r"expected a weight_map of name -> file, got \[1\]"),
        (b'{"weight_map": {"a": 1}}', "tensor a: expected a safetensors file name, got 1"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "tensor a: expected a safetensors file nam"),
    ],
)
def test_a_malformed_index_on_the_hub(hub, index, message):
    write_folder(hub, shards=2)
    (hub / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError, match=f"{INDEX}: {message}"):
        load_cpu("owner/name")


# Memory

BIG = CONFIG | {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "num_hidden_layers": 5,
}
MEASURE = """
import re, sys, torch
from halfbyte.checkpoint import load

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

load(sys.argv[1], device="cpu", progress=False)  # libraries and thread stacks
before = peak()
load(sys.argv[2], quant_type=None if sys.argv[3] == "None" else "nf4", device="cpu", progress=False)
print(peak() - before)
"""


def measured_peak(small: Path, model: Path, quant_type: str | None) -> int:
    """Bytes by which loading `model` in a fresh process raises its peak, after `small`."""
    command = [sys.executable, "-c", MEASURE, str(small), str(model), str(quant_type)]
    # Freed memory goes back to the system at once: the loader is measured, not the heap's reserve.
    heap = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    return int(subprocess.run(command, env=heap, capture_output=True, check=True, text=True).stdout)


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("big"), config=BIG, shards=2)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_peak_memory_is_the_model_and_one_tensor(big, folder, quant_type):
    elements = {tensor.name: math.prod(tensor.shape) for tensor in open_source(big).tensors}
    four_bit = sum(n for name, n in elements.items() if "_proj" in name)
    rest = sum(elements.values()) - four_bit
    stays = rest * 2 + (four_bit * 0.52 if quant_type else four_bit * 2)
    one_tensor, staging, slack = max(elements.values()) * 2, 16 << 20, 20 << 20
    peak = measured_peak(folder, big, quant_type)
    bound = stays + one_tensor + staging + slack
    assert peak <= bound
    # The bound means something: the file, and for 4 bits its cast, is far larger.
    assert sum(elements.values()) * (2 if quant_type else 4) > 1.3 * bound


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_a_quantized_folder_is_the_model(big, quantized, tmp_path):
    save(load_cpu(big, "nf4"), tmp_path / "packed", max_shard_bytes=8 << 20)
    stays = sum(tensor.nbytes for tensor in open_source(tmp_path / "packed").tensors)
    bound = stays + (16 << 20)  # the staging buffer, of which small tensors touch a part
    assert measured_peak(quantized, tmp_path / "packed", "nf4") <= bound
    assert 1.5 * stays > bound  # so not even half of it is held twice


@pytest.mark.gpu
def test_peak_device_memory_is_the_model_and_one_tensor(big):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(big, device="cuda", progress=False)
    stays = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    largest = max(parameter.numel() for parameter in model.parameters())
    # Beside one 16-bit tensor there are its codes and scales, which stay, and small temporaries.
    assert peak <= stays + largest * 2 + (2 << 20)


@pytest.mark.gpu
def test_cuda_and_cpu_load_the_same_bytes(folder):
    assert_same_state(load_cpu(folder, "nf4"), load(folder, device="cuda", progress=False).cpu())


# Golden files and real models


def test_golden_quantization(shared):
    """Codes and scales of the bf16 model are those that bitsandbytes made of it."""
    made = load_cpu(shared / "golden/tiny_llama_bf16", "nf4").state_dict()
    golden = load_cpu(shared / "golden/tiny_llama_bnb4", "nf4").state_dict()
    assert made.keys() == golden.keys()
    for name, tensor in golden.items():
        assert torch.equal(made[name], tensor), name


def test_stories(shared):
    source = open_source(shared / "models/stories260K")
    assert source.config["rope_theta"] == 10000.0
    model = load_cpu(shared / "models/stories260K", dtype=torch.float32)
    assert model.tokenizer is not None
    assert re.match("model.embed_tokens", next(n for n, _ in model.named_parameters()))
    model = load_cpu(shared / "models/stories260K", "nf4")
    assert torch.isfinite(model(torch.tensor([[1, 403, 407]])).logits).all()
