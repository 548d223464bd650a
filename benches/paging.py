"""What paging costs: updates of host pages, whole training steps, and runs under a memory cap.

update: the optimizer alone over a LoRA of rank r on all linear layers, beside torch's fused AdamW.
grid: training steps with a share of the state in host memory, beside those with none.
lengths: batches of mixed lengths under caps that lack a share of the state beside the longest.
capped: a random model of LLaMA's shape trained under a cap, beside what `halfbyte plan` says.
soak: memory held, over minutes of mixed lengths, moves of the state and snapshots.
fit: the law of the grid's rows, overhead_ms = slow * hidden + exposed + k, and its plot.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from statistics import linear_regression, mean, median
from typing import NamedTuple

import torch
from bench import RESULTS, append_row, interleave, machine, time_row
from journey import SHAPES, config, random_model
from torch import Tensor

from halfbyte import LoraConfig, lora, optim
from halfbyte.models import Decoder
from halfbyte.plan import Setup, footprint
from halfbyte.pressure import join_segments

RATE = 2e-4
CAPS = {"7b": 6, "33b": 24, "65b": 48}
# batch, sequence, micro-batches a step
GRID = [(1, 256, 1), (1, 512, 1), (1, 2048, 1), (4, 512, 1), (16, 512, 1), (1, 512, 4)]
SHARES = (0.25, 0.5, 1.0)
SPIKE = 8  # times the usual length
# Of an update of pages in host memory alone, both directions together, as measured on an H200.
GB_PER_S = {"fp32": 79, "8bit": 59}
MIXES = ("fixed", "lognormal", "spikes")


class Training:
    """A random model with an adapter, and its step at any shape."""

    def __init__(self, shape: str, r: int):
        torch.manual_seed(0)
        self.shape, self.r = shape, r
        self.model: Decoder = random_model(shape, torch.device("cuda"))
        self.model.config = replace(self.model.config, max_position_embeddings=1 << 16)
        lora.inject(self.model, LoraConfig(r=r, lora_alpha=16))
        self.model.train()
        self.model.gradient_checkpointing = True
        self.params = lora.adapter_parameters(self.model)

    def optimizer(self, state: str, placement: str) -> optim.AdamW:
        made = optim.AdamW(self.params, RATE, state=state, placement=placement, max_grad_norm=0.3)
        made.overlap(self.model.model.layers)
        return made

    def step(
        self, optimizer: optim.AdamW, batch: int, seq: int, accumulation: int = 1
    ) -> Callable[[], None]:
        size = (accumulation, batch, seq)
        ids = torch.randint(0, self.model.config.vocab_size, size, device="cuda")

        def work(ids: Tensor) -> Tensor:
            loss = self.model(ids, labels=ids, num_items=batch * (seq - 1) * accumulation).loss
            loss.backward()
            return loss.detach()

        def run() -> None:
            for one in ids:
                optimizer.pager.micro_step(work, one, model=self.model)
            optimizer.step()
            optimizer.zero_grad()

        return run


def seconds(run: Callable[[], None], rounds: int, steps: int = 3) -> float:
    """Median time of a step: several are queued, so that one may overlap the next."""
    run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / steps)
    return median(times)


def write(bench: str, **fields: object) -> None:
    keep({"bench": f"paging_{bench}", **machine(), **fields})


def keep(row: dict) -> None:
    print(json.dumps(row), flush=True)
    append_row("paging", row)


def update(args: argparse.Namespace) -> None:
    with torch.device("meta"):
        layers = [m for n, m in Decoder(config(args.shape)).named_modules() if hasattr(m, "weight")]
    linears = [m for m in layers if isinstance(m, torch.nn.Linear)][:-1]
    sizes = [size for m in linears for size in ((args.r, m.in_features), (m.out_features, args.r))]
    params = [torch.nn.Parameter(0.02 * torch.randn(size, device="cuda")) for size in sizes]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    fused = torch.optim.AdamW(params, RATE, weight_decay=0.0, fused=True)
    for state, placement in itertools.product(("fp32", "8bit"), ("device", "host")):
        ours = optim.AdamW(params, RATE, state=state, placement=placement)
        works = {"halfbyte": ours.step}
        if placement == "device":
            works["torch fused fp32"] = fused.step
        times = interleave(works, 4 * args.rounds, warmup=3)
        moved = 2 * ours.pager.stats()["state_bytes"]
        fields = dict(model=args.shape, r=args.r, state=state, placement=placement)
        row = time_row("paging_update", times, **fields)
        keep(row | {"state_gb_per_s": round(moved / times["halfbyte"].median / 1e9, 1)})
        del ours
        gc.collect()


def grid(args: argparse.Namespace) -> None:
    training = Training(args.shape, args.r)
    for state in args.states:
        optimizer = training.optimizer(state, "auto")
        for batch, seq, accumulation in GRID:
            if batch * seq * accumulation > args.most_tokens:
                continue
            run = training.step(optimizer, batch, seq, accumulation)
            run()
            fields = dict(model=args.shape, r=args.r, state=state, batch=batch, seq=seq)
            fields |= dict(accumulation=accumulation)
            shares = SHARES if (batch, seq, accumulation) == (1, 512, 1) else (1.0,)
            for share in shares:
                write("grid", **fields, share=share, **paired(optimizer, run, share, args.rounds))
        del optimizer, run
        gc.collect()


def paired(
    optimizer: optim.AdamW, run: Callable[[], None], share: float, rounds: int, steps: int = 2
) -> dict[str, float]:
    """Steps with all state on the device and with a share of it on the host, in turns, so that a
    slow moment slows both. Times are from one step's end to another's on torch's stream: the update
    of the step before runs beside the first, and that of the last one beside nothing that counts.
    """
    pager = optimizer.pager
    share_bytes = int(share * pager.stats()["state_bytes"])
    places = {"device_ms": pager.restore, "host_ms": lambda: pager.evict(share_bytes)}
    times: dict[str, list[float]] = {name: [] for name in places}
    for name in list(places) * rounds:
        places[name]()
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(steps):
            run()
        end.record()
        torch.cuda.synchronize()
        times[name].append(begin.elapsed_time(end) / steps)
    found = {name: round(median(values), 3) for name, values in times.items()}
    ratios = [host / device for device, host in zip(*times.values(), strict=True)]
    return found | {
        "ratio": round(median(ratios), 4),
        "best_ratio": round(min(times["host_ms"]) / min(times["device_ms"]), 4),
        "bus_bytes": 2 * pager.stats()["host_bytes"],
    }


def mixed(mix: str, seq: int, steps: int) -> list[int]:
    """Lengths of batches, the same ones for the same arguments."""
    if mix == "fixed":
        return [seq] * steps
    if mix == "spikes":
        return [SPIKE * seq if step % 25 == 24 else seq for step in range(steps)]
    draw = random.Random(0).lognormvariate
    drawn = [seq * draw(0.0, 0.7) for _ in range(steps)]
    return [min(SPIKE * seq, max(64, 64 * round(length / 64))) for length in drawn]


def lengths(args: argparse.Namespace) -> None:
    training = Training(args.shape, args.r)
    for mix in MIXES:
        run = mixed(mix, args.seq, args.steps)
        torch.cuda.reset_peak_memory_stats()
        optimizer = training.optimizer("fp32", "device")
        training.step(optimizer, 1, max(run))()
        peak, state = optimizer.pager.peak_bytes(), optimizer.pager.stats()["state_bytes"]
        del optimizer
        for margin in (0.0, *SHARES):
            cap(peak + peak // 50 - int(margin * state))
            optimizer = training.optimizer("fp32", "auto")
            times = [stepwise(training.step(optimizer, 1, length)) for length in run]
            of = [t for t, length in zip(times, run, strict=True) if length == max(run)]
            stats = optimizer.pager.stats()
            fields = dict(model=args.shape, r=args.r, seq=args.seq, mix=mix, margin=margin)
            fields |= dict(steps=len(run), mean_ms=round(mean(times[1:]), 2))
            fields |= dict(median_ms=round(median(times), 2), longest_ms=round(median(of), 2))
            fields |= dict(tokens_per_s=round(sum(run[1:]) / sum(times[1:]) * 1e3, 1))
            fields |= {f"{key}_gb": gigabytes(stats[f"{key}_bytes"]) for key in MOVES}
            write("lengths", **fields, absorbed=stats["absorbed"])
            del optimizer
            cap(None)


MOVES = ("evicted", "restored", "zero_copy", "offloaded")


def gigabytes(nbytes: int | dict[str, int]) -> float:
    return round((sum(nbytes.values()) if isinstance(nbytes, dict) else nbytes) / 1e9, 3)


def stepwise(run: Callable[[], None]) -> float:
    """Milliseconds of one step and of what it left to do."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def capped(args: argparse.Namespace) -> None:
    limit = args.cap or CAPS[args.shape]
    cap(limit * 10**9)
    training = Training(args.shape, args.r)
    optimizer = training.optimizer(args.state, "auto")
    run = training.step(optimizer, args.batch, args.seq)
    # The ladder is climbed in the first steps; what the rest take is what was planned.
    run()
    run()
    offloaded = optimizer.pager.stats()["offloaded_bytes"]
    taken = seconds(run, args.rounds)
    peak, stats = torch.cuda.max_memory_allocated(), optimizer.pager.stats()
    setup = Setup(seq=args.seq, batch=args.batch, r=args.r, optim=args.state)
    planned = footprint(config(args.shape), setup)
    on_device = stats["device_bytes"]
    if stats["offloaded_bytes"] > offloaded:
        planned = planned.without_checkpoints(training.model.config.num_hidden_layers)
    fields = dict(model=args.shape, r=args.r, state=args.state, batch=args.batch, seq=args.seq)
    fields |= dict(cap_gb=limit, tokens_per_s=round(args.batch * args.seq / taken, 1))
    fields |= dict(peak_gb=gigabytes(peak), highest_gb=gigabytes(optimizer.pager.peak_bytes()))
    fields |= dict(planned_gb=gigabytes(planned.without_state().peak + on_device))
    write("capped", **fields, stats=stats)
    cap(None)


