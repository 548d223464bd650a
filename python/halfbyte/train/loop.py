"""The training loop: accumulate, check, clip, step, evaluate, save."""

from __future__ import annotations

import json
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.data import DataReport, EncodedRow, collate
from halfbyte.lora import adapter_tensors, save_adapter
from halfbyte.models import Decoder
from halfbyte.peft import WEIGHTS_FILE
from halfbyte.train import checkpoints
from halfbyte.train.config import TrainConfig
from halfbyte.train.monitor import Monitor, draw_curve, peak_memory
from halfbyte.train.output import claimed
from halfbyte.train.schedule import lr_factor
from halfbyte.train.setup import Run, prepare
from halfbyte.train.signals import StopRequest
from halfbyte.train.world import World, join_world

ADAPTER = "adapter"
TRACE = "paging_trace.json"


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    losses: one a step from the first, of a resumed run too; eval_losses: by step.
    adapter_dir: PEFT's format. loss_curve: None without matplotlib. tokens: seen in all.
    seconds: since this process began. peak_memory_bytes: on a CPU, of the whole process.
    model: with its adapter, in eval mode.
    """

    steps: int
    losses: list[float]
    eval_losses: dict[int, float]
    adapter_dir: Path
    metrics_path: Path
    loss_curve: Path | None
    peak_memory_bytes: int
    tokens: int
    seconds: float
    resumed_from: int | None
    report: DataReport
    model: Decoder


def finetune(config: TrainConfig) -> TrainResult:
    """Fine-tune a LoRA adapter on a frozen base, as QLoRA does, and save it.

    Under torchrun every process holds the base and takes its share of each batch. Ctrl-C and
    SIGTERM finish the step, save a checkpoint and then raise KeyboardInterrupt or SystemExit.

    Raises ValueError, TypeError (settings), DataError (no usable rows), CheckpointError (model or
    checkpoint files), FloatingPointError (the loss is not finite; the weights are as before and
    saved), OSError (a file cannot be written, or another run writes to output_dir).
    """
    config.check()
    started = time.monotonic()
    device = config.device
    if device is None and isinstance(config.model, Decoder):
        device = config.model.model.embed_tokens.weight.device
    output_dir = Path(config.output_dir).expanduser()
    with (
        join_world(device) as world,
        torch.inference_mode(False),
        torch.enable_grad(),
        _deterministic(config.deterministic, world.device),
        ExitStack() as stack,
    ):
        world.on_main(lambda: stack.enter_context(claimed(output_dir)))
        found = _find_checkpoint(config, world, output_dir)
        monitor = Monitor(config, output_dir, world.main, config.progress)
        try:
            run = prepare(config, world, monitor, output_dir)
            _resume(run, *found)
            with StopRequest(world.main) as stop, _training(run):
                _train(run, stop)
            return _finish(run, started)
        finally:
            monitor.close()


def _find_checkpoint(
    config: TrainConfig, world: World, output_dir: Path
) -> tuple[Path | None, list[str]]:
    """Rank 0 looks, before the model is loaded."""
    return world.on_main(lambda: checkpoints.find_checkpoint(output_dir, config.resume))


@contextmanager
def _deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """On a GPU, let torch choose only kernels that repeat their bits; CPU kernels all do."""
    if not wanted or device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        memory.fill_uninitialized_memory = filling


@contextmanager
def _training(run: Run) -> Iterator[None]:
    """Training mode with checkpointed layers; eval mode and the caller's choice afterwards."""
    before = run.model.gradient_checkpointing
    run.model.gradient_checkpointing = run.config.gradient_checkpointing
    run.model.train()
    try:
        yield
    finally:
        run.model.gradient_checkpointing = before
        run.model.eval()


def _resume(run: Run, folder: Path | None, notes: list[str]) -> None:
    if folder is not None:
        state = checkpoints.read_state(folder)
        free = ("learning_rate",) if run.config.resumes_by_name else ()
        changed = checkpoints.check_settings(folder, state["settings"], run.settings(), free)
        _restore(run, folder, state)
        run.monitor.say(f"resumed from {folder}, step {run.step} of {run.total_steps}")
        notes = [*notes, *_what_changes(run, state, changed)]
    if run.world.main:
        for note in notes:
            warnings.warn(note, stacklevel=3)
        checkpoints.remove_leftovers(run.output_dir)
        for path in checkpoints.set_aside(run.output_dir, run.step):
            run.monitor.say(f"past step {run.step}, kept as {path} but not used", always=True)
    run.history = run.monitor.start(run.step, run.total_steps)


