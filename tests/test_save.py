"""Saving: bytes, sharding, atomicity, transformers + bitsandbytes as reader; fingerprints."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from model_files import CONFIG, load_transformers, random_tensors, write_folder
from safetensors.torch import load_file
from tiny import write_tokenizer

from halfbyte import Linear4bit, LoraConfig
from halfbyte.checkpoint import load, quantize, save, saving
from halfbyte.errors import CheckpointError
from halfbyte.fingerprint import fingerprint
from halfbyte.lora import adapter_parameters, inject, merge

BIASED = CONFIG | {"attention_bias": True}
# Rows of whole blocks: bitsandbytes dequantizes others wrongly on CPUs with AVX-512.
WHOLE_BLOCKS = CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def load_cpu(path, quant_type="nf4", **arguments):
    return load(path, quant_type, device="cpu", progress=False, **arguments)


@pytest.fixture
def source(tmp_path) -> Path:
    return write_folder(tmp_path / "source", config=BIASED)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def test_golden_folder_is_written_back_byte_for_byte(shared, tmp_path):
    golden = shared / "golden/tiny_llama_bnb4"
    save(load_cpu(golden), tmp_path / "out")
    written = (tmp_path / "out/model.safetensors").read_bytes()
    assert written == (golden / "model.safetensors").read_bytes()
    before = json.loads((golden / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert before.items() <= after.items()
    generation = "generation_config.json"
    assert json.loads((tmp_path / "out" / generation).read_text()) == json.loads(
        (golden / generation).read_text()
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", None])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_round_trip_changes_nothing(source, tmp_path, quant_type, double_quant):
    model = load_cpu(source, quant_type, double_quant=double_quant)
    save(model, tmp_path / "one")
    save(load_cpu(tmp_path / "one", quant_type), tmp_path / "two")
    one, two = read_all(tmp_path / "one"), read_all(tmp_path / "two")
    assert_equal_tensors(one, two)
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    assert_equal_tensors(one, {name: t.detach() for name, t in model.state_dict().items()})


def test_quantization_config_of_a_new_model(source, tmp_path):
    save(load_cpu(source, "fp4", double_quant=False, dtype=torch.float16), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"] == {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
    assert config["dtype"] == config["torch_dtype"] == "float16"


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "given, theta, scaling",
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5.0,
         {"rope_type": "linear", "factor": 2.0}),
        ({"rope_theta": 5.0, "rope_scaling": {"rope_type": "llama3"} | LLAMA3}, 5.0,
         {"rope_type": "llama3"} | LLAMA3),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "llama3"} | LLAMA3}, 7.0,
         {"rope_type": "llama3"} | LLAMA3),
    ],
)  # fmt: skip
def test_rope_is_written_in_both_spellings(tmp_path, given, theta, scaling):
    config = {name: value for name, value in CONFIG.items() if name != "rope_theta"} | given
    model = load_cpu(write_folder(tmp_path / "source", random_tensors(CONFIG), config))
    save(model, tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["rope_theta"] == theta and written["rope_scaling"] == scaling
    expected = {"rope_theta": theta} | (scaling or {"rope_type": "default"})
    assert written["rope_parameters"] == expected
    assert load_cpu(tmp_path / "out").config.rope == model.config.rope


@pytest.mark.parametrize("limit", [1, 4000, 20_000])
def test_shards(source, tmp_path, limit):
    model = load_cpu(source)
    save(model, tmp_path / "whole")
    save(model, tmp_path / "out", max_shard_bytes=limit)
    whole, tensors = read_all(tmp_path / "whole"), read_all(tmp_path / "out")
    assert_equal_tensors(whole, tensors)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file in files:
        names = {name for name, place in index["weight_map"].items() if place == file}
        shard = load_file(tmp_path / "out" / file)
        assert shard.keys() == names
        assert len(names) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= limit
    assert fingerprint(load_cpu(tmp_path / "out")) == fingerprint(model)


def test_tied_embeddings_are_written_once(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    model = load_cpu(write_folder(tmp_path / "source", config=config))
    save(model, tmp_path / "out")
    assert "lm_head.weight" not in read_all(tmp_path / "out")
    again = load_cpu(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_head_that_training_untied_is_written(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    model = load_cpu(write_folder(tmp_path / "source", config=config))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    save(model, tmp_path / "out")
    again = load_cpu(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not again.config.tie_word_embeddings


def test_mixed_models_list_what_is_not_quantized(source, tmp_path):
    model = load_cpu(source)
    layer = model.model.layers[1].mlp.up_proj
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    model.model.layers[1].mlp.up_proj = plain.bfloat16()
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["model.layers.1.mlp.up_proj", "lm_head"]
    again = load_cpu(tmp_path / "out")
    assert torch.equal(again.model.layers[1].mlp.up_proj.weight, plain.weight)


def test_a_prequantized_model_that_changed_says_what_it_is(source, tmp_path):
    save(load_cpu(source), tmp_path / "one")
    model = load_cpu(tmp_path / "one")
    layer = model.model.layers[1].mlp.up_proj
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False).bfloat16()
    model.model.layers[1].mlp.up_proj = plain
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.quant_type, module.double_quant = "fp4", False
            module.quantize_(module.dequantize())
    save(model, tmp_path / "two")
    config = json.loads((tmp_path / "two/config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "fp4" and not config["bnb_4bit_use_double_quant"]
    assert config["llm_int8_skip_modules"] == ["model.layers.1.mlp.up_proj", "lm_head"]
    again = load_cpu(tmp_path / "two")
    assert_equal_tensors(again.state_dict(), model.state_dict())


def test_a_skip_list_that_still_says_the_same_is_kept(source, tmp_path):
    save(load_cpu(source), tmp_path / "one")
    config = json.loads((tmp_path / "one/config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "vision_tower"]
    (tmp_path / "one/config.json").write_text(json.dumps(config))
    save(load_cpu(tmp_path / "one"), tmp_path / "two")
    written = json.loads((tmp_path / "two/config.json").read_text())
    assert written["quantization_config"] == config["quantization_config"]


def test_parameters_that_share_memory_are_written_each(source, tmp_path):
    model = load_cpu(source, None)
    first, second = model.model.layers
    first.mlp.up_proj.weight.data = first.mlp.gate_proj.weight.data
    first.input_layernorm.weight = second.input_layernorm.weight
    joined = torch.cat([second.self_attn.k_proj.weight, second.self_attn.v_proj.weight])
    second.self_attn.k_proj.weight.data, second.self_attn.v_proj.weight.data = joined.chunk(2)
    save(model, tmp_path / "out")
    assert_equal_tensors(load_cpu(tmp_path / "out", None).state_dict(), model.state_dict())


def test_tokenizer_goes_with_the_model(source, tmp_path):
    write_tokenizer(source)
    model = load_cpu(source)
    save(model, tmp_path / "out")
    again = load_cpu(tmp_path / "out")
    text = "Grüße, half a byte"
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text) != []
    assert again.tokenizer.chat_template == model.tokenizer.chat_template


def test_files_are_readable_like_any_other(source, tmp_path):
    save(load_cpu(source), tmp_path / "out")
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


# Refusals and crashes


def test_int4_has_no_file_format(source, tmp_path):
    with pytest.raises(CheckpointError, match="'int4' has no on-disk format"):
        save(load_cpu(source, "int4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="quantize: quant_type: expected .*, got 'int4'"):
        quantize(source, tmp_path / "out", "int4")


def test_a_compiled_model_is_saved_as_the_model(source, tmp_path):
    model = load_cpu(source)
    save(torch.compile(model, backend="eager"), tmp_path / "out")
    assert fingerprint(load_cpu(tmp_path / "out")) == fingerprint(model)


def test_adapters_are_not_dropped_silently(source, tmp_path):
    model = inject(load_cpu(source), LoraConfig(r=2))
    with pytest.raises(ValueError, match="got one that carries an adapter. Hint: save the adapter"):
        save(model, tmp_path / "out")
    save(merge(model), tmp_path / "out")
    assert load_cpu(tmp_path / "out", None).lm_head.weight.dtype == torch.bfloat16


def test_existing_folders(source, tmp_path):
    model = load_cpu(source)
    out = tmp_path / "out"
    out.mkdir()
    save(model, out)
    with pytest.raises(FileExistsError, match="got files in it. Hint: choose another folder"):
        save(model, out)
    (out / "stale.safetensors").write_text("")
    save(model, out, overwrite=True)
    assert not (out / "stale.safetensors").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="got a file of that name"):
        save(model, tmp_path / "file", overwrite=True)


STRANGERS = {
    "no config": ({"thesis.tex": ""}, "without config.json, or with another program's"),
    "another program's config": ({"config.json": '{"theme": "dark"}'}, "with another program's"),
    "a text": ({"config.json": '{"model_type": "llama"}', "thesis.tex": ""}, "got thesis.tex"),
    "a hidden file": ({"config.json": '{"architectures": []}', ".git": ""}, r"got \.git"),
    "a folder": ({"config.json": '{"model_type": "llama"}', "runs/a.json": ""}, "got runs"),
    "a text among templates": (
        {"config.json": '{"model_type": "llama"}', "additional_chat_templates/notes.txt": ""},
        "got additional_chat_templates/notes.txt",
    ),
}


@pytest.mark.parametrize("case", STRANGERS)
def test_overwrite_deletes_nothing_but_models(source, tmp_path, case):
    files, message = STRANGERS[case]
    home = tmp_path / "home"
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    with pytest.raises(FileExistsError, match=f"{home}: expected .*{message}"):
        save(load_cpu(source), home, overwrite=True)
    assert {p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()} == files.keys()


def test_every_file_of_a_saved_model_can_be_overwritten(source, tmp_path):
    write_tokenizer(source)
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    model = load_cpu(source)
    model.tokenizer.chat_templates["tools"] = "{{ messages }}"
    save(model, tmp_path / "out", max_shard_bytes=20_000)
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert names >= {"tools.jinja", "generation_config.json", "model.safetensors.index.json"}
    save(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_a_folder_that_holds_the_source_is_not_overwritten(source, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for call in (
        lambda: save(load_cpu(source), tmp_path, overwrite=True),
        lambda: quantize(source, tmp_path, device="cpu", overwrite=True, progress=False),
    ):
        with pytest.raises(
            FileExistsError, match=f"got one that holds the model's source {source}"
        ):
            call()
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["", "owner/name"])
def test_a_source_that_is_no_path_stands_in_no_way(source, tmp_path, monkeypatch, name):
    model = load_cpu(source)
    save(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    model.source = name
    save(model, tmp_path / "out", overwrite=True)


def test_an_empty_folder_is_filled_and_its_config_comes_last(source, tmp_path, monkeypatch):
    """It may be a mount point, over which nothing can be renamed."""
    out, moved = tmp_path / "out", []
    out.mkdir()
    identity, rename = out.stat().st_ino, Path.rename

    def recorded(self, target):
        moved.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", recorded)
    quantize(source, out, device="cpu", progress=False)
    assert moved == ["model.safetensors", "config.json"] and out.stat().st_ino == identity
    assert sorted(path.name for path in out.iterdir()) == sorted(moved)


def test_a_mount_point_with_files_is_refused_early(source, tmp_path, monkeypatch):
    model = load_cpu(source)
    save(model, tmp_path / "out")
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    with pytest.raises(FileExistsError, match="got a mount point with files in it"):
        save(model, tmp_path / "out", overwrite=True)


def test_a_folder_can_replace_its_own_source(source):
    expected = load_cpu(source)
    quantize(source, source, device="cpu", overwrite=True, progress=False)
    assert fingerprint(load_cpu(source)) == fingerprint(expected)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_leaves_nothing_or_the_old_folder(source, tmp_path, monkeypatch, overwrite):
    import safetensors.torch

    model = load_cpu(source)
    out = tmp_path / "out"
    if overwrite:
        save(model, out)
    before = {file.name: file.read_bytes() for file in out.glob("*")}

    def fail(*arguments, **keywords):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(model, out, overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in out.glob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"source"} | ({"out"} if before else set())


def break_rename(monkeypatch, broken) -> None:
    """Renames to `broken` fail, as over a mount point."""
    rename = Path.rename

    def renamed(self, target):
        if target == broken and self.suffix == ".partial":
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)


def refuse_after(count):
    """A Path.rename that works `count` times."""
    rename, calls = Path.rename, iter(range(count))

    def renamed(self, target):
        if next(calls, None) is None:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    return renamed


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_move_that_fails_loses_neither_model(source, tmp_path, monkeypatch, overwrite):
    model, out = load_cpu(source), tmp_path / "out"
    if overwrite:
        save(load_cpu(source, "fp4"), out)
    before = {file.name: file.read_bytes() for file in out.glob("*")}
    break_rename(monkeypatch, out)
    with pytest.raises(OSError, match=f"{out}: expected to put .* Hint: what was not") as caught:
        save(model, out, overwrite=overwrite)
    assert {file.name: file.read_bytes() for file in out.glob("*")} == before
    (kept,) = tmp_path.glob(".out.*.partial")
    assert str(kept) in str(caught.value)
    assert fingerprint(load_cpu(kept)) == fingerprint(model)


def test_the_model_before_is_named_where_it_cannot_be_put_back(source, tmp_path, monkeypatch):
    model, out = load_cpu(source), tmp_path / "out"
    save(model, out)
    monkeypatch.setattr(Path, "rename", refuse_after(1))
    with pytest.raises(OSError, match=r"the model before it in .*\.old; move it there"):
        save(model, out, overwrite=True)
    (old,), (new,) = tmp_path.glob(".out.*.old"), tmp_path.glob(".out.*.partial")
    assert fingerprint(load_cpu(old)) == fingerprint(load_cpu(new)) == fingerprint(model)


def test_the_parent_is_synced_after_the_rename(source, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(saving, "_sync_one", lambda path: synced.append(path))
    save(load_cpu(source), tmp_path / "out")
    assert synced[-1] == tmp_path and len(synced) > 2


def test_a_full_disk_is_named(source, tmp_path, monkeypatch):
    model = load_cpu(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors: expected to write 0.000 GB, got .*"):
            save(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="got 0.000 GB of free space. Hint: free some"):
        save(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# quantize SRC OUT


def test_a_place_that_cannot_be_written_is_found_before_the_work(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(saving, "open_source", lambda path: pytest.fail("opened the source"))
    with pytest.raises(OSError, match="file"):
        quantize(source, tmp_path / "file/out", device="cpu")


def test_quantize_is_load_and_save(source, tmp_path):
    out = quantize(source, tmp_path / "deep/out", "fp4", False, device="cpu", progress=False)
    assert out == tmp_path / "deep/out"
    save(load_cpu(source, "fp4", double_quant=False), tmp_path / "expected")
    assert_equal_tensors(read_all(out), read_all(tmp_path / "expected"))
    with pytest.raises(CheckpointError, match="expected unquantized weights"):
        quantize(out, tmp_path / "again", device="cpu")
    with pytest.raises(FileExistsError):
        quantize("/no/such/place", out, device="cpu")
    plain = quantize(out, tmp_path / "plain", None, device="cpu", progress=False)
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    assert not any(isinstance(m, Linear4bit) for m in load_cpu(plain, None).modules())


# transformers + bitsandbytes


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quant_type, double_quant", [("nf4", True), ("nf4", False), ("fp4", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_is_saved(
    tmp_path, quant_type, double_quant, dtype, shard_bytes
):  # fmt: skip
    pytest.importorskip("transformers", reason="needs transformers")
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    source = write_folder(tmp_path / "source", config=WHOLE_BLOCKS)
    model = load_cpu(source, quant_type, double_quant=double_quant, dtype=dtype)
    save(model, tmp_path / "out", max_shard_bytes=shard_bytes)
    theirs = load_transformers(tmp_path / "out")
    for path, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = theirs.get_submodule(path).weight
            expected = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(layer.dequantize(), expected), path
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            assert torch.equal(parameter, theirs.get_parameter(name)), name
    if dtype == torch.bfloat16:
        return  # bitsandbytes rounds the weights of its bf16 product otherwise
    ids = torch.arange(20)[None] * 3
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


WIDE_BLOCKS = WHOLE_BLOCKS | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
QWEN2 = WHOLE_BLOCKS | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
FAMILIES = {
    "mistral": (
        WHOLE_BLOCKS | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, {}
    ),
    "qwen2": (QWEN2, {}),
    "qwen2 tied": (QWEN2 | {"tie_word_embeddings": True}, {}),
    "qwen3": (WHOLE_BLOCKS | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, {}),
    "tied": (WHOLE_BLOCKS | {"tie_word_embeddings": True}, {}),
    "biased": (WHOLE_BLOCKS | {"attention_bias": True}, {}),
    "fp16": (WHOLE_BLOCKS, {"dtype": torch.float16}),
    "blocksize 128": (WIDE_BLOCKS, {"blocksize": 128}),
}  # fmt: skip


def assert_transformers_reads_it_alike(folder, model) -> None:
    """Weights to the bit, and the logits of both with those weights in fp32."""
    pytest.importorskip("transformers", reason="needs transformers")
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    theirs = load_transformers(folder)
    names = {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    assert names == {n for n, m in model.named_modules() if isinstance(m, Linear4bit)} != set()
    for path in names:
        weight = theirs.get_submodule(path).weight
        expected = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(model.get_submodule(path).dequantize(), expected), path
    floats = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    assert floats.keys() == {n for n, p in theirs.named_parameters() if p.is_floating_point()}
    for name, parameter in floats.items():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    ids = torch.arange(20)[None] * 3
    with torch.no_grad():
        ours, others = model(ids).logits.float(), theirs(ids).logits.float()
    # bitsandbytes rounds the weights of a 16-bit product otherwise.
    bound = 1e-5 if model.model.norm.weight.dtype == torch.float32 else 0.03
    torch.testing.assert_close(ours, others, rtol=bound, atol=bound)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_family(tmp_path, family):
    config, arguments = FAMILIES[family]
    source = write_folder(tmp_path / "source", config=config)
    model = load_cpu(source, **({"dtype": torch.float32} | arguments))
    save(model, tmp_path / "out")
    assert_transformers_reads_it_alike(tmp_path / "out", model)


@pytest.mark.filterwarnings("default")
def test_transformers_loads_a_4bit_head(tmp_path):
    model = load_cpu(write_folder(tmp_path / "source", config=WHOLE_BLOCKS), dtype=torch.float32)
    head = Linear4bit(64, CONFIG["vocab_size"], bias=False)
    model.lm_head = head.quantize_(model.lm_head.weight)
    save(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == []
    assert_transformers_reads_it_alike(tmp_path / "out", model)
    assert isinstance(load_cpu(tmp_path / "out").lm_head, Linear4bit)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "rope", [{"type": "linear", "factor": 2.0}, {"rope_type": "llama3"} | LLAMA3]
)
def test_transformers_reads_the_config_alike(tmp_path, rope):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = WHOLE_BLOCKS | {"rope_theta": 500.0, "rope_scaling": rope}
    tensors = random_tensors(config)
    model = load_cpu(write_folder(tmp_path / "source", tensors, config), None, dtype=torch.float32)
    save(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32")
    ids = torch.arange(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("quant_type, double_quant", [("nf4", True), ("fp4", False)])
def test_what_transformers_saves_is_loaded(tmp_path, quant_type, double_quant):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    source = write_folder(tmp_path / "source", config=WHOLE_BLOCKS)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")
    save(load_cpu(tmp_path / "theirs"), tmp_path / "ours")
    assert_equal_tensors(read_all(tmp_path / "theirs"), read_all(tmp_path / "ours"))
    # Our own quantization of the source gives their bytes too.
    made = load_cpu(source, quant_type, double_quant=double_quant)
    save(made, tmp_path / "made")
    packed = {n: t for n, t in read_all(tmp_path / "made").items() if n.endswith("proj.weight")}
    stored = read_all(tmp_path / "theirs")
    assert packed and all(torch.equal(tensor, stored[name]) for name, tensor in packed.items())


# Fingerprints


def test_fingerprint_by_its_definition(tmp_path):
    config = CONFIG | {"num_hidden_layers": 1}
    model = load_cpu(write_folder(tmp_path, config=config), "nf4", double_quant=True)
    entries: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.quant_state
            entries[f"{path}.weight"], entries[f"{path}.absmax"] = module.weight, state.absmax
            entries[f"{path}.nested_absmax"] = state.nested.absmax
            entries[f"{path}.nested_quant_map"] = state.nested.map
            entries[f"{path}.nested_offset"] = torch.tensor([state.offset])
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            entries[name] = parameter.float()
    digest = hashlib.sha256()
    for name, tensor in sorted(entries.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode() + tensor.detach().numpy().tobytes())
    assert fingerprint(model) == {
        "sha256": digest.hexdigest(),
        "quant_type": "nf4",
        "double_quant": True,
        "blocksize": 64,
    }


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_fingerprint_ignores_the_adapter(source, quant_type):
    model = load_cpu(source, quant_type)
    before = fingerprint(model)
    inject(model, LoraConfig(r=2, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(1)
    assert fingerprint(model) == before


def test_fingerprint_with_a_tied_head_that_trains(tmp_path):
    config = CONFIG | {"tie_word_embeddings": True}
    model = load_cpu(write_folder(tmp_path, config=config))
    before = fingerprint(model)
    assert fingerprint(inject(model, LoraConfig(r=2, modules_to_save=["lm_head"]))) == before


def test_fingerprint_follows_values_not_dtypes(tmp_path):
    folder = write_folder(tmp_path, random_tensors(BIASED, torch.bfloat16), BIASED)
    assert fingerprint(load_cpu(folder)) == fingerprint(load_cpu(folder, dtype=torch.float32))
    plain = load_cpu(folder, None)
    assert fingerprint(plain) == fingerprint(plain.float())
    assert fingerprint(plain)["quant_type"] is None


@pytest.mark.gpu
def test_fingerprint_is_the_same_on_every_device(source):
    assert fingerprint(load(source, device="cuda", progress=False)) == fingerprint(load_cpu(source))


CHANGES = {
    "a code": lambda m: m.model.layers[1].mlp.up_proj.weight[9].bitwise_xor_(1),
    "a scale": lambda m: m.model.layers[0].mlp.up_proj.quant_state.absmax[3].bitwise_xor_(1),
    "a nested scale": lambda m: m.model.layers[0].mlp.up_proj.quant_state.nested.absmax.mul_(2),
    "a bias": lambda m: m.model.layers[0].self_attn.q_proj.bias[0].add_(1),
    "a norm": lambda m: m.model.norm.weight[44].add_(1),
    "the head": lambda m: m.lm_head.weight[5, 5].add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_sees_every_change(source, change):
    model = load_cpu(source)
    before = fingerprint(model)
    with torch.no_grad():
        CHANGES[change](model)
    assert fingerprint(model)["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    "arguments", [{"quant_type": "fp4"}, {"double_quant": False}, {"blocksize": 128}]
)
def test_fingerprint_sees_the_quantization(source, arguments):
    record, other = fingerprint(load_cpu(source)), fingerprint(load_cpu(source, **arguments))
    assert other["sha256"] != record["sha256"]
    assert {name: other[name] for name in arguments} == arguments


def test_saving_streams_shard_by_shard(source, tmp_path, monkeypatch):
    import safetensors.torch

    write, sizes = safetensors.torch.save_file, []

    def recorded(tensors, path, metadata):
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        write(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", recorded)
    save(load_cpu(source), tmp_path / "out", max_shard_bytes=8000)
    assert len(sizes) > 3 and max(sizes) <= 8000


def test_the_header_says_pt(source, tmp_path):
    save(load_cpu(source), tmp_path / "out")
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}
