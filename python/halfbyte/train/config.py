"""Everything that a fine-tuning run is told, with the defaults of qlora.py."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.data import check_format
from halfbyte.lora import LoraConfig
from halfbyte.train.schedule import SCHEDULES

if TYPE_CHECKING:
    from halfbyte.models import Decoder

DEFAULT_STEPS = 10_000
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUANT_TYPES = ("nf4", "fp4", "int4", None)
TRACKERS = ("tensorboard", "wandb")
# A layer's name or path: no regular expression beyond the dots.
NAME = r"[\w.]+"


@dataclass
class TrainConfig:
    """A fine-tuning run; names and defaults follow qlora.py where it has them.

    model: folder, hub id or GGUF file; in Python also a loaded Decoder, trained in place.
    data: file of rows (jsonl, json, csv, tsv, parquet); in Python also an iterable of dicts, such
        as a list or a datasets.Dataset.
    output_dir: where checkpoints, metrics.jsonl, the loss curve and the adapter are written, by
        one run at a time.

    quant_type: "nf4", "fp4" or "int4"; None keeps the base in 16 bits.
    double_quant: quantize the scales of the blocks too.
    dtype: of the computation and of everything that is not 4-bit.
    device: "cuda", "cuda:1", "cpu"; None takes a GPU if there is one.

    lora_r: rank of the adapter.
    lora_alpha: its scale is lora_alpha / lora_r.
    lora_dropout: probability that an input of the adapter is dropped.
    target_modules: "all-linear", a regular expression, or one or more names of layers.
    use_rslora: scale by lora_alpha / sqrt(lora_r) instead.
    lora_bias: "none", "all" or "lora_only": biases that train too.
    modules_to_save: how the names of modules end that train in full beside the adapter.

    dataset_format: how rows are read; None tells it from the columns and says which.
    source_max_len: tokens kept of a source (prompt).
    target_max_len: tokens kept of a target (completion), its end mark included.
    max_seq_len: tokens kept of chats and plain text; the model's context limits every row.
    train_on_source: learn prompts and user turns too.
    strict: a row that cannot be used is an error instead of a counted skip.
    eval_data: file of rows to evaluate on; in Python also an iterable of dicts.
    eval_dataset_size: training rows held out for evaluation instead, drawn with seed 42.

    learning_rate: of AdamW.
    lr_scheduler_type: "constant" (without warm-up, as in transformers), "constant_with_warmup",
        "linear" or "cosine".
    warmup_ratio: share of all steps that warm up.
    max_steps: optimizer steps; with neither this nor num_epochs, 10,000.
    num_epochs: passes over the data, instead of max_steps.
    per_device_batch_size: sequences that one device takes at once.
    gradient_accumulation_steps: such batches in one optimizer step.
    max_grad_norm: gradients are clipped to this global norm; 0 does not clip.
    weight_decay: of AdamW.
    adam_betas: decay rates of AdamW's moments.
    adam_epsilon: of AdamW.
    optim: "fp32" or "8bit" AdamW state.
    placement: where that state is kept: "auto", "device" or "host" memory.
    group_by_length: batch sequences of similar length together.
    gradient_checkpointing: keep one activation a layer and recompute the rest.
    seed: of the adapter's initial values and of dropout.
    data_seed: of the order of rows; None takes seed.
    deterministic: use only kernels that repeat their bits (slower attention on a GPU).

    logging_steps: how often a line is printed and trackers are told.
    save_steps: how often a checkpoint is written.
    save_total_limit: newest checkpoints kept; None keeps all.
    eval_steps: how often to evaluate; None only at the end.
    report_to: "none", "tensorboard", "wandb", or several of them.
    progress: show a progress bar and messages.
    resume: "auto" continues from the newest complete checkpoint in output_dir if there is one,
        True demands one, False demands that there is none. A path names one; learning_rate may
        then be another, which ends exactness. Checkpoints past the resumed one are set aside.
    """

    model: str | Path | Decoder
    data: str | Path | Iterable[dict[str, Any]]
    output_dir: str | Path = "output"

    quant_type: str | None = "nf4"
    double_quant: bool = True
    dtype: str | torch.dtype = "bfloat16"
    device: str | torch.device | None = None

    lora_r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    use_rslora: bool = False
    lora_bias: str = "none"
    modules_to_save: str | Sequence[str] | None = None

    dataset_format: str | None = None
    source_max_len: int = 1024
    target_max_len: int = 256
    max_seq_len: int = 2048
    train_on_source: bool = False
    strict: bool = False
    eval_data: str | Path | Iterable[dict[str, Any]] | None = None
    eval_dataset_size: int = 0

    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    warmup_ratio: float = 0.03
    max_steps: int | None = None
    num_epochs: float | None = None
    per_device_batch_size: int = 1
    gradient_accumulation_steps: int = 16
    max_grad_norm: float | None = 0.3
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    optim: str = "fp32"
    placement: str = "auto"
    group_by_length: bool = True
    gradient_checkpointing: bool = True
    seed: int = 42
    data_seed: int | None = None
    deterministic: bool = True

    logging_steps: int = 10
    save_steps: int = 250
    save_total_limit: int | None = 40
    eval_steps: int | None = None
    report_to: str | Sequence[str] = "none"
    progress: bool = True
    resume: bool | str | Path = "auto"

    def check(self) -> None:
        """Raise ValueError or TypeError naming the first setting that cannot be."""
        _check_choices(self)
        _check_kinds(self)
        _check_numbers(self)
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError("max_steps and num_epochs are both set; give one of them")
        if self.eval_data is not None and self.eval_dataset_size:
            raise ValueError("eval_data and eval_dataset_size are both set; give one of them")
        if self.eval_steps is not None and self.eval_data is None and not self.eval_dataset_size:
            raise ValueError(
                "eval_steps is set but there are no eval_data and no eval_dataset_size"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        names = (self.report_to,) if isinstance(self.report_to, str) else tuple(self.report_to)
        return tuple(name for name in names if name != "none")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype

    @property
    def lora(self) -> LoraConfig:
        """The adapter as lora.inject takes it; a plain name stands for a list of it."""
        targets, saved = self.target_modules, self.modules_to_save
        if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(NAME, targets):
            targets = [targets]
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            use_rslora=self.use_rslora,
            bias=self.lora_bias,
            modules_to_save=([saved] if isinstance(saved, str) else list(saved or [])) or None,
        )

    @property
    def resumes_by_name(self) -> bool:
        """Whether `resume` names a checkpoint."""
        return not isinstance(self.resume, bool) and self.resume != "auto"

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    def steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.num_epochs is not None:
            return max(1, math.ceil(self.num_epochs * steps_per_epoch))
        return DEFAULT_STEPS if self.max_steps is None else self.max_steps

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON values; a loaded model or list of rows by its kind only."""
        return {one.name: _json_value(getattr(self, one.name)) for one in fields(self)}


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike | torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if isinstance(value, list | tuple) and all(isinstance(one, str | float) for one in value):
        return list(value)
    return f"<{type(value).__name__}>"


