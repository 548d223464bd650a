"""What a run tells: a bar or lines on the terminal, metrics.jsonl, trackers, the loss curve."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch

from halfbyte.train.checkpoints import named
from halfbyte.train.config import TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress

METRICS = "metrics.jsonl"
CURVE = "loss_curve.png"
WANDB_ID = "wandb_id.txt"


def keep_rows(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop the rows of metrics.jsonl past `last_step`, and torn ones; returns those kept."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    rows = [row for row in map(_read_row, lines) if row is not None and row["step"] <= last_step]
    aside = path.with_suffix(".writing")
    aside.write_text("".join(_line(row) for row in rows))
    aside.replace(path)
    return rows


def _read_row(line: str) -> dict[str, Any] | None:
    """What `_line` wrote, or None if it is anything else."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return {name: math.nan if value is None else value for name, value in row.items()}


def _line(row: dict[str, Any]) -> str:
    """JSON knows neither NaN nor infinity: they are null there."""
    values = {name: None if _is_lost(value) else value for name, value in row.items()}
    return json.dumps(values) + "\n"


def _is_lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Monitor:
    """Tells one run's story on rank 0; on other ranks it is silent.

    `shown` false keeps the terminal quiet; metrics.jsonl and trackers are written all the same.
    """

    def __init__(self, config: TrainConfig, output_dir: Path, main: bool, shown: bool):
        self.path = output_dir / METRICS
        self.main = main
        self.shown = main and shown
        self.logging_steps = config.logging_steps
        self.new_trackers = [_tracker(name, config, output_dir) for name in config.trackers if main]
        self.trackers: list[Tracker] = []
        self.bar: Progress | None = None
        self.file: TextIO | None = None

    def say(self, text: str, always: bool = False) -> None:
        """A line for people; with `always` even where the terminal is to be quiet."""
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        elif self.shown or (always and self.main):
            print(text, file=sys.stderr, flush=True)

    def start(self, step: int, total: int) -> list[dict[str, Any]]:
        """Open metrics.jsonl and trackers after `step`, show the bar; returns the rows so far."""
        if not self.main:
            return []
        with named(self.path):
            rows = keep_rows(self.path, step)
            self.file = self.path.open("a")
        self.trackers = [new(step) for new in self.new_trackers]
        if self.shown and sys.stderr.isatty():
            self.bar = _bar()
            self.task = self.bar.add_task("training", total=total, completed=step, numbers="")
            self.bar.start()
        return rows

    def row(self, values: dict[str, Any]) -> None:
        """Record the measurements after a step."""
        if self.file is None:
            return
        with named(self.path):
            self.file.write(_line(values))
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
        for _, close in self.trackers:
            close()
        self.trackers = []
        file, self.file = self.file, None
        if file is not None:
            with named(self.path):
                file.close()


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


# How to log a row, and how to close; made when the step is known that the run goes on from.
Tracker = tuple[Callable[[dict[str, Any]], None], Callable[[], None]]
NewTracker = Callable[[int], Tracker]


def _tracker(name: str, config: TrainConfig, output_dir: Path) -> NewTracker:
    """Imports now, so that a run does not start without its tracker."""
    try:
        return _TRACKERS[name](config, output_dir)
    except ImportError as error:
        raise ImportError(f"report_to={name!r} needs it. hint: pip install {name}") from error


def _tensorboard(config: TrainConfig, output_dir: Path) -> NewTracker:
    from torch.utils.tensorboard import SummaryWriter

    def new(step: int) -> Tracker:
        # What a killed run showed past the step is drawn anew.
        writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=step + 1)

        def log(values: dict[str, Any]) -> None:
            for name, value in values.items():
                if name != "step":
                    writer.add_scalar(f"train/{name}", value, values["step"])

        return log, writer.close

    return new


def _wandb(config: TrainConfig, output_dir: Path) -> NewTracker:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    def new(step: int) -> Tracker:
        kept = output_dir / WANDB_ID
        name = kept.read_text().strip() if step and kept.exists() else None
        run = wandb.init(dir=str(output_dir), config=config.as_json(), id=name, resume="allow")
        kept.write_text(run.id)

        def log(values: dict[str, Any]) -> None:
            numbers = {f"train/{name}": value for name, value in values.items() if name != "step"}
            run.log(numbers, step=values["step"])

        return log, run.finish

    return new


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
