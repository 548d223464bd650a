"""The command line: every command does its work, and errors are one message."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from tiny import tiny_folder
from typer.testing import CliRunner

import halfbyte
from halfbyte import cli
from halfbyte.checkpoint import load
from halfbyte.lora import load_adapter
from halfbyte.sampling import Sampling
from halfbyte.train import TrainConfig

DATA = [{"prompt": "hello", "completion": "world"}] * 4


def run(*words: object, stdin: str | None = None):
    return CliRunner().invoke(cli.app, [str(word) for word in words], input=stdin)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("cli") / "base")


@pytest.fixture(scope="module")
def trained(base) -> Path:
    """The folder of a two-step run made by the command."""
    data, out = base.parent / "data.jsonl", base.parent / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    options = "--max-steps 2 --lora-r 4 --learning-rate 0.01 --gradient-accumulation-steps 2 "
    options += "--target-modules q_proj --target-modules v_proj --dtype float32 --device cpu"
    result = run("finetune", base, data, "--output-dir", out, *options.split())
    assert result.exit_code == 0, result.output
    return out


def test_version_and_help():
    assert run("--version").output == f"halfbyte {metadata.version('halfbyte')}\n"
    for command in ("quantize", "finetune", "chat", "merge", "plan", "demo", "doctor"):
        assert command in run("--help").output
        assert run(command, "--help").exit_code == 0


def test_python_runs_the_package():
    command = [sys.executable, "-m", "halfbyte", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Usage: python -m halfbyte" in done.stdout, done.stderr


def test_quantize_writes_what_load_writes(base, tmp_path):
    out = tmp_path / "out"
    result = run(
        "quantize", base, out, "--quant-type", "fp4", "--blocksize", 128, "--no-double-quant"
    )
    assert result.exit_code == 0, result.output
    layer = load(out, device="cpu", quant_type="fp4").model.layers[0].mlp.up_proj
    expected = load(base, "fp4", False, blocksize=128, device="cpu").model.layers[0].mlp.up_proj
    assert torch.equal(layer.weight, expected.weight)
    assert layer.quant_state.nested is None and layer.quant_state.blocksize == 128


def test_finetune_takes_every_setting_of_the_config(trained):
    fields = json.loads((trained / "adapter/adapter_config.json").read_text())
    assert fields["r"] == 4 and sorted(fields["target_modules"]) == ["q_proj", "v_proj"]
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows if "loss" in row] == [0.01, 0.01]


def test_options_are_the_fields_of_the_config_with_their_defaults():
    parameters = {p.name: p for p in cli._parameters(TrainConfig)}
    assert list(parameters) == [field.name for field in dataclasses.fields(TrainConfig)]
    given = {n: p.default for n, p in parameters.items()} | {"model": "m", "data": "d"}
    assert cli._train_config(given) == TrainConfig("m", "d")
    assert Sampling() == Sampling(**{p.name: p.default for p in cli._parameters(Sampling)})


@pytest.mark.parametrize("settings", [TrainConfig, Sampling])
def test_every_option_explains_itself(settings):
    names = {field.name for field in dataclasses.fields(settings)}
    assert cli._field_help(settings).keys() >= names


@pytest.mark.parametrize("none, false", [("none", "false"), ("None", "False")])
def test_words_that_stand_for_python_values(none, false):
    """As the command line writes them, and as the help, which is the settings' own, does."""
    given = {p.name: p.default for p in cli._parameters(TrainConfig)}
    given |= {"model": "m", "data": "d", "quant_type": none, "resume": false}
    config = cli._train_config(given)
    assert config.quant_type is None and config.resume is False
    assert config.target_modules == "all-linear" and config.report_to == "none"


def test_chat_answers_the_lines_of_standard_input(base, trained):
    words = ["chat", base, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 4]
    plain = run(*words, stdin="hi\n")
    again = run(*words, stdin="hi\n")
    assert plain.exit_code == 0, plain.output
    assert plain.output == again.output
    model = load(base, device="cpu", dtype=torch.float32)
    answer = halfbyte.chat(model, "hi", max_new_tokens=4)
    assert printable(answer) in plain.output
    load_adapter(model, trained / "adapter")
    adapted = run(*words, "--adapter", trained / "adapter", stdin="hi\n")
    assert printable(halfbyte.chat(model, "hi", max_new_tokens=4)) in adapted.output


