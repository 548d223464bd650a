"""From a TrainConfig to everything the loop needs: model, adapter, rows, order, optimizer."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from halfbyte import _core
from halfbyte.checkpoint import load
from halfbyte.data import (
    Batches,
    DataReport,
    EncodedRow,
    Encoder,
    check_report,
    data_fingerprint,
    detect_format,
    encode_rows,
    read_rows,
    split_rows,
)
from halfbyte.errors import DataError
from halfbyte.fingerprint import fingerprint
from halfbyte.lora import LoraConfig, LoRALinear, adapter_parameters, adapter_tensors, inject
from halfbyte.models import Decoder
from halfbyte.optim import AdamW
from halfbyte.plan import Setup, footprint
from halfbyte.train.config import TrainConfig
from halfbyte.train.micro_steps import MicroSteps
from halfbyte.train.monitor import Monitor
from halfbyte.train.world import World

# fp16 gradients below 6e-8 are zero; what overflows instead halves the scale.
FP16_LOSS_SCALE = 65536.0


@dataclass
class Run:
    """A run under way; `step` optimizer steps are done and `tokens` tokens were seen.

    base: fingerprint of the frozen model; data: of the rows; history: rows of metrics.jsonl.
    loss_scale: power of two that the loss is multiplied by on the way through the model.
    """

    config: TrainConfig
    world: World
    output_dir: Path
    monitor: Monitor
    model: Decoder
    base: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizer: AdamW
    micro_steps: MicroSteps
    rows: list[EncodedRow]
    eval_rows: list[EncodedRow]
    report: DataReport
    data: str
    batches: Batches
    total_steps: int
    pad_id: int
    loss_scale: float
    step: int = 0
    tokens: int = 0
    resumed_from: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one before, to continue it exactly."""
        config, model = self.config, self.model
        lora: Any = model.lora_config
        return {
            "base": self.base,
            "data": self.data,
            "adapter": {name: list(one.shape) for name, one in adapter_tensors(model).items()},
            "lora_alpha": _alphas(model),
            "lora_dropout": lora.lora_dropout,
            "use_rslora": lora.use_rslora,
            "learning_rate": config.learning_rate,
            "lr_scheduler_type": config.lr_scheduler_type,
            "warmup_ratio": config.warmup_ratio,
            "per_device_batch_size": config.per_device_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "processes": self.world.size,
            "max_grad_norm": config.max_grad_norm,
            "weight_decay": config.weight_decay,
            "adam_betas": list(config.adam_betas),
            "adam_epsilon": config.adam_epsilon,
            "optim": config.optim,
            "group_by_length": config.group_by_length,
            "dtype": str(_dtype(model)),
            "seed": config.seed,
            "data_seed": config.order_seed,
        }


def prepare(config: TrainConfig, world: World, monitor: Monitor, output_dir: Path) -> Run:
    """Read and tokenize the data, load the model, add its adapter, and check that ranks agree."""
    raw = _raw_rows("data", config.data)
    raw_eval = _raw_rows("eval_data", config.eval_data)
    model = _model(config, world)
    base = fingerprint(model)
    world.check_equal("the base model", base)
    rows, eval_rows, report = _rows(config, model, raw, raw_eval, monitor)
    batches = Batches(
        lengths=tuple(len(row.ids) for row in rows),
        per_device=config.per_device_batch_size,
        accumulation=config.gradient_accumulation_steps,
        world_size=world.size,
        seed=config.order_seed,
        group_by_length=config.group_by_length,
    )
    _seed(config.seed, world.rank)
    _add_adapter(model, config)
    parameters = adapter_parameters(model)
    world.copy_from_main_([parameter.data for parameter in parameters])
    optimizer = _optimizer(config, world, model, parameters)
    run = Run(
        config=config,
        world=world,
        output_dir=output_dir,
        monitor=monitor,
        model=model,
        base=base,
        parameters=parameters,
        optimizer=optimizer,
        micro_steps=MicroSteps(model, optimizer),
        rows=rows,
        eval_rows=eval_rows,
        report=report,
        data=data_fingerprint([*rows, *eval_rows]),
        batches=batches,
        total_steps=config.steps(batches.steps_per_epoch),
        pad_id=_pad_id(model),
        loss_scale=FP16_LOSS_SCALE if _dtype(model) == torch.float16 else 1.0,
    )
    world.check_equal("the run", run.settings())
    _introduce(run)
    return run


def _raw_rows(name: str, data: str | Path | Iterable[dict] | None) -> list[Any]:
    if data is None:
        return []
    if isinstance(data, str | Path):
        return read_rows(data)
    wrong = TypeError(f"{name}: expected a file or rows, got {type(data).__name__}")
    if isinstance(data, dict):
        raise wrong
    try:
        # A slice of a datasets.Dataset is a dict of columns; one by one, its rows are rows. A data
        # set of torch has them by index alone.
        rows = iter(data)
    except TypeError:
        raise wrong from None
    return list(rows)


def _model(config: TrainConfig, world: World) -> Decoder:
    if isinstance(config.model, Decoder):
        return config.model
    return load(
        config.model,
        quant_type=config.quant_type,
        double_quant=config.double_quant,
        dtype=config.torch_dtype,
        device=world.device,
        progress=config.progress and world.main,
    )


