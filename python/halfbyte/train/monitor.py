"""What a run tells: a bar or lines on the terminal, metrics.jsonl, trackers, the loss curve."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from halfbyte.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress

METRICS = "metrics.jsonl"
CURVE = "loss_curve.png"


def keep_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the rows of metrics.jsonl past `last_step`, and torn ones; returns those kept."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= last_step:
                rows.append(row)
    aside = path.with_suffix(".writing")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    aside.replace(path)
    return rows


class Monitor:
    """Tells one run's story on rank 0; on other ranks it is silent.

    `shown` false keeps the terminal quiet; metrics.jsonl and trackers are written all the same.
    """

    def __init__(self, config: TrainConfig, output_dir: Path, main: bool, shown: bool):
        self.path = output_dir / METRICS
        self.main = main
        self.shown = main and shown
        self.logging_steps = config.logging_steps
        self.trackers = [_tracker(name, config, output_dir) for name in config.trackers if main]
        self.bar: Progress | None = None
        self.file: TextIO | None = None

    def say(self, text: str) -> None:
        """A line for people."""
        if self.shown and self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def start(self, step: int, total: int) -> list[dict[str, Any]]:
        """Open metrics.jsonl after `step` and show the bar; returns the rows up to there."""
        if not self.main:
            return []
        rows = keep_rows(self.path, step)
        self.file = self.path.open("a")
        if self.shown and sys.stderr.isatty():
            self.bar = _bar()
            self.task = self.bar.add_task("training", total=total, completed=step, numbers="")
            self.bar.start()
        return rows

    def row(self, values: dict[str, Any]) -> None:
        """Record the measurements after a step."""
        if self.file is None:
            return
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.bar is not None and "loss" in values:
            self.bar.update(self.task, completed=values["step"], numbers=_sentence(values))
        if "loss" in values and values["step"] % self.logging_steps:
            return
        for log, _ in self.trackers:
            log(values)
        if self.bar is None or "loss" not in values:
            self.say(f"step {values['step']}: {_sentence(values)}")

    def sync(self) -> None:
        """Put the rows on disk, as the checkpoint that follows will be."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
        if self.file is not None:
            self.file.close()
            self.file = None
        for _, close in self.trackers:
            close()
        self.trackers = []


def _sentence(values: dict[str, Any]) -> str:
    if "loss" not in values:
        return f"eval loss {values['eval_loss']:.4f}"
    return (
        f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s, "
        f"{values['memory_gb']:.2f} GB"
    )


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


Tracker = tuple[Callable[[dict[str, Any]], None], Callable[[], None]]


def _tracker(name: str, config: TrainConfig, output_dir: Path) -> Tracker:
    """How to log a row to a tracker, and how to close it."""
    try:
        return _TRACKERS[name](config, output_dir)
    except ImportError as error:
        raise ImportError(f"report_to={name!r} needs it. hint: pip install {name}") from error


def _tensorboard(config: TrainConfig, output_dir: Path) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output_dir / "tensorboard"))

    def log(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if name != "step":
                writer.add_scalar(f"train/{name}", value, values["step"])

    return log, writer.close


def _wandb(config: TrainConfig, output_dir: Path) -> Tracker:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    run = wandb.init(dir=str(output_dir), config=config.as_json(), resume="allow")

    def log(values: dict[str, Any]) -> None:
        numbers = {f"train/{name}": value for name, value in values.items() if name != "step"}
        run.log(numbers, step=values["step"])

    return log, run.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def draw_curve(rows: list[dict[str, Any]], output_dir: Path) -> Path | None:
    """Draw loss and eval loss over steps as a PNG; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, style in (("loss", {"linewidth": 1}), ("eval_loss", {"marker": "o"})):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), **style)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross entropy (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    path = output_dir / CURVE
    figure.savefig(path, dpi=120)
    return path


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: of torch on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
