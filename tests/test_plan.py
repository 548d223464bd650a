"""The memory plan: published sizes, a measured peak, and what the command shows."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from halfbyte import checkpoint
from halfbyte.cli import app
from halfbyte.errors import HalfbyteError
from halfbyte.models import DecoderConfig
from halfbyte.plan import Setup, footprint, parse_bytes, plan

# hidden, intermediate, layers, heads
SHAPES = {
    "7B": (4096, 11008, 32, 32),
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


# LoRA parameters in millions at r = 64, GB of fp32 state, KB a token of checkpoints and of the
# recomputed layer: computed by hand from the shapes.
PUBLISHED = {
    "7B": (159.9, 1.28, 262, 154),
    "13B": (250.3, 2.00, 410, 193),
    "33B": (487.6, 3.90, 799, 250),
    "65B": (799.5, 6.40, 1311, 307),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_sizes_of_llama(size):
    lora, state, checkpoints, recompute = PUBLISHED[size]
    found = footprint(config(size), Setup(seq=1000))
    assert found.adapter / 4e6 == pytest.approx(lora, rel=1e-3)
    assert found.state / 1e9 == pytest.approx(state, rel=3e-3)
    assert found.checkpoints / 1e6 == pytest.approx(checkpoints, rel=3e-3)
    assert found.recompute / 1e6 == pytest.approx(recompute, rel=5e-3)
    eight = footprint(config(size), Setup(seq=1000, optim="8bit"))
    assert eight.state / found.state == pytest.approx(2.03 / 8, rel=1e-3)


def test_a_measured_peak_is_met():
    # benches/results/journey.jsonl: one H200, 4 x 512 tokens, r = 64.
    peak = footprint(config("7B"), Setup(seq=512, batch=4)).peak
    assert peak / 1e9 == pytest.approx(6.986, rel=0.05)


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
    needs = {gpu: plan(config("7B"), setup, parse_bytes(gpu)).needed for gpu in ("24GB", "6GB")}
    assert needs == {"24GB": "nothing paged", "6GB": "state paged"}
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


def test_configs_are_found_where_models_are(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw_config("7B")))
    assert checkpoint.read_config(tmp_path) == checkpoint.read_config(tmp_path / "config.json")
    with pytest.raises((FileNotFoundError, HalfbyteError)):
        checkpoint.read_config(tmp_path / "nothing")
