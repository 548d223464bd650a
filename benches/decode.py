"""Decode through the engine at Llama shapes with random weights, beside the memory's floor.

A rate is that of the tokens past the first 32, so that reading the prompt and capturing the step
are not in it; `--profile` shows where a step's time goes instead.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

import torch
from bench import Timing, append_row, rate_row, summary, time_row
from contenders import transformers_decode, transformers_model
from journey import PEER, SHAPES, random_model

from halfbyte import LoraConfig, lora
from halfbyte.checkpoint import default_device
from halfbyte.engine import Engine
from halfbyte.kv_cache import block_bytes, blocks_for
from halfbyte.models import Decoder
from halfbyte.sampling import Kind, Sampling

BANDWIDTH = 4.3e12
FIRST = 32
# Of which the first token is timed.
PROMPT = 512
SAMPLED = Sampling(temperature=0.8, top_p=0.95, seed=1)


def floor_seconds(model: Decoder, batch: int, context: int) -> float:
    """Weights once, each sequence's keys and values once, over the memory's bandwidth."""
    tensors = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    nbytes = sum(p.numel() * p.element_size() for p in tensors)
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            scales = [state.absmax, state.nested.absmax]
            nbytes += sum(x.numel() * x.element_size() for x in scales)
    return (nbytes + batch * blocks_for(context) * block_bytes(model.config, torch.bfloat16)) / (
        BANDWIDTH
    )


class Run:
    """One engine and prompts that no run before has seen."""

    def __init__(
        self, model: Decoder, batch: int, context: int, tokens: int, sampling: Sampling
    ) -> None:
        self.model, self.batch, self.tokens, self.sampling = model, batch, tokens, sampling
        # Attention reads `context` tokens half-way through the reply.
        self.prompt = max(1, context - FIRST - tokens // 2)
        blocks = batch * blocks_for(max(PROMPT + 1, self.prompt + FIRST + tokens))
        each = block_bytes(model.config, torch.bfloat16)
        self.engine = Engine(model, max_batch=batch, kv_budget=blocks * each)

    def prompts(self, length: int) -> list[list[int]]:
        vocab = self.model.config.vocab_size
        return torch.randint(0, vocab, (self.batch, length)).tolist()

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        start = time.perf_counter()
        self.engine.generate(prompts, self.sampling, max_new_tokens=tokens)
        return time.perf_counter() - start

    def decode(self) -> float:
        """Seconds of `tokens` steps: a long run less a short one of the same prompts."""
        prompts = self.prompts(self.prompt)
        self.engine.refresh()
        short = self.seconds(prompts, FIRST)
        self.engine.refresh()
        return self.seconds(prompts, FIRST + self.tokens) - short


class Peer:
    """transformers + bitsandbytes over the same tensors, as `Run` times it."""

    def __init__(self, model: Decoder, run: Run) -> None:
        self.model, self.run = transformers_model(model), run

    def seconds(self, prompt: list[int], tokens: int) -> float:
        work = transformers_decode(self.model, prompt, tokens)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def decode(self) -> float:
        (prompt,) = self.run.prompts(self.run.prompt)
        short = self.seconds(prompt, FIRST)
        return self.seconds(prompt, FIRST + self.run.tokens) - short


def timing(work, rounds: int, warmup: int = 1) -> Timing:
    return summary([work() for _ in range(-warmup, rounds)][warmup:])


def measure(model: Decoder, args: argparse.Namespace, batch: int, context: int, r: int) -> None:
    sampling = SAMPLED if args.sampled else Sampling()
    run = Run(model, batch, context, args.tokens, sampling)
    fields = {"dtype": "bf16", "model": f"llama-{args.shape}", "r": r, "batch": batch}
    fields |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    took = {"halfbyte": timing(run.decode, args.rounds)}
    if args.peers and batch == 1 and r == 0 and not args.sampled:
        peer = Peer(model, run)
        took[PEER] = timing(peer.decode, args.rounds)
    sizes = {"seq": context, "new_tokens": args.tokens}
    row = rate_row("decode", batch * args.tokens, took, **fields, **sizes)
    floor = batch / floor_seconds(model, batch, context)
    row["floor_tokens_per_s"] = round(floor, 1)
    rate = f"{row['tokens_per_s']} of {floor:.0f} {row['peers'] or ''}"
    print(f"decode {fields} context {context}: {rate}", flush=True)
    append_row("decode", row)
    if batch == 1 and context <= PROMPT:
        took = timing(lambda: run.seconds(run.prompts(PROMPT), 1), args.rounds)
        row = time_row("first_token", {"halfbyte": took}, seq=PROMPT, **fields)
        print(f"first token {fields}: {row['us'] / 1000:.1f} ms", flush=True)
        append_row("decode", row)


def start_up(model: Decoder, args: argparse.Namespace) -> None:
    """From `Engine(...)` to the first token, and to the thirty-second, graph included."""

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        Engine(model, max_batch=1).generate(list(range(1, 17)), max_new_tokens=tokens)
        return time.perf_counter() - start

    first, more = (summary([seconds(tokens) for _ in range(3)]) for tokens in (1, 32))
    fields = {"dtype": "bf16", "model": f"llama-{args.shape}", "batch": 1, "seq": 16}
    row = time_row("start_up", {"halfbyte": first}, us_32=round(more.median * 1e6), **fields)
    print(
        f"from Engine(...) to token 1: {row['us'] / 1000:.0f} ms, to 32: {row['us_32'] / 1000:.0f}"
    )
    append_row("decode", row)


@torch.inference_mode()
def profile(model: Decoder, batch: int, context: int) -> None:
    """Where the time of a captured step and of reading a prompt goes."""
    run = Run(model, batch, context, 64, Sampling())
    wall = median(run.decode() for _ in range(3)) / run.tokens
    decode = run.engine._scheduler.decode
    # Nobody runs any more: the rows get lengths and blocks of their own again.
    decode.sampling.lengths.fill_(context)
    blocks = torch.arange(batch * decode.tables.shape[1], device=decode.tables.device)
    decode.tables.copy_(blocks.view(batch, -1) % (decode.cache.blocks - 1) + 1)

    def step() -> None:
        decode.forward(batch)
        decode.draw(batch, Kind())

    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    for event in events:
        step()
        event.record()
    torch.cuda.synchronize()
    gaps = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    print(f"batch {batch}: {wall * 1e3:.3f} ms a step, {median(gaps):.3f} ms of it back to back")
    print_kernels(lambda: [step() for _ in range(10)], 10, 16)
    for row in range(batch):
        decode.remove(row)
    if batch == 1:
        run.seconds(run.prompts(PROMPT), 1)
        print(f"prompt of {PROMPT}: {run.seconds(run.prompts(PROMPT), 1) * 1e3:.1f} ms")
        print_kernels(lambda: run.seconds(run.prompts(PROMPT), 1), 1, 10)


def print_kernels(work, count: int, most: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    rows = sorted(recorded.key_averages(), key=lambda row: -row.device_time_total)
    print(f"{sum(row.device_time_total for row in rows) / count:9.1f} us of kernels, the longest:")
    for row in rows[:most]:
        each = row.device_time_total / row.count
        total, launches = row.device_time_total / count, row.count / count
        print(f"{total:9.1f} us {launches:6.1f} x {each:7.2f}  {row.key[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--long", type=int, default=0, help="also batch 1 at this context")
    parser.add_argument("--r", type=int, default=0, help="also with an adapter of this rank")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8, top_p 0.95")
    parser.add_argument("--peers", action="store_true", help="batch 1 beside what is installed")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(args.shape, default_device())
    for r in [0, args.r] if args.r else [0]:
        if r:
            lora.inject(model, LoraConfig(r=r))
            model.eval()
        if args.profile:
            for batch in args.batch:
                profile(model, batch, args.context)
            continue
        if r == 0:
            start_up(model, args)
        for batch in args.batch:
            measure(model, args, batch, args.context, r)
            gc.collect()
        if args.long and r == 0:
            measure(model, args, 1, args.long, r)


if __name__ == "__main__":
    main()
