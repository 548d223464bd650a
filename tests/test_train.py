"""The training loop: settings, schedules, accumulation, resume, data parallel, metrics."""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_folder, tiny_model, tiny_rows, write_tokenizer

from halfbyte import Engine, _core, quantize_4bit
from halfbyte.checkpoint import load, save
from halfbyte.data import Batches, DataReport, Encoder, collate, encode_rows
from halfbyte.errors import CheckpointError, DataError
from halfbyte.linear import Linear4bit
from halfbyte.lora import LoraConfig, LoRALinear, adapter_parameters, inject, load_adapter
from halfbyte.optim import AdamW
from halfbyte.tokenizer import Tokenizer
from halfbyte.train import TrainConfig, finetune, loop
from halfbyte.train.checkpoints import (
    checkpoints,
    damage,
    find_checkpoint,
    newest_complete,
    prune,
    rng_state,
    set_rng_state,
    write_checkpoint,
)
from halfbyte.train.monitor import Monitor, keep_rows
from halfbyte.train.output import claimed
from halfbyte.train.schedule import SCHEDULES, lr_factor
from halfbyte.train.setup import prepare
from halfbyte.train.world import World, join_world

ROWS = tiny_rows(22)
BLOCK = torch.linspace(-1, 1, 64)


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


def journey(base: Path, folder: Path) -> list:
    """What everything gives that makes tensors of its own."""
    model = load(base, dtype=torch.bfloat16, progress=False)
    settings = dict(temperature=0.7, top_p=0.9, repetition_penalty=1.2, logit_bias={7: 1.0}, seed=1)
    found = [model.generate([1, 2, 3], max_new_tokens=9, **settings), quantize_4bit(BLOCK)[0]]
    save(model, folder / "saved")
    run = finetune(config(folder, model=folder / "saved", optim="8bit", eval_dataset_size=4))
    tensors = adapter_values(run.adapter_dir)
    with Engine(load(folder / "saved", progress=False), {"own": run.adapter_dir}) as engine:
        found.append(engine.generate([1, 2, 3], adapter="own", max_new_tokens=9, logprobs=2))
    optimizer = AdamW(adapter_parameters(run.model), state="8bit")
    optimizer.load_state_dict(optimizer.export("torch"))
    saved = (folder / "saved/model.safetensors").read_bytes()
    return [*found, run.losses, run.eval_losses, saved, *tensors.values()]


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")])
def test_what_torch_makes_by_default_changes_nothing(tmp_path, default):
    base = tiny_folder(tmp_path / "base")
    expected = journey(base, tmp_path / "plain")
    before = torch.get_default_dtype()
    try:
        if isinstance(default, torch.dtype):
            torch.set_default_dtype(default)
        else:
            torch.set_default_device(default)
        got = journey(base, tmp_path / "changed")
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)
    assert all(map(_same, got, expected)) and len(got) == len(expected)


def _same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def adapter_values(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def adapter_pairs(one: Path, other: Path) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    first, second = adapter_values(one), adapter_values(other)
    assert first.keys() == second.keys()
    return [(name, value, second[name]) for name, value in first.items()]


def assert_same_adapter(one: Path, other: Path) -> None:
    for name, value, expected in adapter_pairs(one, other):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


def assert_close_adapter(one: Path, other: Path) -> None:
    """Where gradients were summed in another order: as a matrix, since Adam divides each gradient
    by its own size, and a single one that is nearly zero may step either way."""
    for name, value, expected in adapter_pairs(one, other):
        assert (value - expected).norm() <= 3e-4 * expected.norm(), name


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
        (dict(eval_dataset_size=0.1), TypeError, "eval_dataset_size: expected a whole number"),
        (dict(eval_dataset_size=-1), ValueError, "eval_dataset_size: expected at least 0, got -1"),
        (dict(adam_betas=(0.9,)), TypeError, r"adam_betas: expected two numbers, got \(0.9,\)"),
        (dict(adam_betas=(0.9, 1.0)), ValueError, r"adam_betas: expected .* in \[0, 1\)"),
        (dict(seed=None), TypeError, "seed: expected a whole number, got None"),
        (dict(data_seed="1"), TypeError, "data_seed: expected a whole number"),
        (dict(gradient_checkpointing="false"), TypeError, "gradient_checkpointing: expected True"),
        (dict(resume=3.5), TypeError, 'resume: expected "auto"'),
        (dict(num_epochs=0), ValueError, "num_epochs: 0 leaves nothing"),
        (dict(lora_alpha=0), ValueError, "lora_alpha: 0 leaves nothing"),
    ],
)
def test_settings_that_cannot_be(changes, error, message):
    with pytest.raises(error, match=message):
        TrainConfig("model", "data.jsonl", **changes).check()


