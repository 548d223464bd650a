"""The training loop: settings, schedules, accumulation, resume, data parallel, metrics."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_rows, write_tokenizer

from halfbyte.data import Batches, DataReport, Encoder, collate, encode_rows
from halfbyte.errors import CheckpointError, DataError
from halfbyte.lora import LoraConfig, inject, load_adapter
from halfbyte.tokenizer import Tokenizer
from halfbyte.train import TrainConfig, finetune
from halfbyte.train.checkpoints import (
    checkpoints,
    damage,
    find_checkpoint,
    newest_complete,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from halfbyte.train.monitor import keep_rows
from halfbyte.train.schedule import SCHEDULES, lr_factor

ROWS = tiny_rows(22)


def config(tmp_path, **changes) -> TrainConfig:
    """Six steps of four rows on the tiny model, quick and quiet."""
    settings = dict(
        model=tiny_model(),
        data=ROWS,
        output_dir=tmp_path / "out",
        lora_r=4,
        lora_alpha=8,
        learning_rate=1e-2,
        max_steps=6,
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
        progress=False,
    )
    return TrainConfig(**settings | changes)


def adapter_values(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapter(one: Path, other: Path, atol: float = 0.0) -> None:
    first, second = adapter_values(one), adapter_values(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=atol, msg=name)


# Settings


def test_defaults_are_those_of_qlora():
    plain = TrainConfig("model", "data.jsonl")
    expected = dict(
        quant_type="nf4",
        double_quant=True,
        lora_r=64,
        lora_alpha=16,
        lora_dropout=0.0,
        source_max_len=1024,
        target_max_len=256,
        train_on_source=False,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        warmup_ratio=0.03,
        per_device_batch_size=1,
        gradient_accumulation_steps=16,
        max_grad_norm=0.3,
        weight_decay=0.0,
        group_by_length=True,
        gradient_checkpointing=True,
        logging_steps=10,
        save_steps=250,
        save_total_limit=40,
    )
    assert {name: getattr(plain, name) for name in expected} == expected
    assert plain.steps(steps_per_epoch=7) == 10_000
    plain.check()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(quant_type="nf5"), ValueError, "quant_type: expected one of nf4, fp4, int4"),
        (dict(dtype="bf16"), ValueError, "dtype: expected one of bfloat16"),
        (dict(optim="adamw"), ValueError, "optim: expected one of fp32, 8bit"),
        (dict(lr_scheduler_type="cos"), ValueError, "lr_scheduler_type: expected one of constant"),
        (dict(report_to="mlflow"), ValueError, "report_to: expected none, tensorboard"),
        (dict(dataset_format="vicuna"), ValueError, "never released"),
        (dict(max_steps=3, num_epochs=1), ValueError, "max_steps and num_epochs are both set"),
        (dict(eval_data="x", eval_dataset_size=3), ValueError, "give one of them"),
        (dict(eval_steps=3), ValueError, "eval_steps is set but"),
        (dict(lora_r=0), ValueError, "lora_r: expected at least 1, got 0"),
        (dict(max_steps=0), ValueError, "max_steps: expected at least 1"),
        (dict(max_steps=1.5), TypeError, "max_steps: expected a whole number"),
        (dict(save_steps=None), TypeError, "save_steps: expected a whole number"),
        (dict(learning_rate="2e-4"), TypeError, "learning_rate: expected a number"),
        (dict(learning_rate=math.nan), ValueError, "learning_rate: expected 0 to inf, got nan"),
        (dict(lora_dropout=1.0), ValueError, "lora_dropout: 1.0 leaves nothing"),
        (dict(warmup_ratio=1.5), ValueError, "warmup_ratio: expected 0 to 1"),
        (dict(max_grad_norm=-1), ValueError, "max_grad_norm"),
        (dict(num_epochs=0), ValueError, "num_epochs: 0 leaves nothing"),
    ],
)
def test_settings_that_cannot_be(changes, error, message):
    with pytest.raises(error, match=message):
        TrainConfig("model", "data.jsonl", **changes).check()


def test_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="torch finds no GPU"):
        finetune(config(tmp_path, device="cuda"))


def test_steps_of_epochs():
    assert TrainConfig("m", "d", num_epochs=2).steps(7) == 14
    assert TrainConfig("m", "d", num_epochs=0.5).steps(7) == 4
    assert TrainConfig("m", "d", max_steps=3).steps(7) == 3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "ratio"), [(10, 0.03), (97, 0.25), (5, 0.0), (3, 1.0)])
def test_schedules_are_those_of_transformers(name, total, ratio):
    transformers = pytest.importorskip("transformers", reason="needs transformers to compare with")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    warmup = math.ceil(total * ratio)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, total)
    for step in range(total):
        ours = lr_factor(name, step, ratio, total)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


# One run


def test_loss_falls_and_files_are_written(tmp_path):
    result = finetune(config(tmp_path, max_steps=25, save_steps=10, save_total_limit=2))
    assert result.steps == 25 and len(result.losses) == 25
    assert sum(result.losses[-5:]) < sum(result.losses[:5]) - 0.5
    rows = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 26))
    assert [row["loss"] for row in rows] == result.losses
    assert all(row["tokens_per_second"] > 0 and row["learning_rate"] == 1e-2 for row in rows)
    assert rows[-1]["tokens"] == result.tokens > 0
    assert rows[-1]["epoch"] == round(25 / 6, 4)
    assert [path.name for path in checkpoints(tmp_path / "out")] == [
        "checkpoint-25",
        "checkpoint-20",
    ]
    assert result.peak_memory_bytes > 1e6 and result.resumed_from is None
    assert not result.model.training and not result.model.gradient_checkpointing


def test_adapter_is_what_the_model_holds(tmp_path):
    result = finetune(config(tmp_path))
    other = load_adapter(tiny_model(), result.adapter_dir)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, result.model(ids).logits, rtol=0, atol=0)
    assert_same_adapter(result.adapter_dir, tmp_path / "out" / "checkpoint-6")


def test_a_seed_makes_a_run_repeatable(tmp_path):
    first = finetune(config(tmp_path / "a", lora_dropout=0.1))
    second = finetune(config(tmp_path / "b", lora_dropout=0.1))
    other = finetune(config(tmp_path / "c", lora_dropout=0.1, seed=7))
    assert first.losses == second.losses != other.losses
    assert_same_adapter(first.adapter_dir, second.adapter_dir)


def test_first_step_is_the_formula(tmp_path):
    """Loss, gradient norm and clipped AdamW update of step 1, by torch alone."""
    result = finetune(config(tmp_path, max_steps=1, group_by_length=False))
    model = inject(
        tiny_model(), LoraConfig(r=4, lora_alpha=8), torch.Generator().manual_seed(42)
    ).train()
    report = DataReport("tokenized", True)
    rows = encode_rows(ROWS, Encoder(None), "tokenized", report)
    order = Batches(tuple(len(row.ids) for row in rows), 2, 2, 1, 42, False).rows(0)
    ids, labels = collate([rows[index] for index in order], pad_id=0)
    logits = model(ids).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
    torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0).step()
    row = json.loads(result.metrics_path.read_text())
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for (name, ours), theirs in zip(
        result.model.named_parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(("batch", "accumulation"), [(1, 4), (2, 2)])
def test_accumulation_equals_a_big_batch(tmp_path, batch, accumulation):
    sizes = dict(per_device_batch_size=batch, gradient_accumulation_steps=accumulation)
    parts = finetune(config(tmp_path / "parts", max_steps=7, **sizes))
    whole = finetune(
        config(
            tmp_path / "whole",
            max_steps=7,
            per_device_batch_size=4,
            gradient_accumulation_steps=1,
        )
    )
    assert parts.losses == pytest.approx(whole.losses, abs=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    on = finetune(config(tmp_path / "on", lora_dropout=0.1))
    off = finetune(config(tmp_path / "off", lora_dropout=0.1, gradient_checkpointing=False))
    assert on.losses == off.losses


def test_schedule_reaches_the_optimizer(tmp_path):
    settings = dict(lr_scheduler_type="linear", warmup_ratio=0.5)
    result = finetune(config(tmp_path, **settings))
    rows = [json.loads(line) for line in result.metrics_path.read_text().splitlines()]
    expected = [0.0, 1 / 3, 2 / 3, 1.0, 2 / 3, 1 / 3]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 * e for e in expected])


def test_given_adapter_goes_on_training(tmp_path):
    first = finetune(config(tmp_path / "a"))
    model = load_adapter(tiny_model(), first.adapter_dir, trainable=True)
    second = finetune(config(tmp_path / "b", model=model))
    assert second.losses[0] < first.losses[0]
    frozen = load_adapter(tiny_model(), first.adapter_dir)
    with pytest.raises(ValueError, match="an adapter that is frozen"):
        finetune(config(tmp_path / "c", model=frozen))


def test_8bit_state(tmp_path):
    base = dict(lora_r=128, max_steps=4)
    exact = finetune(config(tmp_path / "32", **base))
    rounded = finetune(config(tmp_path / "8", optim="8bit", **base))
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, abs=0.1)


def test_text_rows_from_a_file_with_a_saved_model(tmp_path):
    from halfbyte.checkpoint import save

    save(tiny_model(), tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "x"}]))
    result = finetune(
        config(tmp_path, model=str(tmp_path / "base"), data=data, dtype="float32", max_steps=12)
    )
    assert result.losses[-1] < result.losses[0]
    assert (result.report.format, result.report.detected) == ("prompt-completion", True)
    assert result.report.examples == [(13, "no field 'completion'")]
    record = json.loads((result.adapter_dir / "halfbyte_base.json").read_text())
    assert record["quant_type"] == "nf4"


# Bad data, bad numbers


def test_no_usable_rows(tmp_path):
    with pytest.raises(DataError, match="no usable row"):
        finetune(config(tmp_path, data=[{"input_ids": [3]}]))
    with pytest.raises(DataError, match="the data holds no rows"):
        finetune(config(tmp_path, data=[]))
    with pytest.raises(DataError, match="the eval data holds no rows"):
        finetune(config(tmp_path, eval_data=[]))


def test_rows_longer_than_the_model(tmp_path):
    long = {"input_ids": list(range(2, 202))}
    result = finetune(config(tmp_path, data=[*ROWS, long], max_steps=1))
    assert result.report.truncated == 1
    with pytest.raises(DataError, match="strict: every row must be usable"):
        finetune(config(tmp_path / "b", data=[*ROWS, {"text": "x"}], strict=True))


def test_nan_is_caught_before_the_weights_change(tmp_path):
    """A poisoned embedding row turns up in step 3; the error names the rows that hold it."""
    model = tiny_model()
    rows = [{"input_ids": [token for token in row["input_ids"] if token != 7]} for row in ROWS]
    rows[4]["input_ids"][2] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    settings = dict(model=model, data=rows, group_by_length=False, save_steps=1, max_steps=9)
    with pytest.raises(FloatingPointError, match=r"loss is nan.*in rows \[.*\b5\b") as error:
        finetune(config(tmp_path, **settings))
    step = int(str(error.value).split()[1].rstrip(":"))
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(value.isfinite().all() for value in values.values())
    assert newest_complete(tmp_path / "out")[0].name == f"checkpoint-{step - 1}"
    saved = adapter_values(tmp_path / "out" / f"checkpoint-{step - 1}")
    for name, value in values.items():
        torch.testing.assert_close(value, saved["base_model.model." + name], rtol=0, atol=0)


# Evaluation


def test_eval_loss_is_the_mean_over_labels(tmp_path):
    result = finetune(config(tmp_path, eval_data=ROWS[:5], data=ROWS[5:], eval_steps=4))
    assert list(result.eval_losses) == [4, 6]
    total = count = 0.0
    for row in ROWS[:5]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = result.model(ids).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += (labels[1:] != -100).sum().item()
    assert result.eval_losses[6] == pytest.approx(total / count, abs=1e-5)


def test_eval_rows_are_held_out_and_evaluation_draws_nothing(tmp_path):
    without = finetune(config(tmp_path / "a", lora_dropout=0.2, eval_dataset_size=5))
    often = finetune(config(tmp_path / "b", lora_dropout=0.2, eval_dataset_size=5, eval_steps=1))
    assert without.losses == often.losses
    assert list(without.eval_losses) == [6] and len(often.eval_losses) == 6
    with pytest.raises(DataError, match="leaves none to train on"):
        finetune(config(tmp_path / "c", eval_dataset_size=22))


# What is told


def test_loss_curve(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    drawn = finetune(config(tmp_path / "a", max_steps=2, eval_dataset_size=2))
    assert drawn.loss_curve.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert finetune(config(tmp_path / "b", max_steps=1)).loss_curve is None


def test_terminal_lines(tmp_path, capsys):
    settings = dict(progress=True, logging_steps=2, eval_dataset_size=3, max_steps=5)
    finetune(config(tmp_path, **settings))
    text = capsys.readouterr().err
    assert "data: 22 rows in format tokenized (detected from the columns): 22 sequences" in text
    assert "constant from the first step, without warm-up" in text
    assert "step 2: loss" in text and "step 4: loss" in text and "step 3: loss" not in text
    assert "step 5: eval loss" in text and "tokens/s" in text
    assert f"adapter: {tmp_path / 'out' / 'adapter'}" in text


def test_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    finetune(config(tmp_path, progress=True))
    text = capsys.readouterr().err
    assert "6/6" in text and "tokens/s" in text and "ETA" in text
    assert "step 6: loss" not in text


def test_trackers_are_told_every_logging_steps(tmp_path, monkeypatch):
    told = []

    class FakeRun:
        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    def init(dir, config, resume):
        assert config["learning_rate"] == 1e-2 and config["model"] == "<Decoder>"
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    settings = dict(logging_steps=3, eval_dataset_size=2, eval_steps=2, report_to=("wandb",))
    result = finetune(config(tmp_path, **settings))
    assert told[-1] == "finished"
    steps = [step for step, values in told[:-1] if "train/loss" in values]
    assert steps == [3, 6]
    assert [s for s, values in told[:-1] if "train/eval_loss" in values] == [2, 4, 6]
    assert told[1][1]["train/loss"] == result.losses[2]


def test_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        finetune(config(tmp_path, report_to="wandb"))


def test_keep_rows_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3}\n{"st')
    kept = keep_rows(path, 2)
    assert [row["step"] for row in kept] == [1, 2]
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    assert keep_rows(tmp_path / "none.jsonl", 5) == []


# Checkpoints


def fill(folder: Path) -> None:
    (folder / "a").write_bytes(b"one")
    (folder / "b").write_bytes(b"two")


def test_a_checkpoint_is_complete_or_passed_over(tmp_path):
    for step in (5, 10, 20):
        write_checkpoint(tmp_path / f"checkpoint-{step}", fill)
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-20", [])
    (tmp_path / "checkpoint-20" / "a").write_bytes(b"onE")
    (tmp_path / "checkpoint-10" / "complete.json").unlink()
    assert damage(tmp_path / "checkpoint-20") == "a is not what was written"
    assert damage(tmp_path / "checkpoint-10") == "complete.json is missing"
    folder, notes = newest_complete(tmp_path)
    assert folder == tmp_path / "checkpoint-5" and len(notes) == 2
    (tmp_path / "checkpoint-5" / "b").unlink()
    assert newest_complete(tmp_path)[0] is None


def test_write_that_fails_leaves_the_old_checkpoint(tmp_path):
    target = tmp_path / "checkpoint-5"
    write_checkpoint(target, fill)

    def broken(folder: Path) -> None:
        (folder / "a").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(target, broken)
    assert damage(target) is None and checkpoints(tmp_path) == [target]
    write_checkpoint(target, fill)
    assert damage(target) is None


def test_what_resume_means(tmp_path):
    assert find_checkpoint(tmp_path, "auto") == (None, [])
    assert find_checkpoint(tmp_path, False) == (None, [])
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        find_checkpoint(tmp_path, True)
    write_checkpoint(tmp_path / "checkpoint-3", fill)
    write_checkpoint(tmp_path / "checkpoint-4", fill)
    assert find_checkpoint(tmp_path, "auto")[0] == tmp_path / "checkpoint-4"
    assert find_checkpoint(tmp_path, tmp_path / "checkpoint-3")[0].name == "checkpoint-3"
    with pytest.raises(FileExistsError, match="checkpoint-4 exists"):
        find_checkpoint(tmp_path, False)
    with pytest.raises(FileNotFoundError, match="not a checkpoint folder"):
        find_checkpoint(tmp_path, tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-3" / "a").unlink()
    with pytest.raises(CheckpointError, match="is damaged: a is missing"):
        find_checkpoint(tmp_path, tmp_path / "checkpoint-3")


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist()

    np.random.normal()
    state = rng_state(torch.device("cpu"))
    torch.save([state], tmp_path / "rng.pt")
    drawn = draw()
    (loaded,) = torch.load(tmp_path / "rng.pt", weights_only=True)
    set_rng_state(loaded, torch.device("cpu"))
    assert draw() == drawn


# Resume


@pytest.mark.parametrize("optim", ["fp32", "8bit"])
def test_resume_is_exact(tmp_path, optim):
    settings = dict(lora_dropout=0.1, optim=optim, lora_r=128, eval_dataset_size=3, eval_steps=2)
    whole = finetune(config(tmp_path / "whole", max_steps=9, **settings))
    finetune(config(tmp_path / "parts", max_steps=4, **settings))
    with (tmp_path / "parts" / "out" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "loss": 99}\n{"s')
    resumed = finetune(config(tmp_path / "parts", max_steps=9, **settings))
    assert resumed.resumed_from == 4
    assert resumed.losses == whole.losses
    assert resumed.tokens == whole.tokens
    assert resumed.eval_losses == {4: resumed.eval_losses[4], **whole.eval_losses}
    assert_same_adapter(resumed.adapter_dir, whole.adapter_dir)


@pytest.mark.gpu
def test_resume_is_exact_on_a_gpu(tmp_path):
    from halfbyte.checkpoint import save

    save(tiny_model(), tmp_path / "base")
    base = dict(model=str(tmp_path / "base"), device="cuda", lora_dropout=0.1, lora_r=64)
    for optim in ("fp32", "8bit"):
        whole = finetune(config(tmp_path / f"whole-{optim}", max_steps=9, optim=optim, **base))
        finetune(config(tmp_path / optim, max_steps=4, optim=optim, **base))
        resumed = finetune(config(tmp_path / optim, max_steps=9, optim=optim, **base))
        assert resumed.resumed_from == 4 and resumed.losses == whole.losses
        assert_same_adapter(resumed.adapter_dir, whole.adapter_dir)
        assert not torch.are_deterministic_algorithms_enabled()


def test_finished_run_returns_at_once(tmp_path):
    first = finetune(config(tmp_path))
    again = finetune(config(tmp_path))
    assert again.resumed_from == 6 and again.losses == first.losses
    assert_same_adapter(again.adapter_dir, tmp_path / "out" / "checkpoint-6")


def test_resume_into_another_run_is_refused(tmp_path):
    finetune(config(tmp_path, max_steps=2))
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 then, 0.02 now"):
        finetune(config(tmp_path, learning_rate=2e-2))
    with pytest.raises(ValueError, match="data: "):
        finetune(config(tmp_path, data=ROWS[1:]))
    with pytest.raises(ValueError, match="base: "):
        finetune(config(tmp_path, model=tiny_model(seed=5)))
    with pytest.raises(FileExistsError, match="resume is False"):
        finetune(config(tmp_path, resume=False))


def test_damaged_newest_checkpoint_falls_back(tmp_path):
    whole = finetune(config(tmp_path / "whole"))
    finetune(config(tmp_path, max_steps=4, save_steps=2))
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged"):
        resumed = finetune(config(tmp_path))
    assert resumed.resumed_from == 2 and resumed.losses == whole.losses
    assert damage(tmp_path / "out" / "checkpoint-6") is None


@pytest.fixture(scope="module")
def processes():
    """Start processes that run a function of this module, each in half a blink.

    They are forked from a server that has imported all that is slow to import and has never
    computed anything, so it has no threads.
    """
    context = multiprocessing.get_context("forkserver")
    slow_imports = ["torch._dynamo", "torch.distributed", "matplotlib.backends.backend_agg"]
    context.set_forkserver_preload([__name__, *slow_imports])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), before])
    started = []

    def start(log: Path, function, *args, **environment) -> multiprocessing.Process:
        process = context.Process(target=logged, args=(log, environment, function, args))
        process.start()
        started.append(process)
        return process

    yield start
    os.environ["PYTHONPATH"] = before
    for process in started:
        process.kill()
        process.join()
        process.close()


def logged(log: Path, environment: dict[str, str], function, args) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def write_and_die(folder: Path, moment: int) -> None:
    """Write checkpoint-10, but be killed at the given sync or rename."""
    left = [moment]

    def dying(function):
        def call(*args):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args)

        return call

    os.fsync, Path.rename = dying(os.fsync), dying(Path.rename)
    write_checkpoint(folder / "checkpoint-10", fill)


def test_killed_at_every_moment_of_a_save(tmp_path, processes):
    write_checkpoint(tmp_path / "checkpoint-5", fill)
    found = []
    for moment in range(7):
        process = processes(tmp_path / "log", write_and_die, tmp_path, moment)
        process.join()
        found.append((newest_step(tmp_path), process.exitcode))
        assert newest_complete(tmp_path)[1] == []
        shutil.rmtree(tmp_path / "checkpoint-10", ignore_errors=True)
    assert found == [(5, -signal.SIGKILL)] * 5 + [(10, -signal.SIGKILL), (10, 0)]


def run_to_be_killed(folder: Path) -> None:
    finetune(config(folder, max_steps=40, save_steps=2, lora_dropout=0.1))


def test_killed_at_any_moment_and_resumed_to_the_bit(tmp_path, processes):
    """SIGKILL at random moments, among them during saves, until the run gets through."""
    start(run_to_be_killed, whole := tmp_path / "whole", processes).join()
    rng, kills, output_dir = random.Random(0), 0, tmp_path / "killed" / "out"
    for _ in range(15):
        first = newest_step(output_dir)
        process = start(run_to_be_killed, tmp_path / "killed", processes)
        while process.is_alive() and newest_step(output_dir) < first + 6:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0:
            break
    assert process.exitcode == 0 and kills >= 3
    assert losses_of(output_dir) == losses_of(whole / "out")
    assert_same_adapter(output_dir / "adapter", whole / "out" / "adapter")
    assert not list(output_dir.glob(".checkpoint-*"))


def start(function, folder: Path, processes) -> multiprocessing.Process:
    return processes(folder / "log", function, folder)


def losses_of(output_dir: Path) -> list[float]:
    rows = [json.loads(row) for row in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def newest_step(output_dir: Path) -> int:
    found = checkpoints(output_dir)
    return int(found[0].name.split("-")[1]) if found else 0


def run_to_be_stopped(folder: Path) -> None:
    finetune(config(folder, max_steps=100_000, save_steps=100_000, progress=True, logging_steps=1))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_stop_signals_save_and_say_how_to_resume(tmp_path, processes, signum, code):
    process, log = start(run_to_be_stopped, tmp_path, processes), tmp_path / "log"
    while process.is_alive() and not (log.exists() and "\nstep 3:" in log.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signum)
    process.join()
    assert process.exitcode == code, log.read_text()
    folder, _ = newest_complete(tmp_path / "out")
    step = newest_step(tmp_path / "out")
    assert step >= 3
    assert f"saved {folder}; the same command continues from it" in log.read_text()
    assert ("KeyboardInterrupt: stopped after" in log.read_text()) == (signum == signal.SIGINT)
    resumed = finetune(config(tmp_path, max_steps=step + 2))
    assert resumed.resumed_from == step
    whole = finetune(config(tmp_path / "whole", max_steps=step + 2))
    assert resumed.losses == pytest.approx(whole.losses, abs=1e-4)


# Data parallel


def run_rank(folder: Path, max_steps: int, model_seed: int) -> None:
    rank = int(os.environ["RANK"])
    torch.manual_seed(rank)
    finetune(
        config(
            folder,
            model=tiny_model(model_seed * rank),
            gradient_accumulation_steps=1,
            max_steps=max_steps,
            save_steps=3,
            eval_dataset_size=3,
            eval_steps=5,
        )
    )


def two_ranks(processes, folder: Path, *args) -> list[tuple[int, str]]:
    """Exit code and output of two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    place["WORLD_SIZE"] = "2"
    logs = [folder / f"log-{rank}" for rank in range(2)]
    ranks = [
        processes(log, run_rank, folder, *args, RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.join(120)
    return [(process.exitcode, log.read_text()) for process, log in zip(ranks, logs, strict=True)]


def test_two_processes_equal_one_with_twice_the_batch(tmp_path, processes):
    """Also across a resume, and with a last batch that leaves a rank without rows."""
    settings = dict(per_device_batch_size=4, gradient_accumulation_steps=1, max_steps=7)
    one = finetune(config(tmp_path / "one", eval_dataset_size=3, eval_steps=5, **settings))
    for max_steps in (4, 7):
        outputs = two_ranks(processes, tmp_path / "two", max_steps, 0)
        assert [code for code, _ in outputs] == [0, 0], outputs
    assert losses_of(tmp_path / "two" / "out") == pytest.approx(one.losses, abs=1e-5)
    rows = (tmp_path / "two" / "out" / "metrics.jsonl").read_text().splitlines()
    evals = {row["step"]: row["eval_loss"] for row in map(json.loads, rows) if "eval_loss" in row}
    assert {step: evals[step] for step in (5, 7)} == pytest.approx(one.eval_losses, abs=1e-5)
    assert_same_adapter(tmp_path / "two" / "out" / "adapter", one.adapter_dir, atol=1e-4)


def test_ranks_with_different_bases_are_refused(tmp_path, processes):
    for code, output in two_ranks(processes, tmp_path, 2, 1):
        assert code == 1 and "ValueError: the base model differs" in output


def test_tokenizer_pad_and_eos_never_matter(tmp_path):
    """Padding with a real token id leaves the losses as they are."""
    plain = finetune(config(tmp_path / "a", max_steps=3))
    model = tiny_model()
    model.tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path / "tokenizer"))
    assert finetune(config(tmp_path / "b", model=model, max_steps=3)).losses == plain.losses
