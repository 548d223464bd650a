"""paged_attention against a plain computation in fp64, and its promise that a row stands alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.paged_attention import Cached, decode, encode, paged_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Of four heads: a GPU has kernels of its own for key heads with one query head.
KV_HEADS = pytest.mark.parametrize("kv_heads", [2, 4])
# With codes, weights are rounded to bfloat16 wherever tensor cores multiply them.
CODE_BOUNDS = {**BOUNDS, torch.float16: BOUNDS[torch.bfloat16]}


def coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of vectors [..., D], by numpy in fp32."""
    vectors = x.float().cpu().numpy()
    scales = np.abs(vectors).max(-1) / np.float32(127)
    codes = np.clip(np.rint(vectors / scales[..., None]), -127, 127) + 128
    return torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(scales)


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
        codes: bool = False,
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
        self.scales: tuple[Tensor, ...] = ()
        if codes:
            both = [coded(x) for x in (self.keys, self.values)]
            self.keys, self.values = (x.to(device) for x, _ in both)
            self.scales = tuple(
                scales.transpose(1, 2).contiguous().to(device) for _, scales in both
            )
        order = torch.randperm(blocks, generator=rng)[: batch * each]
        self.tables = order.reshape(batch, each).int().to(device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(batch, heads, dtype=torch.int32, device=device)

    def rows(self, rows: list[int]) -> Case:
        """Some rows over a copy of the same cache."""
        part = object.__new__(Case)
        part.keys, part.values = self.keys.clone(), self.values.clone()
        part.scales = tuple(x.clone() for x in self.scales)
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
            Cached(self.keys, self.values, *self.scales),
            self.tables,
            self.lengths,
            window,
            self.arrived,
        )

    def rotated(self, x: Tensor) -> Tensor:
        """As the model's `rotate`, rounding by rounding."""
        cos, sin = self.cos[:, None], self.sin[:, None]
        return x * cos + x.roll(x.shape[-1] // 2, -1) * sin

    def exact(self, window: int | None = None) -> tuple[list[Tensor], Tensor]:
        """The cache after the op, and its result in fp64."""
        keys, values, *scales = cache = [x.clone() for x in (self.keys, self.values, *self.scales)]
        group = self.q.shape[1] // self.k.shape[1]
        new = [self.rotated(self.k), self.v]
        if scales:
            new, new_scales = zip(*[coded(x) for x in new], strict=True)
        q = self.rotated(self.q).double()
        out = torch.zeros_like(q)
        for row, length in enumerate(self.lengths.tolist()):
            place = self.tables[row].long()
            last = length - 1
            for x, to in zip(new, (keys, values), strict=True):
                to[place[last // 16], last % 16] = x[row].to(to.device)
            for x, to in zip(new_scales if scales else (), scales, strict=True):
                to[place[last // 16], :, last % 16] = x[row].to(to.device)
            first = max(0, length - window) if window else 0
            k, v = (x[place].double() for x in (keys, values))
            if scales:
                k, v = (
                    (x - 128) * scale[place].transpose(1, 2).double()[..., None]
                    for x, scale in zip((k, v), scales, strict=True)
                )
            k, v = (x.flatten(0, 1)[first:length].repeat_interleave(group, 1) for x in (k, v))
            scores = torch.einsum("hd,thd->ht", q[row], k) / math.sqrt(q.shape[-1])
            out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        return cache, out

    def check(self, window: int | None = None) -> Tensor:
        cache, exact = self.exact(window)
        out = self.run(window)
        for got, expected in zip((self.keys, self.values, *self.scales), cache, strict=True):
            assert torch.equal(got, expected)
        bounds = CODE_BOUNDS if self.scales else BOUNDS
        assert (out.double() - exact).abs().max() <= bounds[out.dtype] * exact.abs().max()
        assert not self.arrived.any(), "left as it was, for the next launch"
        return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim",
    [(32, 32, 128), (32, 8, 128), (9, 3, 64), (14, 2, 64), (4, 4, 80), (6, 2, 96), (8, 1, 256),
     (12, 1, 128), (4, 2, 8), (4, 2, 20), (3, 3, 6)],
)  # fmt: skip
@pytest.mark.parametrize("codes", [False, True], ids=["plain", "codes"])
def test_equals_fp64(heads, kv_heads, head_dim, dtype, device, codes):
    lengths = [1, 17, 63, 64, 65, 255, 257, 530]
    Case(lengths, heads, kv_heads, head_dim, dtype, device, codes=codes).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [1, 16, 64, 255, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codes", [False, True], ids=["plain", "codes"])
@KV_HEADS
def test_window(window, dtype, device, codes, kv_heads):
    lengths = [1, 63, 64, 65, 255, 256, 257, 700]
    Case(lengths, kv_heads=kv_heads, dtype=dtype, device=device, codes=codes).check(window)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [2047, 2049, 4097, 8191, 8193])
def test_long_contexts(length, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    Case([length, 5], 8, 1 + (device == "cuda"), 128, dtype, device).check()
    Case([length], 4, 4, 64, dtype, device, codes=True).check(window=1000)
    Case([length, 5], 4, 4, 128, dtype, device).check()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (7, 1), (12, 12)])
@pytest.mark.parametrize("codes", [False, True], ids=["plain", "codes"])
def test_a_row_does_not_know_the_others(heads, kv_heads, device, codes):
    lengths = [700, 1, 64, 65, 2500, 16, 333, 128] * 4
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = Case(lengths, heads, kv_heads, 128, dtype, device, codes=codes)
    alone = [case.rows([row]) for row in range(8)]
    pair = case.rows([4, 0])
    together = case.run()
    for row in range(8):
        assert torch.equal(alone[row].run()[0], together[row])
    assert torch.equal(pair.run(), together[[4, 0]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@KV_HEADS
def test_tables_wider_than_needed_change_nothing(device, dtype, kv_heads):
    case = Case([5, 40], kv_heads=kv_heads, dtype=dtype, width=80, device=device)
    wide = case.check()
    narrow = case.rows([0, 1])
    narrow.tables = case.tables[:, :3].contiguous()
    assert torch.equal(narrow.run(), wide)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@KV_HEADS
def test_senseless_lengths_and_blocks_stay_inside(device, dtype, kv_heads):
    case = Case([40, 40], kv_heads=kv_heads, dtype=dtype, device=device)
    case.lengths.copy_(torch.tensor([10_000, 0]))
    case.tables[0].fill_(1 << 30)
    out = case.run()
    assert out[0].isfinite().all() and not out[1].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codes", [False, True], ids=["plain", "codes"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@KV_HEADS
def test_what_others_left_behind_does_not_matter(dtype, device, codes, kv_heads):
    """Free places of a row's last block, and those before its window, may hold anything."""
    lengths, window = [5, 40, 259], 20
    case = Case(lengths, kv_heads=kv_heads, dtype=dtype, device=device, codes=codes)
    expected = case.rows([0, 1, 2]).run(window)
    for row, length in enumerate(lengths):
        for t in [*range(length - window), *range(length, -(-length // 16) * 16)]:
            block = case.tables[row, t // 16]
            if codes:
                for scales in case.scales:
                    scales[block, :, t % 16] = math.nan
            else:
                case.keys[block, t % 16] = case.values[block, t % 16] = math.nan
    assert torch.equal(case.run(window), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codes", [False, True], ids=["plain", "codes"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@KV_HEADS
def test_what_is_not_finite_shows(name, bad, dtype, device, codes, kv_heads):
    case = Case([40, 300], kv_heads=kv_heads, dtype=dtype, device=device, codes=codes)
    getattr(case, name)[0, 0, 3] = bad
    out = case.run()
    assert not out[0, 0].isfinite().all() and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_prompts_are_encoded_as_new_tokens_are(dtype):
    x = torch.randn(50, 3, 20).to(dtype)
    x[0], x[1], x[2, 0, 1], x[3, 1, 2] = 0, x[1] * 1e-30, math.nan, math.inf
    codes, scales = encode(x)
    case = Case([7] * 50, 3, 3, 20, dtype, codes=True)
    case.v = x
    case.run()
    place = case.tables[:, 0].long()
    assert torch.equal(case.values[place, 6], codes)
    assert torch.equal(case.scales[1][place, :, 6].nan_to_num(-1), scales.nan_to_num(-1))
    plain = (codes[4:].float() - 128) * scales[4:, :, None]
    assert ((plain - x[4:].float()).abs() <= 0.5001 * scales[4:, :, None]).all()
    assert torch.equal(decode(codes, scales, torch.float32)[4:], plain)


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
    case = Case([5], codes=True)
    case.scales = case.scales[:1]
    with pytest.raises(ValueError, match="expected key_scales and value_scales, or neither"):
        case.run()
    case = Case([5], codes=True)
    case.scales = ()
    with pytest.raises(ValueError, match="keys must have dtype float32"):
        case.run()
    case = Case([5], codes=True)
    case.scales = (case.scales[0], case.scales[1][1:].contiguous())
    with pytest.raises(ValueError, match="value_scales must have"):
        case.run()
    case = Case([5])
    with pytest.raises(ValueError, match="keys must have blocks of 16 tokens, got 8"):
        _core.paged_attention(
            case.q, case.k, case.v, case.cos, case.sin, case.keys[:, :8].contiguous(),
            case.values, None, None, case.tables, case.lengths, 0, case.q, case.arrived,
            case.q.clone(),
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (8, 8)])
@pytest.mark.parametrize("codes", [False, True], ids=["plain", "codes"])
def test_runs_give_equal_bits_beside_other_work(heads, kv_heads, codes):
    case = Case([1000, 5, 300], heads, kv_heads, 128, torch.bfloat16, "cuda", codes=codes)
    first = case.run()
    other, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(side):
            other = (other @ other).clamp(-1, 1)
        assert torch.equal(case.run(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_one_capture_serves_every_length(kv_heads):
    case = Case([1, 1], 8, kv_heads, 128, torch.bfloat16, "cuda", width=30)
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