def test_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(_core.CudaError, match="device cuda: .*halfbyte doctor"):
        finetune(config(tmp_path, device="cuda"))
    with pytest.raises(ValueError, match="device: expected cpu or cuda, got gpu"):
        finetune(config(tmp_path, device="gpu"))


def test_a_gpu_that_halfbyte_cannot_use_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_core, "cuda_status", lambda: "built without nvcc")
    with pytest.warns(UserWarning, match="uses the CPU .*: built without nvcc"):
        with join_world(None) as world:
            assert world.device == torch.device("cpu")


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


def first_targets(tmp_path, targets) -> list[str]:
    result = finetune(config(tmp_path / str(targets), target_modules=targets, max_steps=1))
    adapted = [name for name, one in result.model.named_modules() if isinstance(one, LoRALinear)]
    return [name.removeprefix("model.layers.0.") for name in adapted if ".layers.0." in name]


def test_target_modules_are_a_name_a_path_a_list_or_a_regular_expression(tmp_path):
    assert first_targets(tmp_path, "q_proj") == ["self_attn.q_proj"]
    assert first_targets(tmp_path, "mlp.up_proj") == ["mlp.up_proj"]
    both = ["self_attn.q_proj", "self_attn.k_proj"]
    assert first_targets(tmp_path, ("q_proj", "k_proj")) == both
    assert first_targets(tmp_path, r".*\.[qk]_proj") == both
    with pytest.raises(ValueError, match=r"no linear layer matches \['q_projj'\]"):
        first_targets(tmp_path, "q_projj")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_that_wants_no_gradients_gets_a_run_all_the_same(tmp_path, mode):
    base = tiny_folder(tmp_path / "base")
    expected = finetune(config(tmp_path / "plain", model=base, max_steps=2))
    with mode():
        assert not torch.is_grad_enabled()
        run = finetune(config(tmp_path, model=base, max_steps=2))
        assert not torch.is_grad_enabled()
    assert run.losses == expected.losses


