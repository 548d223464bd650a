"""The CUDA kernels, one launch each, beside torch in bf16 and bitsandbytes on the same bytes.

Also beside torch's product of a weight that halfbyte dequantized. Each row names the kernels that
ran, so that a slower path does not stay unseen.

NF4 with double quantization and blocks of 64. Weights come from a rotation larger than any L2, and
are random: zeros run faster than data. Every contender's calls are captured in one CUDA graph, so
launch overhead between them is the device's own, and graphs are replayed in turn, round by round.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from bench import Timing, append_row, summary, time_row
from contenders import bnb_state
from torch import Tensor
from torch.nn import functional as F

from halfbyte import Linear4bit, QuantState, _core, dequantize_4bit, quantize_4bit
from halfbyte.lora import LoRALinear
from halfbyte.ops import gemm_4bit

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192)]  # N, K
FEW_ROWS = [1, 2, 4, 8]
MANY_ROWS = [16, 32, 64, 128, 256]
TRAINING_ROWS = [1024, 4096, 16384]
OPS = ["gemv", "gemm", "training", "dequantize", "quantize"]
COLD_BYTES = 320 << 20
# Read and write together, as a large device copy reaches them.
COPY_RATE = {"H200": 4.3e12, "H100": 3.0e12}
SCALE_BYTES = 1 / 64 + 4 / (64 * 256)
Call = Callable[[], object]


@dataclass
class Contender:
    """Calls on buffer after buffer; `replay` queues all, `kernels` names what their graph runs."""

    calls: int
    replay: Callable[[], None]
    kernels: Callable[[], list[str]] = list


def rotated(items: Iterable, work: Callable[..., object], calls: int) -> list[Call]:
    cycle = itertools.islice(itertools.cycle(items), calls)
    return [lambda item=item: work(item) for item in cycle]


def copies(nbytes: float) -> int:
    return max(2, -(-COLD_BYTES // int(nbytes)))


def graphed(items: list, work: Callable[..., object]) -> Contender:
    """Every item at least once, in one graph."""
    calls = rotated(items, work, max(16, len(items)))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        calls[0]()
    side.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Contender(len(calls), graph.replay, partial(kernels_of, graph))


def kernels_of(graph: torch.cuda.CUDAGraph) -> list[str]:
    """Names, from the graph itself: a profiler makes all later launches half a us longer."""
    with tempfile.NamedTemporaryFile("r", suffix=".dot") as file, warnings.catch_warnings():
        # torch warns that this is for debugging.
        warnings.simplefilter("ignore")
        graph.debug_dump(file.name)
        return sorted(set(re.findall(r"\| (\S+?)\\<\\<\\<", file.read())))


def eager(items: list, work: Callable[..., object]) -> Contender:
    """For what cannot be captured: calls queued one after the other."""
    calls = rotated(items, work, max(16, len(items)))

    def replay() -> None:
        for call in calls:
            call()

    return Contender(len(calls), replay)


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, Timing]:
    """Seconds a call on the device, all contenders once a round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(-3, rounds):
        for name, contender in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            contender.replay()
            end.record()
            end.synchronize()
            if round_ >= 0:
                seconds[name].append(start.elapsed_time(end) / 1e3 / contender.calls)
    return {name: summary(values) for name, values in seconds.items()}


def random_weight(n: int, k: int) -> Tensor:
    return torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02


@dataclass
class Packed:
    codes: Tensor
    state: QuantState


def packed_weights(n: int, k: int) -> list[Packed]:
    count = copies(n * k * (0.5 + SCALE_BYTES))
    return [Packed(*quantize_4bit(random_weight(n, k), double_quant=True)) for _ in range(count)]


def product_contenders(packed: list[Packed], dense: list[Tensor], m: int) -> dict[str, Contender]:
    """y = x W^T by whichever kernel the operation takes for M rows."""
    x = torch.randn(m, packed[0].state.shape[1], device="cuda", dtype=torch.bfloat16)
    contenders = {"halfbyte": graphed(packed, lambda w: gemm_4bit(x, w.codes, w.state))}
    contenders["torch bf16"] = graphed(dense, lambda w: F.linear(x, w))
    contenders["dequantize, torch bf16"] = graphed(
        packed, lambda w: F.linear(x, dequantize_4bit(w.codes, w.state))
    )
    if bitsandbytes := bnb_items(packed):
        from bitsandbytes import matmul_4bit

        contenders["bitsandbytes"] = graphed(
            bitsandbytes, lambda w: matmul_4bit(x, w[0].t(), quant_state=w[1])
        )
    return contenders


def training_contenders(packed: list[Packed], dense: list[Tensor], m: int) -> dict[str, Contender]:
    """Forward and backward of a layer with an adapter of rank 64, beside bf16's two products.

    Both from a graph; eagerly as well, as it runs where nobody captures it.
    """
    n, k = packed[0].state.shape
    x, grad = (torch.randn(m, size, device="cuda", dtype=torch.bfloat16) for size in (k, n))
    x.requires_grad_()
    layers = []
    for w in packed[:2]:
        base = Linear4bit(k, n, bias=False).set_quantized(w.codes, w.state)
        layers.append(LoRALinear(base, r=64, lora_alpha=16))

    def ours(layer: LoRALinear) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, layer.lora_A.weight, layer.lora_B.weight], grad)

    def plain(w: Tensor) -> None:
        torch.mm(x.detach(), w.t())
        torch.mm(grad, w)

    contenders = {"halfbyte": graphed(layers, ours), "torch bf16": graphed(dense[:2], plain)}
    return {**contenders, "halfbyte eager": eager(layers, ours)}


