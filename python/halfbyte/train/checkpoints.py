"""Checkpoints of a run: written aside, verified before they are trusted, resumed exactly."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.errors import CheckpointError

MANIFEST = "complete.json"
STATE = "state.json"
OPTIMIZER = "optimizer.pt"
RNG = "rng.pt"
PREFIX = "checkpoint-"
WRITING = ".writing"
ABANDONED = "abandoned-"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return output_dir / f"{PREFIX}{step}"


def write_checkpoint(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` from what `fill` writes, so that a crash leaves all of it or nothing.

    The files are written to a hidden folder beside it, listed with their sha256, synced to disk,
    and only then renamed. Where `folder` was there before, a crash leaves the old or the new one;
    `finish_writes` completes the latter's renaming.

    Raises OSError naming the folder when it cannot be written, and leaves nothing of it.
    """
    aside = folder.parent / f".{folder.name}{WRITING}"
    try:
        _write_aside(aside, fill)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise unwritten(folder, error) from error
    _remove(folder)
    aside.rename(folder)
    _sync(folder.parent)


def unwritten(path: Path, error: Exception) -> OSError:
    """The error to raise for what could not be written, whatever library found out."""
    return OSError(
        f"{path} could not be written: {error}. hint: see that the disk has room and the folder "
        "may be written; checkpoints from before are as they were"
    )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Say which file an error of the block is about: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise unwritten(path, error) from error


def _write_aside(aside: Path, fill: Callable[[Path], None]) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    fill(aside)
    files = sorted(path for path in aside.iterdir() if path.is_file())
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*files, aside / MANIFEST, aside]:
        _sync(path)


def finish_writes(output_dir: Path) -> None:
    """Rename what was written whole, but whose writer was killed before it could."""
    for aside in output_dir.glob(f".{PREFIX}*{WRITING}"):
        folder = output_dir / aside.name[1:].removesuffix(WRITING)
        if not folder.exists() and damage(aside) is None:
            aside.rename(folder)


def damage(folder: Path, hashed: bool = True) -> str | None:
    """Why a checkpoint cannot be trusted, or None if every listed file is there and intact.

    With `hashed` false only sizes are compared, which takes no time.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not manifest:
            return f"{MANIFEST} lists nothing"
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"] or (
                hashed and _sha256(path) != expected["sha256"]
            ):
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} or a file that it lists cannot be read"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, newest first, whether intact or not."""
    found = [path for path in _numbered(output_dir) if path.is_dir()]
    return sorted(found, key=_number, reverse=True)


def _numbered(output_dir: Path) -> list[Path]:
    """Whatever has the name of a checkpoint."""
    found = output_dir.glob(f"{PREFIX}*")
    return [path for path in found if path.name[len(PREFIX) :].isdecimal()]


def _number(path: Path) -> int:
    return int(path.name[len(PREFIX) :])


def newest_complete(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint, and a sentence for each damaged one passed over."""
    passed_over: list[str] = []
    for folder in checkpoints(output_dir):
        reason = damage(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"{folder} is damaged ({reason}), looking for an older one")
    return None, passed_over


def find_checkpoint(output_dir: Path, resume: bool | str | Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `resume` of TrainConfig means, and sentences about damaged ones.

    Completes interrupted writes first. Raises FileExistsError (False, but there are checkpoints),
    FileNotFoundError (True, but there is none), CheckpointError (the one named is damaged).
    """
    finish_writes(output_dir)
    if resume is False:
        if old := checkpoints(output_dir):
            raise FileExistsError(
                f"resume is False but {old[0]} exists. hint: choose another output_dir, or remove "
                "the checkpoints of the earlier run"
            )
        return None, []
    if resume is True or resume == "auto":
        folder, passed_over = newest_complete(output_dir)
        if folder is None and resume is True:
            notes = "".join(f"\n{line}" for line in passed_over)
            raise FileNotFoundError(f"resume: no complete checkpoint in {output_dir}{notes}")
        return folder, passed_over
    folder = Path(resume).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"resume: {folder} is not a checkpoint folder")
    if reason := damage(folder):
        raise CheckpointError(f"resume: {folder} is damaged: {reason}")
    return folder, []


def remove_leftovers(output_dir: Path) -> None:
    """Remove what interrupted writes and removals left."""
    for leftover in output_dir.glob(f".{PREFIX}*"):
        _delete(leftover)


def set_aside(output_dir: Path, step: int) -> list[Path]:
    """Rename what lies past `step`, where this run goes another way; returns the new names."""
    moved = []
    for path in _numbered(output_dir):
        if _number(path) > step or not path.is_dir():
            target = output_dir / f"{ABANDONED}{path.name}"
            _delete(target)
            moved.append(path.rename(target))
    return moved


def prune(output_dir: Path, keep: int | None, written: Path) -> None:
    """Remove what is older than the newest `keep` intact checkpoints; never the one `written`."""
    intact = 0
    for folder in checkpoints(output_dir):
        if keep is not None and intact >= keep and folder != written:
            _remove(folder)
        elif damage(folder, hashed=False) is None:
            intact += 1


def read_state(folder: Path) -> dict[str, Any]:
    """The step counters and settings of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def check_settings(
    folder: Path, then: dict[str, Any], now: dict[str, Any], free: Collection[str] = ()
) -> list[str]:
    """Sentences about the settings in `free` that differ from the run that wrote `folder`.

    Raises ValueError naming every other one that differs.
    """
    changed = _differences(then, json.loads(json.dumps(now)))
    refused = [line for name, line in changed.items() if name not in free]
    if refused:
        raise ValueError(
            f"cannot resume exactly from {folder}, this run differs:\n  "
            + "\n  ".join(refused)
            + "\nhint: give the same settings, or another output_dir for a new run"
        )
    return list(changed.values())


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """A sentence for each key whose values differ; of a table, the first entry that does."""
    changed = {}
    for name in sorted(then.keys() | now.keys()):
        old, new = then.get(name), now.get(name)
        if old != new and isinstance(old, dict) and isinstance(new, dict):
            inside = list(_differences(old, new).values())
            more = f" (and {len(inside) - 1} more)" if len(inside) > 1 else ""
            changed[name] = f"{name}: {inside[0]}{more}"
        elif old != new:
            changed[name] = f"{name}: {old!r} then, {new!r} now"
    return changed


def load_tensors(path: Path) -> Any:
    """A file of tensors and plain values; never unpickles anything else."""
    return torch.load(path, map_location="cpu", weights_only=True)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of python, numpy and torch, as tensors and plain values."""
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(words), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    saved = state["numpy"]
    key = saved["key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, saved["pos"], saved["has_gauss"], saved["gauss"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _remove(folder: Path) -> None:
    """Rename first: a checkpoint half deleted must not look like one."""
    if folder.exists():
        dying = folder.parent / f".{folder.name}.removing"
        _delete(dying)
        folder.rename(dying)
        _delete(dying)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