def test_modules_to_save_are_layers(tmp_path):
    result = finetune(config(tmp_path, modules_to_save="lm_head", max_steps=1))
    assert "base_model.model.lm_head.weight" in adapter_values(result.adapter_dir)
    settings = dict(modules_to_save=["mlp"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"got \['model.layers.0.mlp', .*Hint: name what they"):
        finetune(config(tmp_path / "b", **settings))


def test_settings_that_a_given_adapter_overrules(tmp_path):
    model = inject(tiny_model(), LoraConfig(r=2, lora_alpha=3))
    settings = dict(model=model, lora_r=64, lora_alpha=8, max_steps=1)
    with pytest.warns(UserWarning, match=r"not used: lora_alpha 8 \(it has 3\)$"):
        finetune(config(tmp_path, **settings))
    state = json.loads((tmp_path / "out/checkpoint-1/state.json").read_text())
    assert state["settings"]["lora_alpha"] == [3]


# fp16


def step_gradients(tmp_path, dtype: torch.dtype, scale: float | None = None) -> torch.Tensor:
    """Of the first step, on a model whose last norm makes them tiny without rounding."""
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.model.norm.weight *= 2**-17
    settings = config(tmp_path, model=model, lora_dropout=0.0)
    world = World(0, 1, torch.device("cpu"))
    run = prepare(settings, world, Monitor(settings, tmp_path, True, False), tmp_path)
    with torch.no_grad():
        for number, parameter in enumerate(run.parameters):
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    run.loss_scale = run.loss_scale if scale is None else scale
    loop._accumulate(run)
    assert all(gradient.dtype == torch.float32 for gradient in loop._gradients(run))
    return torch.cat([gradient.flatten() for gradient in loop._gradients(run)])


def test_fp16_gradients_do_not_vanish(tmp_path):
    exact = step_gradients(tmp_path, torch.float32)
    scaled = step_gradients(tmp_path, torch.float16)
    unscaled = step_gradients(tmp_path, torch.float16, scale=1.0)
    assert (exact == 0).float().mean() < 0.01 and (scaled == 0).float().mean() < 0.01
    assert torch.cosine_similarity(scaled, exact, dim=0) > 0.999
    assert (scaled.norm() / exact.norm()).item() == pytest.approx(1, abs=0.01)
    assert (unscaled == 0).float().mean() > 0.3, "the scale is what keeps them"


def half_model():
    """Whose gradients, times 65536, are beyond fp16."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 100
    return model.half()


def test_fp16_overflow_halves_the_scale_and_resumes(tmp_path, capsys):
    settings = dict(lora_dropout=0.1, progress=True)
    whole = finetune(config(tmp_path / "a", model=half_model(), **settings))
    assert "step 1: fp16 overflow, loss scale now 32768" in capsys.readouterr().err
    finetune(config(tmp_path / "b", model=half_model(), max_steps=3, **settings))
    state = json.loads((tmp_path / "b/out/checkpoint-3/state.json").read_text())
    assert 1 <= state["loss_scale"] < 65536
    resumed = finetune(config(tmp_path / "b", model=half_model(), **settings))
    assert resumed.losses == whole.losses and all(map(math.isfinite, whole.losses))
    exact = finetune(config(tmp_path / "c", model=half_model().float(), lora_dropout=0.1))
    assert whole.losses == pytest.approx(exact.losses, rel=0.01)


# Bad data, bad numbers


def test_a_file_without_rows_is_named(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match=f"the data {path} holds no rows"):
        finetune(config(tmp_path, data=path))
    with pytest.raises(DataError, match=f"the eval data {path} holds no rows"):
        finetune(config(tmp_path, eval_data=path))


def test_no_usable_rows(tmp_path):
    with pytest.raises(DataError, match="^data: no usable row"):
        finetune(config(tmp_path, data=[{"input_ids": [3]}]))
    with pytest.raises(DataError, match="^eval data: cannot tell the row format"):
        finetune(config(tmp_path, eval_data=[{"a": 1}]))
    with pytest.raises(DataError, match="the data holds no rows"):
        finetune(config(tmp_path, data=[]))
    with pytest.raises(DataError, match="the eval data holds no rows"):
        finetune(config(tmp_path, eval_data=[]))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_nothing_behind(tmp_path):
    (tmp_path / "runs").mkdir()
    for output_dir in ("runs/one/two", "runs/one", "runs"):
        with pytest.raises(DataError, match="holds no rows"):
            finetune(config(tmp_path, data=[], output_dir=tmp_path / output_dir))
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        finetune(config(tmp_path, resume=True))
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


class Columns(list):
    """Rows that, as a datasets.Dataset does, give a dict of columns for a slice."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if isinstance(index, slice):
            return {name: [row[name] for row in found] for name in found[0]}
        return found


def test_rows_may_be_any_iterable_of_dicts(tmp_path):
    losses = finetune(config(tmp_path / "list", max_steps=1)).losses
    subset = torch.utils.data.Subset(ROWS, range(len(ROWS)))
    kinds = {"data set": Columns(ROWS), "subset": subset, "generator": (row for row in ROWS)}
    for name, rows in kinds.items():
        assert finetune(config(tmp_path / name, data=rows, max_steps=1)).losses == losses, name
    for wrong in (3, {"text": ["a"]}):
        with pytest.raises(TypeError, match="data: expected a file or rows, got (int|dict)"):
            finetune(config(tmp_path, data=wrong))
    with pytest.raises(TypeError, match="^eval_data: expected a file or rows, got int"):
        finetune(config(tmp_path, eval_data=3))


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


@pytest.fixture
def nan_in_step_4(monkeypatch):
    measure = loop._measure

    def broken(run, stop):
        losses, loss, norm, asked = measure(run, stop)
        return losses, loss * (math.nan if run.step == 3 else 1), norm, asked

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_measure", broken)
        yield patch


def test_the_weights_before_a_nan_are_saved_and_resumed_to_the_bit(tmp_path, nan_in_step_4):
    settings = dict(lora_dropout=0.1)
    with pytest.raises(FloatingPointError, match="resume .*checkpoint-3 by name .*lower learning"):
        finetune(config(tmp_path, **settings))
    nan_in_step_4.undo()
    resumed = finetune(config(tmp_path, **settings))
    assert resumed.resumed_from == 3
    assert resumed.losses == finetune(config(tmp_path / "whole", **settings)).losses


def test_a_nan_is_followed_by_a_lower_learning_rate(tmp_path, nan_in_step_4):
    with pytest.raises(FloatingPointError, match=r"resume='(.*)'") as error:
        finetune(config(tmp_path))
    nan_in_step_4.undo()
    named = re.search(r"resume='(.*)'", str(error.value))[1]
    with pytest.raises(ValueError, match="learning_rate: 0.01 then, 0.001 now"):
        finetune(config(tmp_path, learning_rate=1e-3))
    with pytest.raises(ValueError, match="weight_decay: 0.0 then, 0.1 now"):
        finetune(config(tmp_path, weight_decay=0.1, resume=named))
    with pytest.warns(UserWarning, match="no longer exact: learning_rate: 0.01 then, 0.001 now"):
        resumed = finetune(config(tmp_path, learning_rate=1e-3, resume=named))
    rows = [json.loads(line) for line in resumed.metrics_path.read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == [1e-2] * 3 + [1e-3] * 3


def test_a_nan_in_the_first_step_leaves_nothing_to_resume(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match="start again with a lower learning_rate"):
        finetune(config(tmp_path, model=model))
    assert checkpoints(tmp_path / "out") == []


# Evaluation


def test_eval_loss_that_is_not_finite_is_told_and_written_as_json(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    rows = [{"input_ids": [i for i in row["input_ids"] if i != 7]} for row in ROWS]
    bad = [*rows[:2], {"input_ids": [5, 7, 9]}]
    settings = dict(model=model, data=rows, eval_data=bad, per_device_batch_size=1, max_steps=2)
    with pytest.warns(UserWarning, match=r"step 2: eval loss is not finite in rows \[3\]"):
        result = finetune(config(tmp_path, **settings))
    assert math.isnan(result.eval_losses[2])
    last = result.metrics_path.read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail) == {"step": 2, "eval_loss": None}
    again = finetune(config(tmp_path, **settings))
    assert math.isnan(again.eval_losses[2])


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
    told, ids = [], []

    class FakeRun:
        id = "abc"

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    def init(dir, config, resume, id):
        assert config["learning_rate"] == 1e-2 and config["model"] == "<Decoder>"
        ids.append(id)
        return FakeRun()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    settings = dict(logging_steps=3, eval_dataset_size=2, eval_steps=2, report_to=("wandb",))
    result = finetune(config(tmp_path, **settings))
    assert told[-1] == "finished"
    steps = [step for step, values in told[:-1] if "train/loss" in values]
    assert steps == [3, 6]
    assert [s for s, values in told[:-1] if "train/eval_loss" in values] == [2, 4, 6]
    assert told[1][1]["train/loss"] == result.losses[2]
    finetune(config(tmp_path, **settings | dict(max_steps=7)))
    assert ids == [None, "abc"], "a resumed run goes on in the same W&B run"


def test_tensorboard_is_told_and_drops_what_a_resumed_run_repeats(tmp_path, monkeypatch):
    writers = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def close(self):
            self.closed = True

    fake = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    settings = dict(report_to="tensorboard", logging_steps=2)
    first = finetune(config(tmp_path, max_steps=3, **settings))
    second = finetune(config(tmp_path, max_steps=4, **settings))
    assert [writer.purge_step for writer in writers] == [1, 4]
    assert all(writer.closed for writer in writers)
    assert writers[0].folder == str(tmp_path / "out" / "tensorboard")
    losses = [one for writer in writers for one in writer.scalars if one[0] == "train/loss"]
    assert losses == [("train/loss", first.losses[1], 2), ("train/loss", second.losses[3], 4)]


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


def test_keep_rows_passes_over_what_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'3\n{"loss": 2}\n{"step": "1"}\n\xff\n[]\n{"step": 1, "loss": 2.0}\n')
    assert keep_rows(path, 2) == [{"step": 1, "loss": 2.0}]


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


def broken_write(error: Exception):
    def write(*args, **kwargs):
        raise error

    return write


def test_a_save_that_fails_names_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    finetune(config(tmp_path, max_steps=2))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken_write(RuntimeError("the disk is full")))
        with pytest.raises(OSError, match="checkpoint-4 could not be written: the disk is full"):
            finetune(config(tmp_path, save_steps=4))
    assert not list((tmp_path / "out").glob(".checkpoint-*"))
    with monkeypatch.context() as patch:
        failing = broken_write(OSError(28, "No space left on device"))
        patch.setattr(loop, "save_adapter", failing)
        with pytest.raises(OSError, match="out/adapter could not be written: .*No space left"):
            finetune(config(tmp_path, max_steps=2))
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="writes to Linux's /dev/full")
def test_measurements_on_a_full_disk_name_their_file(tmp_path):
    run = Monitor(config(tmp_path), tmp_path, main=True, shown=False)
    run.start(0, 1)
    run.file.close()
    run.file = open("/dev/full", "w")
    for write in (partial(run.row, {"step": 1}), run.close):
        with pytest.raises(OSError, match="metrics.jsonl could not be written: .*No space left"):
            write()