def printable(text: str) -> str:
    """Without control characters, which the terminal chat leaves out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def test_quantize_replaces_a_model_only_when_told_to(base, tmp_path):
    out = tmp_path / "out"
    assert run("quantize", base, out, "--quant-type", "none", "--device", "cpu").exit_code == 0
    refused = run("quantize", base, out, "--device", "cpu")
    assert refused.exit_code == 1 and "overwrite" in refused.output
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    done = run("quantize", base, out, "--overwrite", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "quantization_config" in json.loads((out / "config.json").read_text())


def test_merge_adds_the_adapter_to_the_dequantized_weights(base, trained, tmp_path):
    out = tmp_path / "merged"
    words = [base, trained / "adapter", out, "--dtype", "float32", "--device", "cpu"]
    result = run("merge", *words)
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[5, 6, 7, 8]])
    adapted = load(base, device="cpu", dtype=torch.float32)
    load_adapter(adapted, trained / "adapter")
    merged = load(out, None, device="cpu", dtype=torch.float32)
    assert not any(isinstance(module, halfbyte.Linear4bit) for module in merged.modules())
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_merge_into_the_original_starts_from_its_weights(base, trained, tmp_path):
    out = tmp_path / "merged"
    words = [base, trained / "adapter", out, "--dtype", "float32", "--device", "cpu"]
    assert run("merge", *words, "--original", base).exit_code == 0
    untouched = "model.layers.0.mlp.up_proj.weight"
    original = load(base, None, device="cpu", dtype=torch.float32).state_dict()
    merged = load(out, None, device="cpu", dtype=torch.float32).state_dict()
    assert torch.equal(merged[untouched], original[untouched])


def test_doctor_runs():
    result = run("doctor")
    assert result.exit_code == 0 and "CUDA kernels" in result.output


ERRORS = {
    "missing model": (["chat", "no/such/folder.gguf"], "no/such/folder.gguf"),
    "bad choice": (["quantize", "BASE", "OUT", "--dtype", "int8"], "expected one of bfloat16"),
    "bad setting": (["finetune", "BASE", "DATA", "--lora-r", "0"], "lora_r"),
    "no such device": (["chat", "BASE", "--device", "gpu"], "expected cpu or cuda, got gpu"),
    "no such device to train on": (
        ["finetune", "BASE", "DATA", "--device", "gpu", "--output-dir", "OUT"],
        "device: expected cpu or cuda, got gpu",
    ),
    "missing data": (["finetune", "BASE", "nothing.jsonl", "--output-dir", "OUT"], "nothing.jsonl"),
    "what is wrong without a model": (["chat", "nowhere", "--top-p", "2"], "top_p: expected"),
    "what is in the way of a merge": (["merge", "nowhere", "nothing", "DATA"], "got a file of"),
    "missing adapter": (["merge", "BASE", "nothing", "OUT"], "adapter_config.json"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_message(case, base, tmp_path):
    words, expected = ERRORS[case]
    names = {"BASE": base, "OUT": tmp_path / "out", "DATA": base.parent / "data.jsonl"}
    words = [names.get(word, word) for word in words]
    result = run(*words)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("error: ") or "error: " in result.output
    assert expected in result.output and "Traceback" not in result.output
    assert run("--debug", *words).exception.__class__ is not SystemExit


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["quantize", "chat", "finetune", "merge", "demo"])
def test_a_gpu_that_is_not_there_is_one_message(command, base, tmp_path):
    words = {
        "quantize": [base, tmp_path / "out"],
        "chat": [base],
        "finetune": [base, base.parent / "data.jsonl", "--output-dir", tmp_path / "out"],
        "merge": [base, tmp_path, tmp_path / "out"],
        "demo": ["--model", base, "--output-dir", tmp_path / "out"],
    }
    result = run(command, *words[command], "--device", "cuda")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "error: device cuda: " in result.output and "halfbyte doctor" in result.output


def test_a_single_target_module_is_a_name(base, trained, tmp_path):
    options = "--max-steps 1 --lora-r 4 --dtype float32 --device cpu --save-total-limit none "
    options += "--target-modules q_proj --modules-to-save lm_head"
    data = base.parent / "data.jsonl"
    result = run("finetune", base, data, "--output-dir", tmp_path, *options.split())
    assert result.exit_code == 0, result.output
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (fields["target_modules"], fields["modules_to_save"]) == (["q_proj"], ["lm_head"])
    state = json.loads((tmp_path / "checkpoint-1/state.json").read_text())
    assert state["config"]["save_total_limit"] is None


def test_a_home_folder_that_no_shell_has_expanded(base, monkeypatch, tmp_path):
    """As in --output-dir=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (tmp_path / "base").symlink_to(base)
    options = "--output-dir=~/run --max-steps 1 --lora-r 4 --device cpu"
    result = run("finetune", "~/base", "~/data.jsonl", *options.split())
    assert result.exit_code == 0, result.output
    result = run("merge", "~/base", "~/run/adapter", "~/merged", "--device", "cpu")
    assert result.exit_code == 0, result.output
    chat = run("chat", "~/base", "--adapter=~/run/adapter", "--device", "cpu", stdin="hi\n")
    assert chat.exit_code == 0, chat.output
    folders = cli._named_folders(["a=~/run/adapter"], "base")
    halfbyte.Engine(load(base, progress=False), folders, max_batch=1).close()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "data.jsonl", "merged", "run"}


def test_no_color_means_none(base, monkeypatch):
    words = ["quantize", str(base), "out", "--dtype", "int8"]
    assert "\x1b[" in CliRunner().invoke(cli.app, words, color=True).output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in CliRunner().invoke(cli.app, words, color=True).output


def test_a_chat_whose_standard_input_is_closed_ends(base, monkeypatch):
    from halfbyte.chat import Conversation, repl
    from halfbyte.checkpoint import load

    monkeypatch.setattr("sys.stdin", None)
    repl(Conversation(load(base, progress=False)))


def test_a_bug_keeps_its_traceback(monkeypatch):
    from halfbyte import doctor

    def broken() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(doctor, "report", broken)
    assert isinstance(run("doctor").exception, KeyError)


def test_warnings_are_one_line(base, trained, tmp_path):
    """An adapter on another quantization of its base is told about, and loads."""
    code = "import sys; from halfbyte.cli import main; sys.argv[0] = 'halfbyte'; main()"
    words = [
        "chat",
        base,
        "--adapter",
        trained / "adapter",
        "--quant-type",
        "fp4",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "quant_type" in lines[0]