def bnb_items(packed: list[Packed]) -> list | None:
    """The same bytes for bitsandbytes, None where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    return [(w.codes, bnb_state(w.state)) for w in packed]


def dequantize_contenders(packed: list[Packed]) -> dict[str, Contender]:
    n, k = packed[0].state.shape
    moved = int(n * k * (2.5 + SCALE_BYTES)) // 2
    outs = [
        torch.empty(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * n * k))
    ]
    bytes_ = [random_weight(1, moved // 2) for _ in range(copies(moved))]

    def ours(pair: tuple[Packed, Tensor]) -> None:
        w, out = pair
        _core.dequantize_4bit(w.codes, *w.state.scale_args(), "nf4", 64, out)

    contenders = {"halfbyte": graphed(list(zip(packed, itertools.cycle(outs))), ours)}
    pairs = list(zip(bytes_, bytes_[1:] + bytes_[:1], strict=True))
    contenders["copy of as many bytes"] = graphed(pairs, lambda pair: pair[0].copy_(pair[1]))
    if bitsandbytes := bnb_items(packed):
        from bitsandbytes.functional import dequantize_4bit

        contenders["bitsandbytes"] = graphed(bitsandbytes, lambda w: dequantize_4bit(*w))
    return contenders


def quantize_contenders(dense: list[Tensor], double: bool) -> dict[str, Contender]:
    """With the scales quantized by kernels that follow at once, or left in fp32."""
    n = dense[0].numel()
    nblocks = -(-n // 64)

    def empty(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, device="cuda", dtype=dtype)

    def outputs() -> tuple[Tensor, ...]:
        scales = empty(nblocks, torch.uint8), empty(-(-nblocks // 256)), empty(1)
        return empty((n + 1) // 2, torch.uint8), empty(nblocks), *scales

    lanes = empty(2048 * -(-nblocks // 65536), torch.uint8)

    def ours(item: tuple[Tensor, ...]) -> None:
        w, packed, absmax, *scales = item
        _core.quantize_4bit(w, packed, absmax, "nf4", 64)
        if double:
            _core.double_quantize(absmax, *scales, lanes)

    contenders = {"halfbyte": graphed([(w, *outputs()) for w in dense], ours)}
    try:
        from bitsandbytes.functional import quantize_4bit as peer
    except ImportError:
        return contenders
    work = partial(peer, blocksize=64, quant_type="nf4", compress_statistics=double)
    return {**contenders, "bitsandbytes": eager(dense, work)}


def floor_us(nbytes: float) -> float | None:
    """Time of that much traffic at the rate of a device copy."""
    name = torch.cuda.get_device_name()
    rates = [rate for gpu, rate in COPY_RATE.items() if gpu in name]
    return nbytes / rates[0] * 1e6 if rates else None


def report(
    bench: str,
    contenders: dict[str, Contender],
    nbytes: float | None,
    rounds: int,
    dtype: str = "bf16",
    **sizes: int,
) -> None:
    """One row, and a line for the reader; nbytes: that must move, None where they are no bound."""
    times = measure(contenders, rounds)
    row = time_row(bench, times, floor_us(nbytes) if nbytes else None, dtype=dtype, **sizes)
    row["kernels"] = contenders["halfbyte"].kernels()
    append_row("kernels", row)
    label = bench + "".join(f" {letter}={size}" for letter, size in sizes.items())
    line = f"{label:44} {row['us']:9.2f} us"
    if nbytes:
        line += f" {nbytes / times['halfbyte'].median / 1e9:7.0f} GB/s"
    if "floor_us" in row:
        line += f" {100 * row['floor_us'] / row['us']:4.0f} % of floor"
    print(line, row["peers"], *(name[:60] for name in row["kernels"]), flush=True)


def bench_shape(n: int, k: int, ops: list[str], rounds: int) -> None:
    weights, sizes = n * k, {"N": n, "K": k}
    dense = [random_weight(n, k) for _ in range(copies(2 * weights))]
    packed = packed_weights(n, k)
    stored = weights * (0.5 + SCALE_BYTES)
    if "gemv" in ops:
        for m in FEW_ROWS:
            contenders = product_contenders(packed, dense, m)
            report("gemv_4bit", contenders, stored + 2 * m * (n + k), rounds, **sizes, M=m)
    if "gemm" in ops:
        for m in MANY_ROWS:
            contenders = product_contenders(packed, dense, m)
            report("gemm_4bit", contenders, stored + 2 * m * (n + k), rounds, **sizes, M=m)
    if "training" in ops:
        for m in TRAINING_ROWS:
            contenders = training_contenders(packed, dense, m)
            report("training step of a layer", contenders, None, rounds, **sizes, M=m, r=64)
    if "dequantize" in ops:
        contenders = dequantize_contenders(packed)
        report("dequantize_4bit", contenders, stored + 2 * weights, rounds, **sizes)
    if "quantize" in ops:
        report(
            "quantize_4bit", quantize_contenders(dense, False), 2.5625 * weights, rounds, **sizes
        )
        contenders = quantize_contenders(dense, True)
        report("quantize_4bit double", contenders, stored + 2 * weights, rounds, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--shapes", nargs="+", help="N x K, as in 4096x4096")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes or []]
    for n, k in shapes or SHAPES:
        bench_shape(n, k, args.ops, args.rounds)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