def soak(args: argparse.Namespace) -> None:
    """The same epoch of lengths again and again; what is held at its end must not grow."""
    training = Training(args.shape, args.r)
    optimizer = training.optimizer(args.state, "auto")
    epoch, held = mixed("lognormal", args.seq, 50), []
    end = time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        for step, length in enumerate(epoch):
            if step % 10 == 3:
                optimizer.pager.evict(1 << 62)
            if step % 10 == 8:
                optimizer.pager.restore()
            training.step(optimizer, 1, length)()
        optimizer.state_dict()
        held.append(memory_held(optimizer))
    half = len(held) // 2
    most = {
        name: [max(one[name] for one in part) for part in (held[:half], held[half:])]
        for name in held[0]
    }
    fields = dict(model=args.shape, r=args.r, state=args.state, seq=args.seq)
    fields |= dict(minutes=args.minutes, steps=len(held) * len(epoch))
    write("soak", **fields, most_in_each_half=most, absorbed=optimizer.pager.stats()["absorbed"])


def memory_held(optimizer: optim.AdamW) -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    kib = {name: int(size) for name, size in re.findall(r"(\w+):\s*(\d+) kB", status)}
    return {
        "reserved": torch.cuda.memory_reserved(),
        "pinned": optimizer.pager.stats()["pinned_bytes"],
        "resident": kib["VmRSS"] << 10,
    }