def test_prune_counts_intact_checkpoints_and_keeps_what_was_just_written(tmp_path):
    for step in (1, 2, 3, 4, 5, 9):
        write_checkpoint(tmp_path / f"checkpoint-{step}", fill)
    (tmp_path / "checkpoint-9" / "a").unlink()
    (tmp_path / "checkpoint-4" / "a").write_bytes(b"torn")
    prune(tmp_path, 2, tmp_path / "checkpoint-2")
    left = [path.name.removeprefix("checkpoint-") for path in checkpoints(tmp_path)]
    assert left == ["9", "5", "4", "3", "2"]
    prune(tmp_path, None, tmp_path / "checkpoint-2")
    assert len(checkpoints(tmp_path)) == 5


def test_odd_content_of_the_output_folder(tmp_path):
    finetune(config(tmp_path, max_steps=2))
    out = tmp_path / "out"
    (out / "checkpoint-5").write_text("a file")
    (out / "checkpoint-6").mkdir()
    (out / "checkpoint-6" / "complete.json").mkdir()
    (out / "checkpoint-\N{SUPERSCRIPT TWO}").mkdir()
    for step, manifest in ((3, "{}"), (4, "[3]"), (7, '{"a": 3}')):
        (out / f"checkpoint-{step}").mkdir()
        (out / f"checkpoint-{step}" / "complete.json").write_text(manifest)
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write("3\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = finetune(config(tmp_path, max_steps=5, save_steps=1))
    assert resumed.resumed_from == 2 and len(resumed.losses) == 5
    assert [path.name for path in checkpoints(out)] == [f"checkpoint-{n}" for n in (5, 4, 3, 2)]
    assert (out / "abandoned-checkpoint-5").read_text() == "a file"


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


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "base")