def _what_changes(run: Run, state: dict[str, Any], changed: list[str]) -> list[str]:
    """Sentences on how the resumed run will differ from one that was never interrupted."""
    schedule = run.config.lr_scheduler_type
    notes = [f"the resumed run is no longer exact: {line}" for line in changed]
    if state["total_steps"] != run.total_steps and schedule != "constant":
        run.monitor.say(
            f"the run was planned for {state['total_steps']} steps: "
            f"the {schedule} schedule changes from here"
        )
    if run.step > run.total_steps:
        notes.append(
            f"nothing to train: step {run.step} is past the {run.total_steps} steps asked for. "
            "hint: resume an earlier checkpoint by name, or raise max_steps"
        )
    return notes


def _restore(run: Run, folder: Path, state: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    saved = load_file(folder / WEIGHTS_FILE)
    for name, tensor in adapter_tensors(run.model).items():
        tensor.copy_(saved[name])
    run.optimizer.load_state_dict(checkpoints.load_tensors(folder / checkpoints.OPTIMIZER))
    states = checkpoints.load_tensors(folder / checkpoints.RNG)
    checkpoints.set_rng_state(states[run.world.rank], run.world.device)
    run.step = run.resumed_from = state["step"]
    run.tokens, run.loss_scale = state["tokens"], state["loss_scale"]


def _save(run: Run, rng: dict[str, Any]) -> None:
    """A checkpoint of everything that decides the next losses; `rng` is this rank's state."""
    folder = checkpoints.checkpoint_folder(run.output_dir, run.step)
    states = run.world.gather(rng)
    run.optimizer.pager.settle()

    def write() -> None:
        run.monitor.sync()
        checkpoints.write_checkpoint(folder, lambda aside: _fill(run, aside, states))
        checkpoints.prune(run.output_dir, run.config.save_total_limit, folder)

    run.world.on_main(write)


def _fill(run: Run, folder: Path, rng_states: list[dict[str, Any]]) -> None:
    save_adapter(run.model, folder, base_name=run.model.source, base_record=run.base)
    torch.save(run.optimizer.state_dict(), folder / checkpoints.OPTIMIZER)
    torch.save(rng_states, folder / checkpoints.RNG)
    epoch, position = divmod(run.step, run.batches.steps_per_epoch)
    state = {
        "step": run.step,
        "tokens": run.tokens,
        "loss_scale": run.loss_scale,
        "total_steps": run.total_steps,
        "data_position": {"epoch": epoch, "step_in_epoch": position},
        "settings": run.settings(),
        "config": run.config.as_json(),
    }
    (folder / checkpoints.STATE).write_text(json.dumps(state, indent=2) + "\n")


def _train(run: Run, stop: StopRequest) -> None:
    while run.step < run.total_steps:
        asked_to_stop = _step(run, stop)
        last = run.step == run.total_steps
        if run.eval_rows and (last or _due(run.step, run.config.eval_steps)):
            _evaluate(run)
        if last or asked_to_stop or _due(run.step, run.config.save_steps):
            _save(run, checkpoints.rng_state(run.world.device))
        if asked_to_stop and not last:
            _stop(run, stop)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _stop(run: Run, stop: StopRequest) -> None:
    folder = checkpoints.checkpoint_folder(run.output_dir, run.step)
    again = "the same command continues from it"
    if run.config.resume is False or run.config.resumes_by_name:
        again = 'to continue from it, run the same command with resume set to "auto"'
    message = f"stopped after step {run.step}, saved {folder}; {again}"
    run.monitor.say(message, always=True)
    run.monitor.close()
    if stop.signum == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt(message)


def _step(run: Run, stop: StopRequest) -> bool:
    """One optimizer step; returns whether any rank was asked to stop."""
    started, rng = time.monotonic(), checkpoints.rng_state(run.world.device)
    losses, loss, norm, asked = _measure(run, stop)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise _not_finite(run, losses, loss, norm, rng)
    lr = _update(run, norm)
    tokens = sum(len(run.rows[index].ids) for index in run.batches.rows(run.step))
    run.step += 1
    run.tokens += tokens
    row = {
        "step": run.step,
        "epoch": round(run.step / run.batches.steps_per_epoch, 4),
        "loss": loss.item(),
        "grad_norm": norm.item(),
        "learning_rate": lr,
        "tokens": run.tokens,
        "tokens_per_second": round(tokens / max(time.monotonic() - started, 1e-9), 1),
        "memory_gb": round(_peak_memory(run) / 1e9, 3),
        **_on_device(run),
    }
    run.history.append(row)
    run.monitor.row(row)
    return asked


def _peak_memory(run: Run) -> int:
    return max(peak_memory(run.world.device), run.optimizer.pager.peak_bytes())


def _on_device(run: Run) -> dict[str, Any]:
    """How many shapes are replayed, and what the pager did so far; nothing on a CPU."""
    if run.world.device.type != "cuda":
        return {}
    stats = run.optimizer.pager.stats()
    return {
        "graphs": len(run.micro_steps.graphs),
        "state_on_host_gb": round(stats["host_bytes"] / 1e9, 3),
        "evicted_gb": round(sum(stats["evicted_bytes"].values()) / 1e9, 3),
        "offloaded_gb": round(stats["offloaded_bytes"] / 1e9, 3),
        "update_ms": stats["update_ms"],
        "exposed_ms": stats["exposed_ms"],
        "ooms_absorbed": sum(stats["absorbed"].values()),
    }


def _measure(run: Run, stop: StopRequest) -> tuple[list[Tensor], Tensor, Tensor, bool]:
    """Losses of the micro-batches, their sum, the gradients' norm; whether a stop was asked for.

    Where fp16 gradients overflow, the step is repeated with half the loss scale, from then on.
    """
    while True:
        losses = _accumulate(run)
        loss, asked = _sum_over_ranks(run, losses, stop)
        norm = torch.nn.utils.get_total_norm(_gradients(run))
        if run.loss_scale == 1 or torch.isfinite(norm) or not torch.isfinite(loss):
            return losses, loss, norm, asked
        run.loss_scale /= 2
        run.optimizer.zero_grad(set_to_none=True)
        run.monitor.say(f"step {run.step + 1}: fp16 overflow, loss scale now {run.loss_scale:g}")


def _accumulate(run: Run) -> list[Tensor]:
    """Gradients of this rank's micro-batches, added up; returns their shares of the loss.

    Every share is divided by the labels of the whole step, on all ranks, so that a token counts
    the same whatever micro-batch it fell into. The loss scale is in the divisor, so that it
    reaches the first gradient; it is taken out again in the parameters' own precision.
    """
    num_items = sum(run.rows[index].targets for index in run.batches.rows(run.step))
    losses = []
    for indices in run.batches.micro_batches(run.step, run.world.rank):
        batch = _batch(run, [run.rows[index] for index in indices])
        try:
            loss = run.micro_steps(*batch, num_items / run.loss_scale)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(run, error) from error
        losses.append(loss / run.loss_scale)
    if run.loss_scale != 1:
        for gradient in _gradients(run):
            gradient.div_(run.loss_scale)
    return losses


def _batch(run: Run, rows: list[EncodedRow]) -> tuple[Tensor, Tensor]:
    ids, labels = collate(rows, run.pad_id)
    return ids.to(run.world.device), labels.to(run.world.device)


def _out_of_memory(run: Run, error: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(
        f"step {run.step + 1}: {error}. hint: keep gradient_checkpointing on, use optim='8bit' or "
        "placement='auto', or shorten source_max_len, target_max_len or max_seq_len"
    )


def _gradients(run: Run) -> list[Tensor]:
    return [parameter.grad for parameter in run.parameters if parameter.grad is not None]


def _sum_over_ranks(run: Run, losses: list[Tensor], stop: StopRequest) -> tuple[Tensor, bool]:
    """The loss of the step, after adding up gradients and losses of all ranks."""
    loss = torch.zeros((), dtype=torch.float32, device=run.world.device)
    for part in losses:
        loss += part
    asked = torch.tensor(float(stop.signum is not None), device=run.world.device)
    if run.world.size > 1:
        for parameter in run.parameters:
            # Near the end of an epoch a rank may have had no rows.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        run.world.sum_([*_gradients(run), loss, asked])
    return loss, asked.item() > 0


def _not_finite(
    run: Run, losses: list[Tensor], loss: Tensor, norm: Tensor, rng: dict[str, Any]
) -> FloatingPointError:
    """The error naming step and rows, after saving the weights, which the step did not touch."""
    micro_batches = run.batches.micro_batches(run.step, run.world.rank)
    numbers = [
        run.rows[index].number
        for part, indices in zip(losses, micro_batches, strict=True)
        if not torch.isfinite(part)
        for index in indices
    ]
    run.optimizer.zero_grad(set_to_none=True)
    rows = f" in rows {numbers}" if numbers else ""
    return FloatingPointError(
        f"step {run.step + 1}: loss is {loss.item()}, gradient norm {norm.item()}{rows}; "
        f"the weights were not changed. hint: {_way_out(run, rng)}; in a new run, leave out rows "
        "that are broken, or use dtype bfloat16 or float32 instead of float16"
    )


def _way_out(run: Run, rng: dict[str, Any]) -> str:
    """What works after a loss that is not finite, saving what there is to go on from."""
    if run.step == 0:
        return "start again with a lower learning_rate"
    if not all(torch.isfinite(parameter).all() for parameter in run.parameters):
        return "they overflowed before: resume an older checkpoint with a lower learning_rate"
    folder = checkpoints.checkpoint_folder(run.output_dir, run.step)
    if run.world.on_main(lambda: checkpoints.damage(folder)) is not None:
        _save(run, rng)
    return f"resume {folder} by name (resume={str(folder)!r}) with a lower learning_rate"


def _update(run: Run, norm: Tensor) -> float:
    """Clip, set the learning rate, step; returns the learning rate."""
    config = run.config
    if config.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(run.parameters, config.max_grad_norm, norm)
    lr = config.learning_rate * lr_factor(
        config.lr_scheduler_type, run.step, config.warmup_ratio, run.total_steps
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return lr


@torch.no_grad()
def _evaluate(run: Run) -> None:
    """Mean loss over every label of the held-out rows, without touching a generator."""
    size, world = run.config.per_device_batch_size, run.world
    rows = sorted(run.eval_rows, key=lambda row: len(row.ids), reverse=True)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    mine = batches[world.rank :: world.size]
    run.model.eval()
    losses = [_eval_loss(run, batch) for batch in mine]
    run.model.train()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for part in losses:
        total += part
    world.sum_([total])
    loss = total.item() / sum(row.targets for row in rows)
    if not math.isfinite(loss):
        _warn_of_eval_loss(run, mine, losses)
    row = {"step": run.step, "eval_loss": loss}
    run.history.append(row)
    run.monitor.row(row)


def _eval_loss(run: Run, batch: list[EncodedRow]) -> Tensor:
    ids, labels = _batch(run, batch)
    return run.model(ids, labels=labels, num_items=1).loss


def _warn_of_eval_loss(run: Run, batches: list[list[EncodedRow]], losses: list[Tensor]) -> None:
    numbers = [
        row.number
        for part, batch in zip(losses, batches, strict=True)
        if not torch.isfinite(part)
        for row in batch
    ]
    found = sorted(sum(run.world.gather(numbers), []))
    if run.world.main:
        warnings.warn(f"step {run.step}: eval loss is not finite in rows {found}", stacklevel=2)


def _write_adapter(run: Run, folder: Path) -> None:
    try:
        save_adapter(run.model, folder, base_name=run.model.source, base_record=run.base)
    except Exception as error:
        raise checkpoints.unwritten(folder, error) from error


def _finish(run: Run, started: float) -> TrainResult:
    """Write the adapter and the curve, and sum the run up."""
    adapter_dir, curve = run.output_dir / ADAPTER, None
    run.optimizer.pager.settle()
    run.monitor.close()
    if run.world.main and run.world.device.type == "cuda":
        run.optimizer.pager.write_trace(run.output_dir / TRACE)
    run.world.on_main(lambda: _write_adapter(run, adapter_dir))
    if run.world.main:
        curve = draw_curve(run.history, run.output_dir)
        run.monitor.say(f"adapter: {adapter_dir}")
        run.monitor.say(
            f"loss curve: {curve}" if curve else "no loss curve; hint: pip install matplotlib"
        )
    return TrainResult(
        steps=run.step,
        losses=[row["loss"] for row in run.history if "loss" in row],
        eval_losses={row["step"]: row["eval_loss"] for row in run.history if "eval_loss" in row},
        adapter_dir=adapter_dir,
        metrics_path=run.monitor.path,
        loss_curve=curve,
        peak_memory_bytes=_peak_memory(run),
        tokens=run.tokens,
        seconds=time.monotonic() - started,
        resumed_from=run.resumed_from,
        report=run.report,
        model=run.model,
    )
