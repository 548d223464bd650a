"""quantize_4bit, dequantize_4bit and the 4-bit linear on the CPU, beside bitsandbytes.

Both get the same random tensors, NF4 with double quantization and blocks of 64, taken from a
rotation larger than the caches; the threads are those that the process may use.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bench import append_row, copies, interleave, rotation, show, time_row
from contenders import bnb_linear, bnb_state
from torch import Tensor, nn

from halfbyte import Linear4bit, QuantState, dequantize_4bit, quantize_4bit

SHAPES = [(4096, 4096), (1536, 576), (576, 1536)]  # N, K
FORWARD_ROWS = [1, 4, 16, 128, 512]
BACKWARD_ROWS = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Packed = tuple[Tensor, QuantState]


def random_weights(n: int, k: int, count: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, k, generator=generator) * 0.02).to(dtype) for _ in range(count)]


def packed_weights(n: int, k: int) -> list[Packed]:
    """A cold rotation of 4-bit weights; few are drawn, the rest are copies elsewhere in memory."""
    drawn = [quantize_4bit(w, double_quant=True) for w in random_weights(n, k, 2, torch.float32)]
    return [(drawn[i % 2][0].clone(), drawn[i % 2][1]) for i in range(copies(n * k // 2))]


def quantize_contenders(n: int, k: int, dtype: torch.dtype) -> dict[str, Callable]:
    from bitsandbytes.functional import quantize_4bit as bnb_quantize

    weights = random_weights(n, k, copies(n * k * dtype.itemsize), dtype)
    return {
        "halfbyte": rotation(weights, lambda w: quantize_4bit(w, double_quant=True)),
        "bitsandbytes": rotation(
            weights,
            lambda w: bnb_quantize(w, blocksize=64, quant_type="nf4", compress_statistics=True),
        ),
    }


def dequantize_contenders(packed: list[Packed], dtype: torch.dtype) -> dict[str, Callable]:
    from bitsandbytes.functional import dequantize_4bit as bnb_dequantize

    peer = []
    for codes, state in packed:
        stats = bnb_state(state)
        stats.dtype = dtype
        peer.append((codes, stats))
    return {
        "halfbyte": rotation(packed, lambda w: dequantize_4bit(*w, dtype)),
        "bitsandbytes": rotation(peer, lambda w: bnb_dequantize(*w)),
    }


def linear_layers(packed: list[Packed], dtype: torch.dtype) -> dict[str, list[nn.Module]]:
    """One layer a weight; both libraries' layers hold the same codes."""
    n, k = packed[0][1].shape
    return {
        "halfbyte": [Linear4bit(k, n, bias=False).set_quantized(*w) for w in packed],
        "bitsandbytes": [bnb_linear(*w, dtype) for w in packed],
    }


def forward_contenders(packed: list[Packed], m: int, dtype: torch.dtype) -> dict[str, Callable]:
    x = torch.randn(m, packed[0][1].shape[1]).to(dtype)

    @torch.no_grad()
    def work(layer: nn.Module) -> Tensor:
        return layer.eval()(x)

    return {name: rotation(stack, work) for name, stack in linear_layers(packed, dtype).items()}


def backward_contenders(packed: list[Packed], m: int, dtype: torch.dtype) -> dict[str, Callable]:
    n, k = packed[0][1].shape
    x = torch.randn(m, k).to(dtype).requires_grad_()
    grad_y = torch.randn(m, n).to(dtype)

    def work(layer: nn.Module) -> Tensor:
        return torch.autograd.grad(layer.train()(x), x, grad_y)[0]

    return {name: rotation(stack, work) for name, stack in linear_layers(packed, dtype).items()}


def measure(bench: str, contenders: dict[str, Callable], rounds: int, **fields) -> None:
    times = interleave(contenders, rounds)
    show(" ".join([bench, *(f"{key}={value}" for key, value in fields.items())]), times)
    append_row("cpu_ops", time_row(bench, times, threads=torch.get_num_threads(), **fields))


def measure_shape(n: int, k: int, rounds: int) -> None:
    packed = packed_weights(n, k)
    for name, dtype in DTYPES.items():
        sizes = {"dtype": name, "N": n, "K": k}
        measure("quantize_4bit", quantize_contenders(n, k, dtype), rounds, **sizes)
        measure("dequantize_4bit", dequantize_contenders(packed, dtype), rounds, **sizes)
        for m in FORWARD_ROWS:
            contenders = forward_contenders(packed, m, dtype)
            measure("linear_4bit_forward", contenders, rounds, **sizes, M=m)
        contenders = backward_contenders(packed, BACKWARD_ROWS, dtype)
        measure("linear_4bit_forward_backward", contenders, rounds, **sizes, M=BACKWARD_ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    for n, k in SHAPES:
        measure_shape(n, k, rounds)


if __name__ == "__main__":
    main()