def bf16_model(base: Path):
    """In 4 bits."""
    return load(base, dtype=torch.bfloat16, device="cpu", progress=False)


def test_resume_is_exact_on_a_4bit_base_with_modules_in_full(tmp_path, base):
    settings = dict(modules_to_save=["lm_head", "norm"], optim="8bit", lora_dropout=0.1)
    whole = finetune(config(tmp_path / "a", model=bf16_model(base), **settings))
    finetune(config(tmp_path / "b", model=bf16_model(base), max_steps=3, **settings))
    resumed = finetune(config(tmp_path / "b", model=bf16_model(base), **settings))
    assert isinstance(resumed.model.model.layers[0].mlp.up_proj.base_layer, Linear4bit)
    assert resumed.resumed_from == 3 and resumed.losses == whole.losses
    assert_same_adapter(resumed.adapter_dir, whole.adapter_dir)


def test_gradient_checkpointing_changes_no_bit_of_a_4bit_run(tmp_path, base):
    on, off = (
        finetune(
            config(
                tmp_path / str(wanted),
                model=bf16_model(base),
                lora_dropout=0.1,
                gradient_checkpointing=wanted,
            )
        )
        for wanted in (True, False)
    )
    assert on.losses == off.losses
    assert_same_adapter(on.adapter_dir, off.adapter_dir)


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