def cap(nbytes: int | None) -> None:
    """Limit torch to so many bytes of the device, as if there were no more, from a fresh start."""
    gc.collect()
    torch.cuda.empty_cache()
    join_segments(False)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (nbytes or total) / total), 0)


class Law(NamedTuple):
    """What a step takes longer, in ms: slow * hidden + exposed + k.

    The update of the pages in host memory takes MB / GB/s, as measured alone. It runs beside the
    forward of the next step's first micro-batch, which is `share` of that micro-batch's time: as
    much of it is hidden, and slows the forward by the part `slow` of its time; the rest is exposed.
    """

    share: float
    slow: float
    k: float

    def parts(self, row: dict) -> tuple[float, float]:
        """Hidden and exposed ms."""
        update = update_ms(row)
        hidden = min(update, self.share * row["device_ms"] / row["accumulation"])
        return hidden, update - hidden

    def __call__(self, row: dict) -> float:
        hidden, exposed = self.parts(row)
        return self.slow * hidden + exposed + self.k


def least_squares(rows: list[dict]) -> Law:
    """The law with the least sum of squares over the rows: a line for every share in question."""

    def best(share: float) -> Law:
        parts = [Law(share, 0.0, 0.0).parts(row) for row in rows]
        left = [overhead(row) - exposed for row, (_, exposed) in zip(rows, parts, strict=True)]
        return Law(share, *linear_regression([hidden for hidden, _ in parts], left))

    shares = [0.01 * i for i in range(2, 101)]
    return min(map(best, shares), key=lambda law: rms_miss(law, rows))


