"""Chains of 4-bit products equal the operations one after the other."""

from __future__ import annotations

import pytest
import torch

from halfbyte.lora import add_product
from halfbyte.ops import add_rms_norm, gemm_4bit, quantize_4bit, rms_norm, swiglu
from halfbyte.ops.gemv_4bit_chain import (
    COUNTERS,
    LowRank,
    Phase,
    Product,
    gemv_4bit_chain,
    has_chains,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def gpu():
    if not has_chains(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs kernels for chains: compute capability 9.0 or later")
    torch.manual_seed(0)


def counters():
    return torch.zeros(COUNTERS, dtype=torch.int32, device="cuda")


class Weight:
    """A quantized [N, K] with what may stand beside it."""

    def __init__(self, n, k, dtype, bias=False, rank=0, lora_dtype=None, rows=0):
        self.n = n
        weight = torch.randn(n, k, device="cuda") / k**0.5
        self.packed, self.state = quantize_4bit(weight.to(dtype), "nf4", 64, True)
        self.bias = torch.randn(n, device="cuda").to(dtype) if bias else None
        self.adapter = None
        if rank:
            a = torch.randn(rank, k, device="cuda").to(lora_dtype or dtype) / k**0.5
            b = torch.randn(n, rank, device="cuda").to(lora_dtype or dtype)
            factors = torch.rand(rows, rank, device="cuda") if rows else None
            self.adapter = LowRank(a, b, factors, 0.25)

    def product(self, out):
        scales = self.state.scale_args()
        return Product(self.packed, *scales, self.bias, self.adapter, out)

    def apply(self, x):
        """As the layers do it, one operation after the other."""
        y = gemm_4bit(x, self.packed, self.state)
        if self.bias is not None:
            y = y + self.bias
        if self.adapter is not None:
            a, b, factors, scaling = self.adapter
            hidden = torch.nn.functional.linear(x, a.to(x.dtype))
            hidden = (hidden * (scaling if factors is None else factors)).to(x.dtype)
            y = add_product(y, hidden, b)
        return y


def layer(m, hidden, inner, heads, dtype, **more):
    """The phases between two attentions, their results, and what the operations give."""
    o = Weight(hidden, heads, dtype, **more)
    gate, up = (Weight(inner, hidden, dtype, **more) for _ in range(2))
    down = Weight(hidden, inner, dtype, **more)
    qkv = [Weight(n, hidden, dtype, **more) for n in (heads, 136, 136)]
    norms = [1 + torch.randn(hidden, device="cuda").to(dtype) / 4 for _ in range(2)]
    attended = torch.randn(m, heads, device="cuda").to(dtype)
    residual = torch.randn(m, hidden, device="cuda").to(dtype)

    def new(n):
        return torch.full((m, n), float("nan"), dtype=dtype, device="cuda")

    def scratch(*weights):
        ranks = sum(len(w.adapter.a) for w in weights if w.adapter is not None)
        return new(ranks) if ranks else None

    h1, act, h2 = new(hidden), new(inner), new(hidden)
    outs = [new(w.n) for w in qkv]
    phases = [
        Phase(attended, [o.product(h1)], residual=residual, hidden=scratch(o)),
        Phase(
            h1, [gate.product(act), up.product(act)], True, norms[0], 1e-5, None, scratch(gate, up)
        ),
        Phase(act, [down.product(h2)], residual=h1, hidden=scratch(down)),
        Phase(
            h2,
            [w.product(out) for w, out in zip(qkv, outs, strict=True)],
            norm=norms[1],
            eps=1e-5,
            hidden=scratch(*qkv),
        ),
    ]

    def expected(h1_found, act_found, h2_found):
        """Each phase from what the chain's earlier ones gave."""
        normed, total = add_rms_norm(o.apply(attended), residual, norms[0], 1e-5)
        mid = rms_norm(h1_found, norms[0], 1e-5)
        final = rms_norm(h2_found, norms[1], 1e-5)
        return (
            total,
            swiglu(gate.apply(mid), up.apply(mid)),
            h1_found + down.apply(act_found),
            *(w.apply(final) for w in qkv),
        )

    return phases, (h1, act, h2, *outs), expected


def agree(found, expected):
    """Equal but for single steps of the dtype where a sum's order differs."""
    scale = expected.float().square().mean().sqrt()
    step = torch.finfo(expected.dtype).eps
    error = (found.float() - expected.float()).abs()
    allowed = 2 * step * expected.float().abs() + 4 * step * scale
    assert (error <= allowed).all(), (error / allowed).max()
    assert (error > 0).float().mean() < 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 8])