@pytest.mark.gpu
def test_metrics_and_a_trace_tell_of_paging(tmp_path):
    result = finetune(config(tmp_path, model=tiny_model().cuda(), placement="host"))
    rows = [json.loads(row) for row in result.metrics_path.read_text().splitlines()]
    assert all(row["state_on_host_gb"] > 0 and row["evicted_gb"] == 0 for row in rows)
    assert rows[-1]["update_ms"] > 0 and rows[-1]["ooms_absorbed"] == 0
    trace = json.loads((tmp_path / "out" / loop.TRACE).read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    # Six steps of two, but for the last one, before which the rows run out.
    assert names.count("micro step") == len(ROWS) // 2 == 11


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


def test_resume_with_another_adapter_of_the_same_shapes_is_refused(tmp_path):
    finetune(config(tmp_path, max_steps=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter: .*layers.0.self_attn.*None (then|now).*more"):
        finetune(config(tmp_path, target_modules=["o_proj"]))
    finetune(config(tmp_path / "b", model=inject(tiny_model(), LoraConfig(4, 8)), max_steps=2))
    other = inject(tiny_model(), LoraConfig(4, 9))
    with pytest.warns(UserWarning, match="not used"):
        with pytest.raises(ValueError, match=r"lora_alpha: \[8\] then, \[9\] now"):
            finetune(config(tmp_path / "b", model=other))


def test_resume_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path, capsys):
    whole = finetune(config(tmp_path / "whole", max_steps=5))
    finetune(config(tmp_path, save_steps=2))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="cannot resume exactly"):
        finetune(config(tmp_path, resume=out / "checkpoint-2", seed=3))
    assert len(checkpoints(out)) == 3, "nothing is moved for a run that is refused"
    capsys.readouterr()
    short = dict(max_steps=3, save_total_limit=1, resume=out / "checkpoint-2")
    finetune(config(tmp_path, **short))
    assert f"kept as {out / 'abandoned-checkpoint-6'} but not used" in capsys.readouterr().err
    assert [path.name for path in checkpoints(out)] == ["checkpoint-3"]
    assert damage(out / "abandoned-checkpoint-4") is None
    resumed = finetune(config(tmp_path, max_steps=5))
    assert resumed.resumed_from == 3 and resumed.losses == whole.losses


def test_a_damaged_newest_checkpoint_does_not_crowd_out_new_ones(tmp_path):
    finetune(config(tmp_path, max_steps=4, save_steps=2))
    out = tmp_path / "out"
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged"):
        finetune(config(tmp_path, max_steps=3, save_total_limit=1))
    assert newest_complete(out) == (out / "checkpoint-3", [])


def test_fewer_steps_than_were_done_are_told(tmp_path):
    finetune(config(tmp_path))
    with pytest.warns(UserWarning, match="step 6 is past the 2 steps asked for"):
        assert finetune(config(tmp_path, max_steps=2)).steps == 6


@pytest.mark.parametrize(
    ("schedule", "told"), [("constant", False), ("constant_with_warmup", True)]
)
def test_a_schedule_that_changes_is_told(tmp_path, capsys, schedule, told):
    settings = dict(lr_scheduler_type=schedule, warmup_ratio=0.5, progress=True)
    finetune(config(tmp_path, max_steps=4, **settings))
    finetune(config(tmp_path, max_steps=5, **settings))
    assert ("schedule changes from here" in capsys.readouterr().err) == told


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


def test_killed_while_a_checkpoint_is_written_anew(tmp_path, processes):
    """At every moment there is an intact one to be found: the old or the new."""
    ends = []
    for moment in range(8):
        folder = tmp_path / str(moment)
        write_checkpoint(folder / "checkpoint-10", lambda aside: (aside / "a").write_text("old"))
        process = processes(folder / "log", write_and_die, folder, moment)
        process.join()
        found, notes = find_checkpoint(folder, True)
        assert found == folder / "checkpoint-10" and notes == []
        ends.append((process.exitcode, (found / "a").read_text()))
    assert ends == [(-signal.SIGKILL, "old")] * 5 + [(-signal.SIGKILL, "one")] * 2 + [(0, "one")]


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


def run_to_be_killed(folder: Path, device: str) -> None:
    settings = dict(max_steps=40, save_steps=2, lora_dropout=0.1, placement="host")
    finetune(config(folder, model=tiny_model().to(device), **settings))


def test_killed_at_any_moment_and_resumed_to_the_bit(tmp_path, processes, device):
    """SIGKILL at random moments, among them during saves, until the run gets through."""
    run = partial(run_to_be_killed, device=device.type)
    start(run, whole := tmp_path / "whole", processes).join()
    rng, kills, output_dir = random.Random(0), 0, tmp_path / "killed" / "out"
    for _ in range(15):
        first = newest_step(output_dir)
        process = start(run, tmp_path / "killed", processes)
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


def run_quietly(folder: Path, resume) -> None:
    finetune(config(folder, max_steps=100_000, save_steps=100_000, resume=resume))


@pytest.mark.parametrize(
    ("resume", "advice"),
    [
        ("auto", "the same command continues from it"),
        (False, 'to continue from it, run the same command with resume set to "auto"'),
    ],
)
def test_a_quiet_run_says_how_to_go_on_after_a_stop(tmp_path, processes, resume, advice):
    process = processes(tmp_path / "log", run_quietly, tmp_path, resume)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and '"step": 2' in metrics.read_text()):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 143 and "stopping after this step" in log
    assert log.endswith(f"saved {newest_complete(tmp_path / 'out')[0]}; {advice}\n")


