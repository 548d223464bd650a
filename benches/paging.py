"""What paging costs: updates of host pages, whole training steps, and runs under a memory cap.

update: the optimizer alone over a LoRA of rank r on all linear layers, beside torch's fused AdamW.
grid: training steps with all state on the device and all of it in host memory.
spikes: rare long batches under a cap that holds the state or them, but not both.
capped: a random model of LLaMA's shape trained under a cap, beside what `halfbyte plan` says.
fit: the law of the grid's rows, overhead_ms = max(0, bytes / bandwidth - hidden) + k, and its plot.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from bench import RESULTS, append_row, interleave, machine, time_row
from journey import SHAPES, config, random_model
from torch import Tensor

from halfbyte import LoraConfig, lora, optim
from halfbyte.models import Decoder
from halfbyte.plan import Setup, footprint

RATE = 2e-4
CAPS = {"7b": 6, "33b": 24, "65b": 48}


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


def write(row: dict) -> None:
    print(row, flush=True)
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
        write(row | {"state_gb_per_s": round(moved / times["halfbyte"].median / 1e9, 1)})
        del ours
        gc.collect()


def grid(args: argparse.Namespace) -> None:
    training = Training(args.shape, args.r)
    shapes = [(1, 256), (1, 512), (1, 2048), (4, 512), (16, 512), (1, 8192)]
    for (batch, seq), accumulation in itertools.product(shapes, (1, 4)):
        if batch * seq * accumulation > args.most_tokens:
            continue
        for state in ("fp32", "8bit"):
            found = {}
            for placement in ("device", "host"):
                optimizer = training.optimizer(state, placement)
                run = training.step(optimizer, batch, seq, accumulation)
                found[placement] = seconds(run, args.rounds)
                nbytes = 2 * optimizer.pager.stats()["state_bytes"]
                del run, optimizer
                gc.collect()
            fields = dict(model=args.shape, r=args.r, state=state, batch=batch, seq=seq)
            fields |= dict(accumulation=accumulation, bus_bytes=nbytes)
            ms = {f"{name}_ms": round(1e3 * value, 3) for name, value in found.items()}
            ratio = round(found["host"] / found["device"], 4)
            write({"bench": "paging_grid", **machine(), **fields, **ms, "ratio": ratio})


def spikes(args: argparse.Namespace) -> None:
    """Every 25th batch is eight times as long; the cap lacks half the state beside it."""
    training = Training(args.shape, args.r)
    before = torch.cuda.memory_allocated()
    optimizer = training.optimizer("fp32", "device")
    training.step(optimizer, 1, 8 * args.seq)()
    peak, state = optimizer.pager.peak_bytes(), optimizer.pager.stats()["state_bytes"]
    del optimizer
    cap(peak - state // 2)
    optimizer = training.optimizer("fp32", "auto")
    short, long = (training.step(optimizer, 1, seq) for seq in (args.seq, 8 * args.seq))
    times = []
    for step in range(1, 101):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        (long if step % 25 == 0 else short)()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    usual = [t for step, t in enumerate(times, 1) if step % 25 not in (0, 1, 2, 3, 4, 5)]
    after = [t for step, t in enumerate(times, 1) if step > 25 and step % 25 in (1, 2, 3, 4, 5)]
    stats = optimizer.pager.stats()
    fields = dict(model=args.shape, r=args.r, seq=args.seq, cap_gb=(peak - state // 2) / 1e9)
    fields |= dict(base_gb=before / 1e9, usual_ms=median(usual), after_ms=median(after))
    fields |= dict(spike_ms=median(times[24::25]), stats=stats)
    write({"bench": "paging_spikes", **machine(), **fields})
    cap(None)


def capped(args: argparse.Namespace) -> None:
    limit = args.cap or CAPS[args.shape]
    cap(limit * 10**9)
    training = Training(args.shape, args.r)
    optimizer = training.optimizer(args.state, "auto")
    run = training.step(optimizer, args.batch, args.seq)
    taken = seconds(run, args.rounds)
    setup = Setup(seq=args.seq, batch=args.batch, r=args.r, optim=args.state)
    planned, stats = footprint(config(args.shape), setup), optimizer.pager.stats()
    on_device = planned.state * stats["device_bytes"] / max(1, stats["state_bytes"])
    fields = dict(model=args.shape, r=args.r, state=args.state, batch=args.batch, seq=args.seq)
    fields |= dict(cap_gb=limit, tokens_per_s=round(args.batch * args.seq / taken, 1))
    fields |= dict(peak_gb=round(optimizer.pager.peak_bytes() / 1e9, 3))
    fields |= dict(planned_gb=round((planned.without_state().peak + on_device) / 1e9, 3))
    write({"bench": "paging_capped", **machine(), **fields, "stats": stats})
    cap(None)


def cap(nbytes: int | None) -> None:
    """Limit torch to so many bytes of the device, as if there were no more."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (nbytes or total) / total), 0)


def law(rows: Iterable[dict]) -> tuple[float, float, float]:
    """Bandwidth (GB/s), hidden share of the device step, and k (ms) that fit the rows best.

    overhead_ms = max(0, bytes / bandwidth - share * device_ms) + k, by a search over all three.
    """
    points = [(r["bus_bytes"] / 1e6, r["device_ms"], r["host_ms"] - r["device_ms"]) for r in rows]

    def miss(candidate: tuple[float, float, float]) -> float:
        bandwidth, share, k = candidate
        law = ((max(0.0, mb / bandwidth - share * ms) + k, over) for mb, ms, over in points)
        return sum((expected - over) ** 2 for expected, over in law)

    bandwidths = [10 * 1.05**i for i in range(50)]
    shares = [0.02 * i for i in range(51)]
    return min(itertools.product(bandwidths, shares, [0.25 * i for i in range(-4, 21)]), key=miss)


def fit(args: argparse.Namespace) -> None:
    lines = (RESULTS / "paging.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["bench"] == "paging_grid"]
    bandwidth, share, k = law(rows)
    print(
        f"overhead_ms = max(0, MB / {bandwidth:.1f} - {share:.2f} * device_ms) + {k:.2f}, "
        f"over {len(rows)} rows"
    )
    draw(rows, args.plot)


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for model, state in sorted({(row["model"], row["state"]) for row in rows}):
        mine = [row for row in rows if (row["model"], row["state"]) == (model, state)]
        tokens = [row["batch"] * row["seq"] * row["accumulation"] for row in mine]
        axes.scatter(tokens, [row["ratio"] for row in mine], label=f"{model}, {state} state")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of an optimizer step")
    axes.set_ylabel("step time, all state on the host / on the device")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = {"update": update, "grid": grid, "spikes": spikes, "capped": capped, "fit": fit}
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--state", choices=("fp32", "8bit"), default="fp32")
    parser.add_argument("--cap", type=float, help="GB; default: 6, 24, 48 for 7b, 33b, 65b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most-tokens", type=int, default=8192, help="of a step of the grid")
    parser.add_argument("--plot", type=Path, default=RESULTS / "paging.png")
    args = parser.parse_args()
    jobs[args.job](args)


if __name__ == "__main__":
    main()
