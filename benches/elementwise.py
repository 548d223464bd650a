"""The kernels that only move bytes, one launch each, beside torch's own on the same tensors.

As in kernels.py: every contender's calls stand in one CUDA graph over a rotation of buffers larger
than any L2, graphs are replayed in turn, round by round. The floor is bytes over a copy's rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial

import torch
from kernels import Contender, copies, eager, graphed, report
from torch import Tensor
from torch.nn import functional as F

from halfbyte import _core, optim
from halfbyte.pager import BLOCKSIZE

Making = Callable[[int, int], tuple[dict[str, Contender], float]]
SIZES = [(1, 4096), (16, 4096), (8192, 4096), (8192, 8192)]  # rows (tokens), columns
EPS = 1e-5
HEAD_DIM = 128
# Parameters below which AdamW's time is that of calling it.
FEW_PARAMETERS = 1 << 24


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def rotation(tensors: int, rows: int, columns: int) -> list[list[Tensor]]:
    """Enough sets of as many random tensors."""
    sets = min(64, copies(2 * tensors * rows * columns))
    return [[random(rows, columns) for _ in range(tensors)] for _ in range(sets)]


def against(
    items: Iterable, ours: Callable[..., object], torchs: Callable[..., object]
) -> dict[str, Contender]:
    items = list(items)
    return {"halfbyte": graphed(items, ours), "torch": graphed(items, torchs)}


@torch.no_grad()
def copy(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    items = rotation(2, rows, columns)
    return {"halfbyte": graphed(items, lambda s: s[0].copy_(s[1]))}, 4 * rows * columns


@torch.no_grad()
def rms_norm(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    weight = random(columns)
    contenders = against(
        rotation(2, rows, columns),
        lambda s: _core.rms_norm(s[0], weight, EPS, s[1]),
        lambda s: F.rms_norm(s[0], (columns,), weight, EPS),
    )
    return contenders, 4 * rows * columns


@torch.no_grad()
def add_rms_norm(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    weight = random(columns)
    contenders = against(
        rotation(4, rows, columns),
        lambda s: _core.rms_norm(s[0], weight, EPS, s[1], s[2], s[3]),
        lambda s: F.rms_norm(s[0] + s[2], (columns,), weight, EPS),
    )
    return contenders, 8 * rows * columns


@torch.no_grad()
def rms_norm_backward(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    weight = random(columns)
    items = rotation(3, rows, columns)
    roots = torch.rand(rows, 1, device="cuda")
    peer = torch.ops.aten._fused_rms_norm_backward
    contenders = against(
        items,
        lambda s: _core.rms_norm_backward(s[0], s[1], weight, EPS, s[2]),
        lambda s: peer(s[0], s[1], [columns], roots, weight, [True, False]),
    )
    return contenders, 6 * rows * columns


def with_weight(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    """The same and the gradient of the weight, which reads both tensors once more."""
    weight = random(columns)
    items = rotation(3, rows, columns)
    roots = torch.rand(rows, 1, device="cuda")
    scratch = random(columns), roots.view(-1), torch.empty(64, columns, device="cuda")
    peer = torch.ops.aten._fused_rms_norm_backward
    contenders = against(
        items,
        lambda s: _core.rms_norm_backward(s[0], s[1], weight, EPS, s[2], None, *scratch),
        lambda s: peer(s[0], s[1], [columns], roots, weight, [True, True]),
    )
    return contenders, 10 * rows * columns


@torch.no_grad()
def rope(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    """q of `columns` and k of a quarter of that, heads of 128."""
    heads = columns // HEAD_DIM
    phase = torch.rand(1, rows, 1, HEAD_DIM // 2, device="cuda") * 6
    cos, sin = phase.cos(), phase.sin()
    cos, sin = torch.cat((cos, cos), -1).bfloat16(), torch.cat((-sin, sin), -1).bfloat16()
    items = []
    for q, q_out in rotation(2, rows, columns):
        k = random(1, rows, heads // 4, HEAD_DIM)
        shape = (1, rows, heads, HEAD_DIM)
        items.append((q.view(shape), k, q_out.view(shape), torch.empty_like(k)))

    def torchs(s: tuple) -> None:
        for x in s[:2]:
            x * cos + x.roll(HEAD_DIM // 2, -1) * sin

    contenders = against(
        items, lambda s: _core.rope(s[0], s[1], cos, sin, False, s[2], s[3]), torchs
    )
    return contenders, 5 * rows * columns


@torch.no_grad()
def swiglu(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    contenders = against(
        rotation(3, rows, columns), lambda s: _core.swiglu(*s), lambda s: F.silu(s[0]) * s[1]
    )
    return contenders, 6 * rows * columns


@torch.no_grad()
def swiglu_backward(rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    items = [(*s[:3], torch.stack(s[3:])) for s in rotation(5, rows, columns)]
    backward = torch.ops.aten.silu_backward

    def torchs(s: tuple) -> None:
        grad, gate, up, _ = s
        backward(grad * up, gate)
        grad * F.silu(gate)

    contenders = against(items, lambda s: _core.swiglu_backward(*s, False), torchs)
    return contenders, 10 * rows * columns


def adamw(state: str, rows: int, columns: int) -> tuple[dict[str, Contender], float]:
    """Of parameters in fp32, called as in training; the peer's state is in fp32."""
    param = torch.nn.Parameter(torch.randn(rows, columns, device="cuda"))
    param.grad = 1e-3 * torch.randn_like(param)
    ours = optim.AdamW([param], state=state, placement="device")
    theirs = torch.optim.AdamW([param], fused=True)
    contenders = {
        "halfbyte": eager([ours], lambda optimizer: optimizer.step()),
        "torch fused": eager([theirs], lambda optimizer: optimizer.step()),
    }
    # The parameter, its gradient, both moments and their scales.
    moments = 4 * 4 if state == "fp32" else 4 * (1 + 4 / BLOCKSIZE)
    return contenders, (8 + 4 + moments) * rows * columns


OPS: dict[str, Making] = {
    "copy": copy,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "rms_norm_backward": rms_norm_backward,
    "rms_norm_backward with grad_weight": with_weight,
    "rope": rope,
    "swiglu": swiglu,
    "swiglu_backward": swiglu_backward,
    "adamw fp32": partial(adamw, "fp32"),
    "adamw 8bit": partial(adamw, "8bit"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--sizes", nargs="+", help="rows x columns, as in 8192x4096")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes or []]
    for rows, columns in sizes or SIZES:
        for name in args.ops:
            is_adamw = name.startswith("adamw")
            if is_adamw and rows * columns < FEW_PARAMETERS:
                continue
            contenders, nbytes = OPS[name](rows, columns)
            dtype = "fp32" if is_adamw else "bf16"
            report(name, contenders, nbytes, args.rounds, dtype, M=rows, N=columns)
            del contenders
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
