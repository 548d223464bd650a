"""The memory plan: published sizes, a measured peak, and what the command shows."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from halfbyte import Linear4bit, LoraConfig, _core, checkpoint, lora
from halfbyte.cli import app
from halfbyte.errors import HalfbyteError
from halfbyte.models import Decoder, DecoderConfig, recompute
from halfbyte.ops.quant_state import Nested, QuantState
from halfbyte.plan import Setup, footprint, parse_bytes, plan

# hidden, intermediate, layers, heads
SHAPES = {
    "7B": (4096, 11008, 32, 32),
    "8B": (4096, 14336, 32, 32),
    "13B": (5120, 13824, 40, 40),
    "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}


def raw_config(size: str) -> dict:
    hidden, intermediate, layers, heads = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 16384,
    }


def config(size: str) -> DecoderConfig:
    return DecoderConfig.from_dict(raw_config(size))


# LoRA parameters in millions at r = 64, GB of fp32 state, KB a token of checkpoints: computed by
# hand from the shapes.
PUBLISHED = {
    "7B": (159.9, 1.28, 262),
    "13B": (250.3, 2.00, 410),
    "33B": (487.6, 3.90, 799),
    "65B": (799.5, 6.40, 1311),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_of_llama(size):
    lora, state, checkpoints = PUBLISHED[size]
    found = footprint(config(size), Setup(seq=1000))
    assert found.adapter / 4e6 == pytest.approx(lora, rel=1e-3)
    assert found.state / 1e9 == pytest.approx(state, rel=3e-3)
    assert found.checkpoints / 1e6 == pytest.approx(checkpoints, rel=3e-3)
    eight = footprint(config(size), Setup(seq=1000, optim="8bit"))
    assert eight.state / found.state == pytest.approx(2.03 / 8, rel=1e-3)


def measured() -> dict[str, dict]:
    """The newest row of each model that was trained under a cap."""
    lines = (Path(__file__).parents[1] / "benches/results/paging.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["bench"] == "paging_capped"]
    return {row["model"].upper(): row for row in rows}


@pytest.mark.parametrize("size", ["7B", "33B", "65B"])
def test_measured_peaks_are_met(size):
    row = measured()[size]
    planned = footprint(config(size), Setup(seq=row["seq"], batch=row["batch"], r=row["r"]))
    peak = planned.without_state().peak + row["stats"]["device_bytes"]
    assert peak / 1e9 == pytest.approx(row["peak_gb"], rel=0.05)


def storages(values) -> list:
    leaves = torch.utils._pytree.tree_leaves(values)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


class Meter(TorchDispatchMode):
    """Bytes of every tensor beside the model's, and the most there were; workspaces of kernels
    count.
    """

    def __init__(self, model):
        super().__init__()
        self.live = {param.untyped_storage()._cdata: 0 for param in model.parameters()}
        self.total = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outs = func(*args, **(kwargs or {}))
        # A view of a parameter is none of the step's.
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(outs):
            if storage._cdata not in given:
                self.add(storage)
        # Products dequantize one weight at a time: two codes a byte, two bytes a weight.
        codes = torch.utils._pytree.tree_leaves(args[1]) if "gemm_4bit" in str(func) else []
        workspace = max((4 * packed.numel() for packed in codes), default=0)
        self.most = max(self.most, self.total + workspace)
        return outs

    def add(self, storage):
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.total += storage.nbytes()
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.total -= self.live.pop(key)


def fake_model(config: DecoderConfig, r: int) -> Decoder:
    """A 4-bit model with an adapter, of tensors without memory."""
    model = Decoder(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            shape = (module.out_features, module.in_features)
            blocks = module.weight.numel() // 64
            nested = Nested(torch.empty(-(-blocks // 256)), torch.empty(256))
            absmax = torch.empty(blocks, dtype=torch.uint8)
            state = QuantState(absmax, nested, 0.0, 64, "nf4", shape, torch.bfloat16)
            layer = Linear4bit(module.in_features, module.out_features, bias=False)
            codes = torch.empty(module.weight.numel() // 2, 1, dtype=torch.uint8)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.set_quantized(codes, state))
            continue
        for leaf, value in module.named_parameters(recurse=False):
            setattr(module, leaf, torch.nn.Parameter(torch.empty(value.shape).bfloat16()))
    lora.inject(model, LoraConfig(r=r))
    model.train()
    model.gradient_checkpointing = True
    return model


@pytest.mark.parametrize("batch, seq, r", [(1, 512, 64), (2, 2048, 64), (1, 8192, 16)])
@pytest.mark.parametrize("size", ["7B", "65B", "8B"])
def test_activations_are_those_of_a_traced_step(monkeypatch, size, batch, seq, r):
    layers = 3
    config = DecoderConfig.from_dict(raw_config(size) | {"num_hidden_layers": layers})
    # Python takes a GPU's way; what kernels do is not traced.
    monkeypatch.setattr(FakeTensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(FakeTensor, "is_cpu", False, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    h200 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(recompute, "_random_state", lambda device: 0)
    for name in ("dequantize_4bit", "gemm_4bit"):
        monkeypatch.setattr(_core, name, lambda *_: None)
    with FakeTensorMode():
        model = fake_model(config, r)
        with Meter(model) as meter:
            ids = torch.zeros(batch, seq, dtype=torch.int64)
            model(ids, labels=ids, num_items=1).loss.backward()
    found = footprint(config, Setup(seq=seq, batch=batch, r=r))
    backward = dataclasses.replace(found, logits=0).activations
    assert backward == pytest.approx(meter.most, rel=0.03)
    gradients = sum(p.numel() for p in lora.adapter_parameters(model)) * 4
    assert found.gradients == found.adapter == gradients


def test_rungs_free_memory_and_the_longest_sequence_just_fits():
    setup = Setup(seq=4096, batch=2)
    found = plan(config("7B"), setup, parse_bytes("12GB"))
    peaks, longest = list(found.rungs.values()), list(found.longest.values())
    assert peaks == sorted(peaks, reverse=True) and longest == sorted(longest)
    for name, most in found.longest.items():
        fits = plan(config("7B"), dataclasses.replace(setup, seq=most), parse_bytes("12GB"))
        assert fits.rungs[name] <= found.available
        if most < 16384:
            over = dataclasses.replace(setup, seq=most + 1)
            assert plan(config("7B"), over, parse_bytes("12GB")).rungs[name] > found.available


def test_what_has_to_be_paged():
    setup = Setup(seq=512)
    needs = {gpu: plan(config("7B"), setup, parse_bytes(gpu)).needed for gpu in ("24GB", "6.5GB")}
    assert needs == {"24GB": "nothing paged", "6.5GB": "state paged"}
    assert plan(config("7B"), setup, parse_bytes("4GB")).needed is None


def test_accumulation_keeps_earlier_gradients():
    once = footprint(config("7B"), Setup(seq=512))
    often = footprint(config("7B"), Setup(seq=512, gradient_accumulation_steps=16))
    assert often.peak - once.peak == once.gradients


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GB", 24e9), ("16 GiB", 16 << 30), ("1.5g", 1.5e9), ("77", 77)]
)
def test_sizes_in_words(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "12XB", "-1GB", "ib"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="such as 24GB"):
        parse_bytes(text)


def test_bad_setups():
    with pytest.raises(ValueError, match="plan: batch"):
        Setup(seq=1, batch=0)
    with pytest.raises(ValueError, match="plan: optim"):
        Setup(seq=1, optim="4bit")


def test_the_command_needs_a_config_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("7B")))
    words = ["plan", str(tmp_path), "--gpu", "24GB", "--seq", "2048", "--batch", "4", "--r", "64"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    for part in ("4-bit base", "optimizer state", "1.28", "longest sequence", "fits with"):
        assert part in result.output
    words[3] = "3GB"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "do not fit into 3GB" in result.output
    words[3] = "24"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "do not fit into 24 bytes" in result.output


def test_sequences_end_with_the_context(tmp_path):
    config = raw_config("7B") | {"max_position_embeddings": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--seq", "1001"])
    assert result.exit_code == 1 and "at most the model's context of 1000 tokens" in result.output
    assert "fits with" not in result.output
    result = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert result.exit_code == 0 and "1 x 1000 tokens" in " ".join(result.output.split())


def test_configs_are_found_where_models_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("7B")))
    assert checkpoint.read_config(tmp_path) == checkpoint.read_config(tmp_path / "config.json")
    with pytest.raises((FileNotFoundError, HalfbyteError)):
        checkpoint.read_config(tmp_path / "nothing")