def test_a_folder_takes_one_run_at_a_time(tmp_path, processes):
    process = processes(tmp_path / "log", run_quietly, tmp_path, "auto")
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and '"step": 2' in metrics.read_text()):
        time.sleep(0.01)
    refused = f"{re.escape(str(tmp_path / 'out'))} is in use by another run"
    with pytest.raises(BlockingIOError, match=refused):
        finetune(config(tmp_path, model="nowhere", data="nowhere"))
    for code, log in two_ranks(processes, tmp_path, 2, 0):
        assert code == 1 and re.search(refused, log)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert finetune(config(tmp_path)).steps == 6


@pytest.mark.filterwarnings("ignore:This process")
def test_a_folder_is_free_when_its_run_ends(tmp_path):
    """Though a child that it forked lives on, and whatever became of the folder."""
    folder = tmp_path / "out"
    with claimed(folder):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    with claimed(folder), pytest.raises(BlockingIOError, match="in use by another run"):
        claimed(folder).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not folder.exists()
    with pytest.raises(ValueError, match="its own"), claimed(folder):
        shutil.rmtree(folder)
        raise ValueError("its own")


def test_a_lock_that_was_just_removed_is_taken_anew(tmp_path, monkeypatch):
    """Between its opening and its locking another run may have ended and taken it along."""
    flock, removed = fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.append(shutil.rmtree(tmp_path / "out"))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claimed(tmp_path / "out"):
        assert (tmp_path / "out" / ".lock").exists()
        with pytest.raises(BlockingIOError, match="in use by another run"):
            claimed(tmp_path / "out").__enter__()


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
    return ranks_of(processes, folder, run_rank, folder, *args)


