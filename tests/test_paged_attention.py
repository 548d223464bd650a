"""paged_attention against a plain computation in fp64, and its promise that a row stands alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops import paged_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case:
    """Random rows of given lengths in a cache whose blocks are dealt out at random."""

    def __init__(
        self,
        lengths: list[int],
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        width: int | None = None,
    ) -> None:
        rng = torch.Generator().manual_seed(sum(lengths) + heads + head_dim)
        batch = len(lengths)
        each = width or -(-max(lengths) // 16)
        blocks = batch * each + 3

        def floats(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng).to(dtype).to(device)

        self.q = floats(batch, heads, head_dim)
        self.k, self.v = floats(batch, kv_heads, head_dim), floats(batch, kv_heads, head_dim)
        angles = torch.rand(batch, head_dim // 2, generator=rng) * 6
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat((cos, cos), -1).to(dtype).to(device)
        self.sin = torch.cat((-sin, sin), -1).to(dtype).to(device)
        self.keys = floats(blocks, 16, kv_heads, head_dim)
        self.values = floats(blocks, 16, kv_heads, head_dim)
        order = torch.randperm(blocks, generator=rng)[: batch * each]
        self.tables = order.reshape(batch, each).int().to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(batch, heads, dtype=torch.int32, device=device)

    def rows(self, rows: list[int]) -> Case:
        """Some rows over a copy of the same cache."""
        part = object.__new__(Case)
        part.keys, part.values = self.keys.clone(), self.values.clone()
        for name in ("q", "k", "v", "cos", "sin", "tables", "lengths", "arrived"):
            setattr(part, name, getattr(self, name)[rows].contiguous())
        return part

    def run(self, window: int | None = None) -> Tensor:
        return paged_attention(
            self.q,
            self.k,
            self.v,
            self.cos,
            self.sin,
            self.keys,
            self.values,
            self.tables,
            self.lengths,
            window,
            self.arrived,
        )

    def rotated(self, x: Tensor) -> Tensor:
        """As the model's `rotate`, rounding by rounding."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        return x * cos + x.roll(x.shape[-1] // 2, -1) * sin

    def exact(self, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values after the op, and its result in fp64."""
        keys, values = self.keys.clone(), self.values.clone()
        group = self.q.shape[1] // self.k.shape[1]
        new, q = self.rotated(self.k), self.rotated(self.q).double()
        out = torch.zeros_like(q)
        for row, length in enumerate(self.lengths.tolist()):
            place = self.tables[row].long()
            last = length - 1
            keys[place[last // 16], last % 16] = new[row]
            values[place[last // 16], last % 16] = self.v[row]
            first = max(0, length - window) if window else 0
            k = keys[place].flatten(0, 1)[first:length].double().repeat_interleave(group, 1)
            v = values[place].flatten(0, 1)[first:length].double().repeat_interleave(group, 1)
            scores = torch.einsum("hd,thd->ht", q[row], k) / math.sqrt(q.shape[-1])
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        return keys, values, out

    def check(self, window: int | None = None) -> Tensor:
        keys, values, exact = self.exact(window)
        out = self.run(window)
        assert torch.equal(self.keys, keys) and torch.equal(self.values, values)
        assert (out.double() - exact).abs().max() <= BOUNDS[out.dtype] * exact.abs().max()
        assert not self.arrived.any(), "left as it was, for the next launch"
        return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim",
    [(32, 32, 128), (32, 8, 128), (9, 3, 64), (14, 2, 64), (4, 4, 80), (6, 2, 96), (8, 1, 256),
     (12, 1, 128), (4, 2, 8), (4, 2, 20), (3, 3, 6)],
)  # fmt: skip
def test_equals_fp64(heads, kv_heads, head_dim, dtype, device):
    Case([1, 17, 63, 64, 65, 255, 257, 530], heads, kv_heads, head_dim, dtype, device).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 16, 64, 255, 257, 5000])
def test_window(window, device):
    Case([1, 63, 64, 65, 255, 256, 257, 700], device=device).check(window)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [2047, 2049, 4097, 8191, 8193])
def test_long_contexts(length, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    Case([length, 5], 8, 1 + (device == "cuda"), 128, dtype, device).check()
    Case([length], 4, 4, 64, dtype, device).check(window=1000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (7, 1)])
def test_a_row_does_not_know_the_others(heads, kv_heads, device):
    lengths = [700, 1, 64, 65, 2500, 16, 333, 128] * 4
    case = Case(lengths, heads, kv_heads, 128, torch.float32, device)
    alone = [case.rows([row]) for row in range(8)]
    pair = case.rows([4, 0])
    together = case.run()
    for row in range(8):
        assert torch.equal(alone[row].run()[0], together[row])
    assert torch.equal(pair.run(), together[[4, 0]])


@pytest.mark.parametrize("device", DEVICES)
def test_tables_wider_than_needed_change_nothing(device):
    case = Case([5, 40], width=40, device=device)
    wide = case.check()
    narrow = case.rows([0, 1])
    narrow.tables = case.tables[:, :3].contiguous()
    assert torch.equal(narrow.run(), wide)


@pytest.mark.parametrize("device", DEVICES)
def test_senseless_lengths_and_blocks_stay_inside(device):
    case = Case([40, 40], device=device)
    case.lengths.copy_(torch.tensor([10_000, 0]))
    case.tables[0].fill_(1 << 30)
    out = case.run()
    assert out[0].isfinite().all() and not out[1].any()


def test_arguments_are_checked():
    case = Case([5, 6])
    case.arrived = case.arrived[:1]
    with pytest.raises(ValueError, match=r"paged_attention: arrived must have 8 elements"):
        case.run()
    case = Case([5, 6])
    case.lengths = case.lengths.long()
    with pytest.raises(ValueError, match="paged_attention: lengths must have dtype"):
        case.run()
    case = Case([5], head_dim=258)
    with pytest.raises(ValueError, match="head_dim must be even and in 2..=256, got 258"):
        case.run()
    case = Case([5], heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads"):
        case.run()
    case = Case([5])
    case.values = case.keys
    with pytest.raises(ValueError, match="values must not share memory with keys"):
        case.run()
    case = Case([5])
    with pytest.raises(ValueError, match="keys must have blocks of 16 tokens, got 8"):
        _core.paged_attention(
            case.q, case.k, case.v, case.cos, case.sin, case.keys[:, :8].contiguous(),
            case.values, case.tables, case.lengths, 0, case.q, case.arrived, case.q.clone(),
        )  # fmt: skip


@pytest.mark.gpu
def test_one_capture_serves_every_length():
    case = Case([1, 1], 8, 2, 128, torch.bfloat16, "cuda", width=30)
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    plain = case.rows([0, 1])
    for length in range(1, 480, 7):
        lengths = torch.tensor([length, 480 - length], dtype=torch.int32)
        case.lengths.copy_(lengths)
        plain.lengths.copy_(lengths)
        graph.replay()
        assert torch.equal(out, plain.run())
