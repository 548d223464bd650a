"""What the benches share: interleaved timing, cold buffers and rows on disk."""

from __future__ import annotations

import functools
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
# Larger than any last-level cache or L2 in use, so that rotated buffers come from memory.
COLD_BYTES = 256 << 20


class Timing(NamedTuple):
    """Seconds of one contender over all rounds."""

    median: float
    spread: float
    best: float


def summary(seconds: list[float]) -> Timing:
    """Median, (p80 - p20) / median and minimum."""
    middle = median(seconds)
    p20, *_, p80 = quantiles(seconds, n=5, method="inclusive")
    return Timing(middle, (p80 - p20) / middle, min(seconds))


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, Timing]:
    """Time every contender once a round, so that a slow minute of the machine slows them all.

    On CUDA the device's work counts, launches included.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(-warmup, rounds):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            wait()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in seconds.items()}


def replays(work: Callable[[], object], launches: int) -> Timing:
    """Seconds of each of the `launches` that `work` makes, captured in a graph (CUDA)."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    for event in events:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    pairs = zip(events[1:], events[2:], strict=False)
    return summary([1e-3 * a.elapsed_time(b) / launches for a, b in pairs])


def rotation(items: Iterable[Any], work: Callable[..., object]) -> Callable[[], object]:
    """A call of `work` on the next item every time, round and round."""
    cycle = itertools.cycle(items)
    return lambda: work(next(cycle))


def copies(nbytes: int) -> int:
    """How many buffers of `nbytes` make a rotation cold."""
    return max(2, -(-COLD_BYTES // nbytes))


def machine() -> dict[str, Any]:
    """The fields of a row that say where and on what it was measured."""
    device = {"gpu": cpu_name(), "driver": None}
    if torch.cuda.is_available():
        device = {"gpu": torch.cuda.get_device_name(), "driver": driver_version()}
    return {**device, "torch": torch.__version__, "commit": commit()}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


@functools.cache
def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def commit() -> str:
    """The checkout's commit, with a + where tracked files other than rows differ from it."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benches/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def append_row(name: str, row: dict[str, Any]) -> None:
    """Add one JSON line to benches/results/<name>.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def time_row(
    bench: str, times: dict[str, Timing], floor_us: float | None = None, **fields: Any
) -> dict[str, Any]:
    """A row in microseconds; the contender named "halfbyte" is the row, the others its peers."""
    own = times["halfbyte"]
    row = {"bench": bench, **machine(), **fields}
    row |= {"us": round(own.median * 1e6, 2), "spread": round(own.spread, 3)}
    if floor_us is not None:
        row["floor_us"] = round(floor_us, 2)
    peers = {name: round(t.median * 1e6, 2) for name, t in times.items() if name != "halfbyte"}
    return {**row, "peers": peers}


def rate_row(
    bench: str, tokens: int, times: dict[str, Timing], peak_gb: float | None = None, **fields: Any
) -> dict[str, Any]:
    """A row in tokens per second; `tokens` are what every contender makes in one call."""
    own = times["halfbyte"]
    row = {"bench": bench, **machine(), **fields}
    row |= {"tokens_per_s": round(tokens / own.median, 2), "spread": round(own.spread, 3)}
    if peak_gb is not None:
        row["peak_gb"] = round(peak_gb, 3)
    peers = {name: round(tokens / t.median, 2) for name, t in times.items() if name != "halfbyte"}
    return {**row, "peers": peers}


def show(label: str, times: dict[str, Timing], peer: str = "bitsandbytes") -> None:
    """One line for the reader: times, and the peer's time over halfbyte's (above 1: faster)."""
    own = times["halfbyte"]
    line = f"{label:44} halfbyte {own.median * 1e6:10.0f} us"
    if peer in times:
        other = times[peer]
        line += f"  {peer} {other.median * 1e6:10.0f} us"
        line += f"  ratio {other.median / own.median:5.2f} (best {other.best / own.best:5.2f})"
    print(line, flush=True)