def _check_choices(config: TrainConfig) -> None:
    choices = {
        "quant_type": QUANT_TYPES,
        "lr_scheduler_type": tuple(SCHEDULES),
        "optim": ("fp32", "8bit"),
        "placement": ("auto", "device", "host"),
        "lora_bias": ("none", "all", "lora_only"),
        "dtype": (*DTYPES, *DTYPES.values()),
    }
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            names = ", ".join(str(one) for one in allowed if not isinstance(one, torch.dtype))
            raise ValueError(f"{name}: expected one of {names}, got {value!r}")
    for tracker in config.trackers:
        if tracker not in TRACKERS:
            raise ValueError(f"report_to: expected none, tensorboard or wandb, got {tracker!r}")
    if config.dataset_format is not None:
        check_format(config.dataset_format)


_SWITCHES = (
    "double_quant",
    "use_rslora",
    "train_on_source",
    "strict",
    "group_by_length",
    "gradient_checkpointing",
    "deterministic",
    "progress",
)


def _check_kinds(config: TrainConfig) -> None:
    for name in _SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise TypeError(f"{name}: expected True or False, got {getattr(config, name)!r}")
    if not isinstance(config.resume, bool | str | os.PathLike):
        raise TypeError(f'resume: expected "auto", True, False or a path, got {config.resume!r}')
    for name in ("seed", "data_seed"):
        value = getattr(config, name)
        if not _is_whole(value) and not (name == "data_seed" and value is None):
            raise TypeError(f"{name}: expected a whole number, got {value!r}")
    betas = config.adam_betas
    if not isinstance(betas, list | tuple) or len(betas) != 2 or not all(map(_is_number, betas)):
        raise TypeError(f"adam_betas: expected two numbers, got {betas!r}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adam_betas: expected two numbers in [0, 1), got {betas!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


_AT_LEAST_ONE = (
    "lora_r",
    "source_max_len",
    "target_max_len",
    "max_seq_len",
    "per_device_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
)
_AT_LEAST_ONE_OR_NONE = ("max_steps", "save_total_limit", "eval_steps")


def _check_numbers(config: TrainConfig) -> None:
    for name in ("eval_dataset_size", *_AT_LEAST_ONE, *_AT_LEAST_ONE_OR_NONE):
        value, least = getattr(config, name), 0 if name == "eval_dataset_size" else 1
        if value is None and name in _AT_LEAST_ONE_OR_NONE:
            continue
        if not _is_whole(value):
            raise TypeError(f"{name}: expected a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    bounds = {
        "learning_rate": (0.0, math.inf),
        "lora_alpha": (0.0, math.inf),
        "weight_decay": (0.0, math.inf),
        "adam_epsilon": (0.0, math.inf),
        "warmup_ratio": (0.0, 1.0),
        "lora_dropout": (0.0, 1.0),
        "max_grad_norm": (0.0, math.inf),
        "num_epochs": (0.0, math.inf),
    }
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        if value is None and name in ("max_grad_norm", "num_epochs"):
            continue
        if not _is_number(value):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        if not low <= value <= high or math.isinf(value):
            raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value}")
    for name, value in {"num_epochs": 0, "lora_alpha": 0, "lora_dropout": 1}.items():
        if getattr(config, name) == value:
            raise ValueError(f"{name}: {getattr(config, name)} leaves nothing to train")
