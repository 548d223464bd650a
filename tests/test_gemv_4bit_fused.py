"""4-bit products with adapter, bias and gate in one launch equal the operations one by one."""

from __future__ import annotations

import pytest
import torch

from halfbyte import Linear4bit, LoraConfig, lora
from halfbyte.linear import Launch, project, project_gated
from halfbyte.lora import LoRALinear, add_product
from halfbyte.ops import dequantize_4bit, gemm_4bit, quantize_4bit, rms_norm, swiglu
from halfbyte.ops.gemv_4bit_fused import (
    Following,
    LowRank,
    Norm,
    Product,
    Residual,
    fuses,
    gemv_4bit_fused,
    takes_norm,
    takes_residual,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
# N of each product, and K.
SHAPES = [((256,), 256), ((96, 40, 24), 512), ((1000, 1000), 1280), ((4096, 1024, 1024), 4096)]
LONG = [((4096,), 11008), ((136,), 28672)]
ODD = ((333, 77), 1024)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    torch.manual_seed(0)
    # The operations one by one sum in fp32, too.
    for dtype in ("fp16", "bf16"):
        name = f"allow_{dtype}_reduced_precision_reduction"
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)
    if not fuses(torch.zeros(1, 256, device="cuda", dtype=torch.float16), [product(8, 256)]):
        pytest.skip("needs a GPU of compute capability 9.0 or later")


def product(
    n, k, dtype=torch.bfloat16, bias=False, rank=0, lora_dtype=None, rows=0, double_quant=True
):
    """A quantized [n, k] with what may stand beside it; rows: whose factors differ."""
    weight = torch.randn(n, k, device="cuda") / k**0.5
    packed, state = quantize_4bit(weight.to(dtype), "nf4", 64, double_quant)
    bias = torch.randn(n, device="cuda").to(dtype) if bias else None
    adapter = None
    if rank:
        a = torch.randn(rank, k, device="cuda").to(lora_dtype or dtype) / k**0.5
        b = torch.randn(n, rank, device="cuda").to(lora_dtype or dtype)
        factors = torch.rand(rows, rank, device="cuda") if rows else None
        adapter = LowRank(a, b, factors, 0.25)
    return Product(packed, state, bias, adapter)


def alone(x, product, y=None):
    """As the layers do it, one operation after the other, from y = x W^T."""
    y = gemm_4bit(x, product.packed, product.state) if y is None else y
    if product.bias is not None:
        y = y + product.bias
    if product.adapter is not None:
        a, b, factors, scaling = product.adapter
        hidden = torch.nn.functional.linear(x, a.to(x.dtype))
        hidden = (hidden * (scaling if factors is None else factors)).to(x.dtype)
        y = add_product(y, hidden, b)
    return y


def exact(x, product):
    """The same in fp64, from the operands as they are rounded before they multiply."""
    x = x.double()
    y = x @ dequantize_4bit(product.packed, product.state, torch.float32).double().T
    if product.bias is not None:
        y = y + product.bias
    if product.adapter is not None:
        a, b, factors, scaling = product.adapter
        dtype = product.state.dtype
        hidden = x @ a.to(dtype).double().T * (scaling if factors is None else factors.double())
        y = y + hidden @ b.to(dtype).double().T
    return y


def random(m, k, dtype=torch.bfloat16):
    return torch.randn(m, k, device="cuda").to(dtype)