def ranks_of(processes, folder: Path, function, *args) -> list[tuple[int, str]]:
    """Exit code and output of two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    place["WORLD_SIZE"] = "2"
    logs = [folder / f"log-{rank}" for rank in range(2)]
    ranks = [
        processes(log, function, *args, RANK=str(rank), LOCAL_RANK=str(rank), **place)
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
    assert_close_adapter(tmp_path / "two" / "out" / "adapter", one.adapter_dir)


def test_ranks_with_different_bases_are_refused(tmp_path, processes):
    for code, output in two_ranks(processes, tmp_path, 2, 1):
        assert code == 1 and "ValueError: the base model differs" in output


def run_with_a_full_disk(folder: Path) -> None:
    loop.save_adapter = broken_write(RuntimeError("the disk is full"))
    finetune(config(folder, max_steps=2, gradient_accumulation_steps=1))


def test_every_rank_hears_of_a_failed_save(tmp_path, processes):
    for code, output in ranks_of(processes, tmp_path, run_with_a_full_disk, tmp_path):
        assert code == 1 and "checkpoint-2 could not be written: the disk is full" in output


@pytest.mark.slow
def test_torchrun_starts_the_command_line(tmp_path, base):
    """The launcher itself, with two processes, equals one process with twice the batch."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = "--max-steps 4 --lora-r 4 --dtype float32 --device cpu --learning-rate 0.01 "
    options += "--gradient-accumulation-steps 1 --no-progress --per-device-batch-size"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launchers = {"one": ([sys.executable], "4"), "two": (torchrun, "2")}
    for name, (launcher, batch) in launchers.items():
        words = [*launcher, "-m", "halfbyte", "finetune", base, data, *options.split(), batch]
        command = [*map(str, words), "--output-dir", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    assert_close_adapter(tmp_path / "two/adapter", tmp_path / "one/adapter")
    state = json.loads((tmp_path / "two/checkpoint-4/state.json").read_text())
    assert state["settings"]["processes"] == 2


def test_tokenizer_pad_and_eos_never_matter(tmp_path):
    """Padding with a real token id leaves the losses as they are."""
    plain = finetune(config(tmp_path / "a", max_steps=3))
    model = tiny_model()
    model.tokenizer = Tokenizer.from_folder(write_tokenizer(tmp_path / "tokenizer"))
    assert finetune(config(tmp_path / "b", model=model, max_steps=3)).losses == plain.losses