@pytest.mark.parametrize(
    "hidden, inner, heads", [(256, 256, 256), (512, 1280, 768), (4096, 11008, 4096)]
)
def test_equals_the_operations(dtype, m, hidden, inner, heads):
    phases, found, expected = layer(m, hidden, inner, heads, dtype)
    arrived = counters()
    gemv_4bit_chain(phases, "nf4", arrived)
    expected = expected(*found[:3])
    # Without a norm before it the sums have the same order.
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    for a, b in zip(found, expected, strict=True):
        agree(a, b)
    assert not arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 8])
@pytest.mark.parametrize("rank", [1, 5, 16, 64])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
def test_adapters_and_biases(dtype, m, rank, lora_dtype):
    rows = m if rank % 2 else 0
    more = {"rank": rank, "lora_dtype": lora_dtype, "bias": True, "rows": rows}
    phases, found, expected = layer(m, 512, 1280, 768, dtype, **more)
    arrived = counters()
    gemv_4bit_chain(phases, "nf4", arrived)
    for a, b in zip(found, expected(*found[:3]), strict=True):
        agree(a, b)
    assert not arrived.any()


def test_runs_give_equal_bits_beside_other_work():
    phases, found, _ = layer(8, 2048, 5632, 2048, torch.bfloat16, rank=16)
    arrived = counters()
    gemv_4bit_chain(phases, "nf4", arrived)
    first = [x.clone() for x in found]
    other, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(side):
            other = (other @ other).clamp(-1, 1)
        for x in found:
            x.fill_(float("nan"))
        gemv_4bit_chain(phases, "nf4", arrived)
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_a_row_does_not_depend_on_the_others():
    phases, found, _ = layer(8, 1024, 2816, 1024, torch.bfloat16, rank=8)
    gemv_4bit_chain(phases, "nf4", counters())
    for row in (0, 5):
        few = []
        renamed = {}

        def one(x, row=row, renamed=renamed):
            if x is None:
                return None
            if x.data_ptr() not in renamed:
                renamed[x.data_ptr()] = x[row : row + 1].clone()
            return renamed[x.data_ptr()]

        for phase in phases:
            products = [p._replace(out=one(p.out)) for p in phase.products]
            few.append(
                phase._replace(
                    x=one(phase.x),
                    products=products,
                    residual=one(phase.residual),
                    hidden=one(phase.hidden),
                )
            )
        gemv_4bit_chain(few, "nf4", counters())
        for x in found:
            assert torch.equal(renamed[x.data_ptr()], x[row : row + 1])


def test_two_streams_and_a_graph():
    cases = [layer(m, 1024, 2816, 1024, torch.bfloat16, rank=16) for m in (2, 7)]
    streams = [torch.cuda.Stream() for _ in cases]
    counts = [counters() for _ in cases]
    expected = []
    for (phases, found, _), count in zip(cases, counts, strict=True):
        gemv_4bit_chain(phases, "nf4", count)
        expected.append([x.clone() for x in found])
    torch.cuda.synchronize()
    graphs = []
    for (phases, _, _), count, stream in zip(cases, counts, streams, strict=True):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            for _ in range(5):
                gemv_4bit_chain(phases, "nf4", count)
    for _ in range(40):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, found, _), before in zip(cases, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


def test_nan_stays_in_its_row():
    phases, found, _ = layer(4, 512, 1280, 768, torch.bfloat16, rank=8)
    gemv_4bit_chain(phases, "nf4", counters())
    before = [x.clone() for x in found]
    phases[0].x[2, 7] = float("nan")
    gemv_4bit_chain(phases, "nf4", counters())
    for x, old in zip(found, before, strict=True):
        assert x[2].isnan().all()
        assert torch.equal(x[[0, 1, 3]], old[[0, 1, 3]])


def test_refuses_what_does_not_fit():
    phases, _, _ = layer(2, 512, 1280, 768, torch.bfloat16)
    with pytest.raises(ValueError, match="phases must be 1 to 4"):
        other, _, _ = layer(2, 512, 1280, 768, torch.bfloat16)
        gemv_4bit_chain([*phases, other[0]], "nf4", counters())
    with pytest.raises(ValueError, match="arrived"):
        gemv_4bit_chain(phases, "nf4", counters()[:2])
    with pytest.raises(ValueError, match="residual"):
        wide = phases[0]._replace(residual=phases[0].residual[:, :-1].contiguous())
        gemv_4bit_chain([wide], "nf4", counters())
    with pytest.raises(ValueError, match="hidden"):
        adapted, _, _ = layer(2, 512, 1280, 768, torch.bfloat16, rank=4)
        gemv_4bit_chain([adapted[0]._replace(hidden=None)], "nf4", counters())
    with pytest.raises(ValueError, match="share memory"):
        products = [phases[0].products[0], phases[0].products[0]]
        gemv_4bit_chain([Phase(phases[0].x, products)], "nf4", counters())