def _rows(
    config: TrainConfig,
    model: Decoder,
    raw: Sequence[Any],
    raw_eval: Sequence[Any],
    monitor: Monitor,
) -> tuple[list[EncodedRow], list[EncodedRow], DataReport]:
    encoder = Encoder(
        tokenizer=model.tokenizer,
        source_max_len=config.source_max_len,
        target_max_len=config.target_max_len,
        max_seq_len=config.max_seq_len,
        train_on_source=config.train_on_source,
        context=model.config.max_position_embeddings,
        vocab_size=model.config.vocab_size,
    )
    rows, report = _encoded(_named("data", config.data), raw, config, encoder, monitor)
    if config.eval_data is not None:
        name = _named("eval data", config.eval_data)
        return rows, _encoded(name, raw_eval, config, encoder, monitor)[0], report
    train, held_out = split_rows(len(rows), config.eval_dataset_size)
    return [rows[index] for index in train], [rows[index] for index in held_out], report


def _named(name: str, data: str | Path | Iterable[dict]) -> str:
    return f"{name} {data}" if isinstance(data, str | Path) else name


def _encoded(
    name: str, raw: Sequence[Any], config: TrainConfig, encoder: Encoder, monitor: Monitor
) -> tuple[list[EncodedRow], DataReport]:
    if len(raw) == 0:
        raise DataError(f"the {name} holds no rows")
    monitor.say(f"{name}: tokenizing {len(raw):,} rows")
    try:
        format_name = config.dataset_format or detect_format(raw)
        report = DataReport(format_name, detected=config.dataset_format is None)
        rows = encode_rows(raw, encoder, report.format, report)
        check_report(report, config.strict)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    for line in report.lines():
        monitor.say(f"{name}: {line}")
    return rows, report


def _seed(seed: int, rank: int) -> None:
    """Ranks draw different dropout masks; the adapter's own draw is seeded apart."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def _add_adapter(model: Decoder, config: TrainConfig) -> None:
    """Inject a fresh adapter, or keep the trainable one that a given model carries."""
    if hasattr(model, "lora_config"):
        if not adapter_parameters(model):
            raise ValueError(
                "the model carries an adapter that is frozen. "
                "hint: load it with load_adapter(..., trainable=True)"
            )
        _warn_of_unused(config.lora, cast(LoraConfig, model.lora_config))
        return
    inject(model, config.lora, generator=torch.Generator().manual_seed(config.seed))


def _warn_of_unused(asked: LoraConfig, carried: LoraConfig) -> None:
    """Say which settings, of those that are not the defaults, a given adapter overrules."""
    unused = [
        f"{one.name} {getattr(asked, one.name)!r} (it has {getattr(carried, one.name)!r})"
        for one in fields(LoraConfig)
        if getattr(asked, one.name) not in (one.default, getattr(carried, one.name))
    ]
    if unused:
        warnings.warn(
            f"the model carries an adapter already; not used: {', '.join(unused)}", stacklevel=2
        )


def _alphas(model: Decoder) -> list[float]:
    """Every alpha in use: an adapter that came from PEFT may have several."""
    return sorted({layer.lora_alpha for layer in model.modules() if isinstance(layer, LoRALinear)})


def _optimizer(
    config: TrainConfig, world: World, model: Decoder, parameters: list[nn.Parameter]
) -> AdamW:
    beta1, beta2 = config.adam_betas
    budget = _core.Pager.host_budget()
    optimizer = AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(beta1, beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        state=config.optim,
        placement=config.placement,
        # Ranks of one host share its memory.
        host_limit=None if budget is None else budget // world.size,
    )

    def first_estimate(tokens: int) -> int:
        setup = Setup(seq=tokens, r=config.lora_r, optim=config.optim, quant_type=config.quant_type)
        return footprint(model.config, setup).activations

    optimizer.pager.predictor.estimate = first_estimate
    optimizer.overlap(model.model.layers)
    return optimizer


def _dtype(model: Decoder) -> torch.dtype:
    return model.model.embed_tokens.weight.dtype


def _pad_id(model: Decoder) -> int:
    """Any id will do, as padding is never seen nor learnt; no token is added for it."""
    tokenizer = model.tokenizer
    known = [tokenizer.pad_token_id, tokenizer.eos_token_id] if tokenizer is not None else []
    return next((token for token in known if token is not None), 0)


def _introduce(run: Run) -> None:
    config, trained = run.config, sum(parameter.numel() for parameter in run.parameters)
    run.monitor.say(
        f"training {trained:,} adapter parameters for {run.total_steps} steps of "
        f"{run.batches.rows_per_step} sequences ({run.batches.steps_per_epoch} steps an epoch, "
        f"{len(run.rows)} sequences, {len(run.eval_rows)} held out) on {run.world.device}"
    )
    warmup = math.ceil(config.warmup_ratio * run.total_steps)
    if config.lr_scheduler_type == "constant":
        run.monitor.say("learning rate: constant from the first step, without warm-up")
    else:
        run.monitor.say(f"learning rate: {config.lr_scheduler_type}, {warmup} steps of warm-up")