def rms_miss(law: Law, rows: list[dict]) -> float:
    return math.sqrt(mean((law(row) - overhead(row)) ** 2 for row in rows))


def update_ms(row: dict) -> float:
    """The update of the pages in host memory, alone."""
    return row["bus_bytes"] / 1e6 / GB_PER_S[row["state"]]


def overhead(row: dict) -> float:
    return row["host_ms"] - row["device_ms"]


def newest(rows: list[dict]) -> list[dict]:
    """The last row of each cell of the grid; rows with `tail_ms` were timed otherwise."""
    key = itemgetter("gpu", "model", "state", "batch", "seq", "accumulation", "share")
    grid = [row for row in rows if row["bench"] == "paging_grid" and "tail_ms" not in row]
    return list({key(row): row for row in grid}.values())


def fit(args: argparse.Namespace) -> None:
    lines = (RESULTS / "paging.jsonl").read_text().splitlines()
    rows = newest([json.loads(line) for line in lines])
    law = least_squares(rows)
    print(
        f"hidden: up to {law.share:.2f} of a micro-batch; overhead_ms = {law.slow:.3f} * hidden + "
        f"exposed + {law.k:.2f}; {len(rows)} rows, off by {rms_miss(law, rows):.2f} ms (rms)"
    )
    draw(rows)


def draw(rows: list[dict]) -> None:
    from matplotlib import pyplot as plt

    figure, (ratios, overheads) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for i, model in enumerate(sorted({row["model"] for row in rows})):
        for state, marker in (("fp32", "o"), ("8bit", "s")):
            mine = [row for row in rows if (row["model"], row["state"]) == (model, state)]
            style = dict(marker=marker, s=18, color=f"C{i}", alpha=1 if state == "fp32" else 0.5)
            whole = [row for row in mine if row["share"] == 1]
            tokens = [row["batch"] * row["seq"] * row["accumulation"] for row in whole]
            label = f"{model}, {state} state"
            ratios.scatter(tokens, [row["ratio"] for row in whole], label=label, **style)
            overheads.scatter(list(map(update_ms, mine)), list(map(overhead, mine)), **style)
    ratios.set_xscale("log", base=2)
    ratios.set(xlabel="tokens a step", ylabel="step, all state on the host / on the device")
    ratios.axhline(1.0, color="gray", lw=0.8)
    ratios.legend(fontsize=7)
    longest = max(map(update_ms, rows))
    overheads.plot([0, longest], [0, longest], color="gray", lw=0.8, label="nothing hidden")
    overheads.set(xlabel="ms that the update takes alone", ylabel="ms that a step takes longer")
    overheads.legend(fontsize=7)
    for axes in (ratios, overheads):
        axes.grid(alpha=0.3, lw=0.4)
    figure.savefig(RESULTS / "paging.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = {
        "update": update,
        "grid": grid,
        "lengths": lengths,
        "capped": capped,
        "soak": soak,
        "fit": fit,
    }
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--state", choices=("fp32", "8bit"), default="fp32")
    parser.add_argument("--cap", type=float, help="GB; default: 6, 24, 48 for 7b, 33b, 65b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most-tokens", type=int, default=8192, help="of a step of the grid")
    parser.add_argument("--states", nargs="+", choices=("fp32", "8bit"), default=["fp32", "8bit"])
    parser.add_argument("--steps", type=int, default=75, help="of each run of `lengths`")
    parser.add_argument("--minutes", type=float, default=10, help="of the soak")
    args = parser.parse_args()
    jobs[args.job](args)


if __name__ == "__main__":
    main()