def agree(found, expected):
    """Equal but for single steps of the dtype where the order of an adapter's sum differs."""
    scale = expected.float().square().mean().sqrt()
    step = torch.finfo(expected.dtype).eps
    error = (found.float() - expected.float()).abs()
    allowed = 2 * step * expected.float().abs() + 4 * step * scale
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("m", [1, 8, 9, 16])
@pytest.mark.parametrize(
    "sizes, k", [((40, 96), 576), ((1000, 8), 896), (("many", "many", 80), 896), ((68, 4), 4160)]
)
def test_any_number_of_blocks_and_plain_scales(double_quant, m, sizes, k):
    # Two of these are enough for panels side by side.
    many = 64 * torch.cuda.get_device_properties(0).multi_processor_count
    x, sizes = random(m, k), [many if n == "many" else n for n in sizes]
    products = [product(n, k, bias=True, double_quant=double_quant) for n in sizes]
    assert fuses(x, products)
    weight = torch.ones(k, device="cuda", dtype=torch.bfloat16)
    following = Following([(p.packed, p.state) for p in products], norm=weight)
    outs = gemv_4bit_fused(x, products, following=following)
    for found, p in zip(outs, products, strict=True):
        assert torch.equal(found, alone(x, p))
    pair = [products[0], product(sizes[0], k, double_quant=double_quant)]
    (found,) = gemv_4bit_fused(x, pair, gated=True)
    assert torch.equal(found, swiglu(*(alone(x, p) for p in pair)))
    if m <= 8:
        adapted = [product(n, k, rank=5, double_quant=double_quant) for n in sizes]
        for found, p in zip(gemv_4bit_fused(x, adapted), adapted, strict=True):
            agree(found, alone(x, p))


def test_scales_of_two_kinds_do_not_go_together():
    products = [product(64, 256), product(64, 256, double_quant=False)]
    assert not fuses(random(1, 256), products)
    assert not fuses(random(17, 256), products[1:])
    assert not fuses(random(17, 320), [product(64, 320)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("sizes, k", SHAPES + LONG)
def test_biases_and_gates_have_equal_bits(dtype, m, sizes, k):
    x, products = random(m, k, dtype), [product(n, k, dtype, bias=True) for n in sizes]
    expected = [alone(x, p) for p in products]
    for found, y in zip(gemv_4bit_fused(x, products), expected, strict=True):
        assert torch.equal(found, y)
    pair = [products[0], product(sizes[0], k, dtype)]
    (found,) = gemv_4bit_fused(x, pair, gated=True)
    assert torch.equal(found, swiglu(expected[0], alone(x, pair[1])))


# --- norms and residuals ---------------------------------------------------------------------

EPS = 1e-5


def waiting(x):
    """A norm with what the launch before has left of x."""
    squares = x.float().square().view(len(x), -1, 16).sum(-1)
    return Norm(1 + 0.1 * torch.randn_like(x[0]), squares, EPS)


def normed(x, norm):
    return rms_norm(x, norm.weight, norm.eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("sizes, k", [*SHAPES, ((40, 96), 576), ((8448, 8448), 896), ((64,), 4032)])
def test_a_norm_joins_the_products(dtype, m, sizes, k):
    x, products = random(m, k, dtype), [product(n, k, dtype, bias=True) for n in sizes]
    # Of these the mean square is one, whatever the order of its sum.
    signs = x.sign() + (x == 0)
    for given, compare in ((signs, assert_equal), (3 * x, agree)):
        norm = waiting(given)
        expected = normed(given, norm)
        for found, p in zip(gemv_4bit_fused(given, products, norm=norm), products, strict=True):
            compare(found, alone(expected, p))
        pair = [products[0], product(sizes[0], k, dtype)]
        (found,) = gemv_4bit_fused(given, pair, gated=True, norm=norm)
        if given is signs:
            assert torch.equal(found, swiglu(*(alone(expected, p) for p in pair)))


@pytest.mark.parametrize("m", [2, 16])
def test_a_norm_joins_more_panels_than_go_together(m):
    # A CTA then reads x again, of several slices of K.
    n, k = 16 * 17 * torch.cuda.get_device_properties(0).multi_processor_count, 4096
    x, p = random(m, k), product(n, k)
    norm = waiting(x)
    (found,) = gemv_4bit_fused(x, [p], norm=norm)
    agree(found, alone(normed(x, norm), p))


def assert_equal(found, expected):
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("n, k", [(256, 256), (1008, 1280), (4096, 11008), (8448, 896), (64, 576)])
def test_a_residual_is_added_with_its_rounding(dtype, m, n, k):
    x, residual = random(m, k, dtype), Residual.of(random(m, n, dtype))
    p = product(n, k, dtype, bias=True)
    (found,) = gemv_4bit_fused(x, [p], residual=residual)
    assert torch.equal(found, residual.values + alone(x, p))
    squares = found.double().square().view(m, -1, 16).sum(-1)
    torch.testing.assert_close(residual.squares.double(), squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("rank, lora_dtype", [(5, None), (16, torch.float32), (64, None)])
@pytest.mark.parametrize("sizes, k", [((256,), 256), ((96, 40), 2112), ((4096, 1024), 4096)])
def test_adapters_see_the_normed_x(m, rank, lora_dtype, sizes, k):
    x = random(m, k)
    products = [
        product(n, k, rank=rank, lora_dtype=lora_dtype, rows=i * m) for i, n in enumerate(sizes)
    ]
    norm = waiting(x)
    for found, p in zip(gemv_4bit_fused(x, products, norm=norm), products, strict=True):
        agree(found, alone(normed(x, norm), p))
    head, residual = products[0], Residual.of(random(m, sizes[0]))
    (found,) = gemv_4bit_fused(x, [head], residual=residual, norm=norm)
    agree(found, residual.values + alone(normed(x, norm), head))
    squares = found.double().square().view(m, -1, 16).sum(-1)
    torch.testing.assert_close(residual.squares.double(), squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", [0, 16])
def test_a_row_is_normed_alone(rank):
    x, p = random(8, 4096), product(512, 4096, rank=rank)
    x[2] = torch.nan
    x[5, 7] = torch.inf
    weight = waiting(x).weight
    (found,) = gemv_4bit_fused(x, [p], norm=waiting(x)._replace(weight=weight))
    for row in range(8):
        alone_ = x[row : row + 1].contiguous()
        (expected,) = gemv_4bit_fused(alone_, [p], norm=waiting(alone_)._replace(weight=weight))
        assert torch.equal(found[row], expected[0]) or row in (2, 5)
        assert found[row].isnan().all() == expected.isnan().all() == (row in (2, 5))


def test_what_cannot_take_a_norm_or_a_residual_says_so():
    x, p = random(17, 256), product(64, 256)
    adapted, wide = product(64, 256, rank=8), product(16, 4352)
    for takes in (takes_norm, takes_residual):
        assert takes(x[:16], [p]) and not takes(x, [p])
        assert takes(x[:8], [adapted]) and not takes(x[:9], [adapted])
    assert not takes_norm(random(1, 4352), [wide]) and takes_residual(random(1, 4352), [wide])
    assert not takes_residual(x[:1], [product(40, 256)])
    with pytest.raises(ValueError, match="16 rows at most beside a norm or a residual"):
        gemv_4bit_fused(x, [p], norm=waiting(x))
    with pytest.raises(ValueError, match="norm_weight.* 4096 elements at most"):
        gemv_4bit_fused(random(1, 4352), [wide], norm=waiting(random(1, 4352)))
    x = x[:4].contiguous()
    norm, residual = waiting(x), Residual.of(random(4, 64))
    with pytest.raises(ValueError, match="residual.* one product"):
        gemv_4bit_fused(x, [p, p], residual=residual)
    with pytest.raises(ValueError, match="residual.* a multiple of 16"):
        gemv_4bit_fused(x, [product(40, 256)], residual=residual)
    with pytest.raises(ValueError, match="residual"):
        gemv_4bit_fused(x, [product(128, 256)], residual=residual)
    with pytest.raises(ValueError, match="squares"):
        gemv_4bit_fused(x, [p], norm=norm._replace(squares=norm.squares[:2]))
    with pytest.raises(ValueError, match="norm_weight"):
        gemv_4bit_fused(x, [p], norm=norm._replace(weight=norm.weight.float()))


def all_alone(x, products):
    """The same from products made together, as B of zeros leaves them.

    Their sums may have another order than one's alone, and so another last bit.
    """
    zeros = [p.adapter and p.adapter._replace(b=torch.zeros_like(p.adapter.b)) for p in products]
    plain = [p._replace(bias=None, adapter=a) for p, a in zip(products, zeros, strict=True)]
    outs = []
    for p, y in zip(products, gemv_4bit_fused(x, plain), strict=True):
        agree(y, gemm_4bit(x, p.packed, p.state))
        outs.append(alone(x, p, y))
    return outs


def skip_unless_fused(x, products):
    if not fuses(x, products):
        pytest.skip("no kernel: over 256 ranks or 8 rows, and not compute capability 9.0")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5, 8, 9, 16, 17, 32, 64])
@pytest.mark.parametrize("rank", [1, 5, 16, 64, 300])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
@pytest.mark.parametrize("sizes, k", [*SHAPES, ODD])
def test_adapters(dtype, m, rank, lora_dtype, sizes, k):
    more = {"rank": rank, "lora_dtype": lora_dtype, "bias": True, "rows": m if rank % 2 else 0}
    x, products = random(m, k, dtype), [product(n, k, dtype, **more) for n in sizes]
    skip_unless_fused(x, products)
    expected = all_alone(x, products)
    for found, y, p in zip(gemv_4bit_fused(x, products), expected, products, strict=True):
        agree(found, y)
        errors = [(z - exact(x, p)).square().mean().sqrt() for z in (found, y)]
        assert errors[0] <= 1.1 * errors[1]
    pair = [products[0], product(sizes[0], k, dtype, **more | {"rank": rank // 2 + 1})]
    (found,) = gemv_4bit_fused(x, pair, gated=True)
    agree(found, swiglu(*all_alone(x, pair)))


@pytest.mark.parametrize("m", [1, 8, 16, 33, 64])
@pytest.mark.parametrize("sizes, k", [*LONG, ((1000,), 1280)])
def test_adapters_over_slices_of_a_long_row(m, sizes, k):
    x = random(m, k)
    products = [product(n, k, rank=16, lora_dtype=torch.float32) for n in sizes]
    skip_unless_fused(x, products)
    for found, y in zip(gemv_4bit_fused(x, products), all_alone(x, products), strict=True):
        agree(found, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [17, 32, 33, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes, k", [*SHAPES, ODD, ((136, 1), 1024), ((11008,), 4096)])
def test_more_rows(dtype, m, bias, sizes, k):
    x, products = random(m, k, dtype), [product(n, k, dtype, bias) for n in sizes]
    skip_unless_fused(x, products)
    for found, p in zip(gemv_4bit_fused(x, products), products, strict=True):
        agree(found, exact(x, p).to(dtype))
    pair = [products[0], product(sizes[0], k, dtype)]
    (found,) = gemv_4bit_fused(x, pair, gated=True)
    agree(found, swiglu(*(alone(x, p) for p in pair)))
    # Nobody announces x where there is no adapter.
    arrived = torch.zeros(1, device="cuda", dtype=torch.int32)
    assert torch.equal(gemv_4bit_fused(x, pair, gated=True, arrived=arrived)[0], found)
    x[3] = float("nan")
    (beside,) = gemv_4bit_fused(x, pair, gated=True)
    kept = [row for row in range(m) if row != 3]
    assert torch.equal(beside[kept], found[kept]) and beside[3].isnan().all()


def test_only_some_products_are_adapted():
    x = random(2, 512)
    products = [product(300, 512), product(72, 512, rank=8), product(40, 512, bias=True)]
    found = gemv_4bit_fused(x, products)
    expected = [alone(x, p) for p in products]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    agree(found[1], expected[1])


@pytest.mark.parametrize("m", [2, 8, 12, 20, 64])
@pytest.mark.parametrize("ranks", [(0, 16, 3), (40, 0, 16)])
def test_each_product_has_a_rank_of_its_own(m, ranks):
    """Of more panels than multiprocessors: some go from a product to the next."""
    x, products = random(m, 512), [product(4096, 512, rank=rank, rows=m) for rank in ranks]
    skip_unless_fused(x, products)
    for found, y in zip(gemv_4bit_fused(x, products), all_alone(x, products), strict=True):
        agree(found, y)
    for pair in (products[:2], products[1:], products[::2]):
        (found,) = gemv_4bit_fused(x, pair, gated=True)
        agree(found, swiglu(*all_alone(x, pair)))


@pytest.mark.parametrize("m", [7, 16, 64])
def test_adapters_of_other_rows_change_nothing(m):
    """Adapters lie side by side: a row's own is what is left where the others' factors are 0."""
    x, plain = random(m, 4096), product(200, 4096)
    skip_unless_fused(x, [plain])
    of_all = product(200, 4096, rank=64, rows=m).adapter
    place = torch.arange(64, device="cuda") // 16
    rows = torch.arange(m, device="cuda") % 5
    factors = of_all.factors * (place == rows[:, None])
    (found,) = gemv_4bit_fused(x, [plain._replace(adapter=of_all._replace(factors=factors))])
    for row in range(4):
        b, factors = (t[:, place == row].contiguous() for t in (of_all.b, of_all.factors))
        own = LowRank(of_all.a[place == row], b, factors, 1.0)
        (alone_of_row,) = gemv_4bit_fused(x, [plain._replace(adapter=own)])
        assert torch.equal(found[rows == row], alone_of_row[rows == row])
    zeros = of_all._replace(b=torch.zeros_like(of_all.b))
    (without,) = gemv_4bit_fused(x, [plain._replace(adapter=zeros)])
    assert torch.equal(found[rows == 4], without[rows == 4])


def case(m, rank=16):
    """x and all that goes with one launch."""
    products = [product(n, 2048, rank=rank, lora_dtype=torch.float32) for n in (5632, 5632)]
    return random(m, 2048), products, True


@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("m", [8, 16, 64])
def test_runs_give_equal_bits_beside_other_work(m, rank):
    x, products, gated = case(m, rank)
    skip_unless_fused(x, products)
    (first,) = gemv_4bit_fused(x, products, gated)
    other, side = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(side):
            other = (other @ other).clamp(-1, 1)
        assert torch.equal(gemv_4bit_fused(x, products, gated)[0], first)


@pytest.mark.parametrize("m", [3, 16, 32])
def test_launches_meet_and_leave_zeros_behind(m):
    x, products, gated = case(m)
    skip_unless_fused(x, products)
    (expected,) = gemv_4bit_fused(x, products, gated)
    arrived = torch.zeros(4, device="cuda", dtype=torch.int32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        founds = [gemv_4bit_fused(x, products, gated, arrived=arrived)[0] for _ in range(20)]
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(found, expected) for found in founds)
        assert not arrived.any()
    with pytest.raises(ValueError, match="arrived"):
        gemv_4bit_fused(x, products, gated, arrived=arrived.float())


def test_a_row_does_not_depend_on_the_others():
    x, products, gated = case(8)
    (whole,) = gemv_4bit_fused(x, products, gated)
    for row in range(8):
        (found,) = gemv_4bit_fused(x[row : row + 1], products, gated)
        assert torch.equal(found, whole[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora_dtype", [None, torch.float32])
@pytest.mark.parametrize("ranks", [(1, 5), (16, 16), (64, 0), (256, 200)])
@pytest.mark.parametrize("k", [256, 2112, 4160, 11008])
def test_hidden_values_do_not_depend_on_the_other_rows(dtype, lora_dtype, ranks, k):
    """Of a K that ends within a chunk or a warp's part of it, and of more ranks than CTAs."""
    x = random(8, k, dtype)
    products = [product(520, k, dtype, rank=rank, lora_dtype=lora_dtype) for rank in ranks]
    whole = gemv_4bit_fused(x, products)
    for found, y in zip(whole, all_alone(x, products), strict=True):
        agree(found, y)
    for m in range(1, 8):
        for found, y in zip(gemv_4bit_fused(x[:m], products), whole, strict=True):
            assert torch.equal(found, y[:m])
        (last,) = gemv_4bit_fused(x[m:], products[:1])
        assert torch.equal(last, gemv_4bit_fused(x, products[:1])[0][m:])


def test_two_streams_and_graphs():
    cases = [case(m) for m in (2, 7)]
    streams = [torch.cuda.Stream() for _ in cases]
    expected = [gemv_4bit_fused(*one)[0] for one in cases]
    torch.cuda.synchronize()
    graphs, found = [], []
    for one, stream in zip(cases, streams, strict=True):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            found.append([gemv_4bit_fused(*one)[0] for _ in range(5)])
    for _ in range(40):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for all_of_one, y in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x in all_of_one)


@pytest.mark.parametrize("k", [256, 4096, 11008])
def test_what_follows_changes_nothing(k):
    """Any weights may follow: they are read, not written, and not past their ends."""
    x, products = random(2, k), [product(200, k)]
    (expected,) = gemv_4bit_fused(x, products)
    for sizes, next_k, gated in [
        ((8, 8), 256, True),
        ((5000, 40, 7), 4096, False),
        ((9,), k, False),
    ]:
        following = [product(n, next_k)[:2] for n in sizes]
        before = [(packed.clone(), state.absmax.clone()) for packed, state in following]
        for norm in (None, torch.ones(next_k, device="cuda", dtype=torch.float16)):
            (found,) = gemv_4bit_fused(x, products, False, Following(following, gated, norm))
            assert torch.equal(found, expected)
        for (packed, state), (codes, absmax) in zip(following, before, strict=True):
            assert torch.equal(packed, codes) and torch.equal(state.absmax, absmax)
    weight = product(64, 512)[:2]
    with pytest.raises(ValueError, match="next must have 512 elements"):
        norm = torch.ones(256, device="cuda", dtype=torch.float16)
        gemv_4bit_fused(x, products, following=Following([weight], norm=norm))


@pytest.mark.parametrize("m", [4, 16, 40])
def test_nan_stays_in_its_row(m):
    x, products, gated = case(m)
    skip_unless_fused(x, products)
    (before,) = gemv_4bit_fused(x, products, gated)
    x[2, 7] = float("nan")
    (found,) = gemv_4bit_fused(x, products, gated)
    others = [row for row in range(m) if row != 2]
    assert found[2].isnan().all()
    assert torch.equal(found[others], before[others])


def test_refuses_what_does_not_fit():
    x, plain = random(2, 512), product(40, 512)
    with pytest.raises(ValueError, match="products must be 1 to 4"):
        gemv_4bit_fused(x, [product(40, 512) for _ in range(5)])
    with pytest.raises(ValueError, match="packed must have 10240 elements"):
        gemv_4bit_fused(x, [plain, product(48, 512)], gated=True)
    high = product(64, 320, rank=257)
    assert not fuses(x[:, :320], [high])
    with pytest.raises(ValueError, match="8 rows beside adapters of rank 256"):
        gemv_4bit_fused(x[:, :320], [high])
    adapted = product(40, 512, rank=4)
    with pytest.raises(ValueError, match="one dtype for all adapters"):
        other = product(40, 512, rank=4, lora_dtype=torch.float32)
        gemv_4bit_fused(x, [adapted, other])
    assert not fuses(x.float(), [plain]) and not fuses(random(65, 512), [plain])
    assert not fuses(random(1, 96), [product(40, 96)])


@pytest.mark.parametrize("rows", [3, 20])
def test_layers_join_a_launch_when_they_can(monkeypatch, rows):
    """As modules, whatever stands beside their products; and one by one where a hook waits."""
    launched = []
    real = gemv_4bit_fused

    def spy(x, products, *more):
        launched.append(len(products))
        return real(x, products, *more)

    monkeypatch.setattr("halfbyte.linear.gemv_4bit_fused", spy)
    layers = torch.nn.ModuleDict()
    for name in ("gate_proj", "up_proj"):
        layers[name] = Linear4bit(512, 320, bias=False)
        layers[name].quantize_(torch.randn(320, 512, device="cuda", dtype=torch.bfloat16))
    lora.inject(layers, LoraConfig(r=8)).eval()
    for layer in layers.values():
        assert isinstance(layer, LoRALinear)
        torch.nn.init.normal_(layer.lora_B.weight)
    gate, up = layers.values()
    zeros = torch.zeros(1, device="cuda", dtype=torch.int32)
    x, launch = random(rows, 512), Launch(zeros, [gate, up], gated=True)
    skip_unless_fused(x, [product(320, 512, rank=8)])
    with torch.no_grad():
        expected = swiglu(gate(x), up(x))
        assert launched == []
        agree(project_gated(x, gate, up, launch), expected)
        for found, layer in zip(project(x, gate, up, launch=launch), (gate, up), strict=True):
            agree(found, layer(x))
        assert launched == [2, 2]
        seen = []
        up.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(project_gated(x, gate, up, launch), expected)
        assert launched == [2, 2] and seen == [1]
    assert project_gated(x, gate, up).requires_grad
