"""lora_product: x w^T + hidden b^T as one sum, against fp64, and when the kernel is taken."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops import dequantize_4bit, lora_4bit, quantize_4bit
from halfbyte.ops.lora_product import lora_product

MODULE = sys.modules["halfbyte.ops.lora_product"]
DTYPES = [torch.float16, torch.bfloat16]
# Cut tiles alone, whole ones alone, both; columns, ranks and contractions that fill no tile.
SIZES = [(1, 8, 72, 8), (77, 264, 200, 16), (300, 1000, 1096, 100), (129, 512, 64, 64),
         (1300, 1800, 136, 64), (1300, 4104, 512, 72), (2304, 3072, 192, 130)]  # fmt: skip


def rounded_up(size: int) -> int:
    return -(-size // 8) * 8


def operands(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, device: torch.device, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """hidden is a slice of wider rows, as that of one of several adapters is."""
    rng = torch.Generator().manual_seed(m + n + k + r)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device, dtype)

    x, w = matrix(m, k), matrix(*((k, n) if transposed else (n, k)))
    hidden, b = (
        matrix(m, rounded_up(r) + 16)[:, 8 : 8 + r],
        matrix(*((r, n) if transposed else (n, r))),
    )
    return x, w, hidden, b, transposed


def exact(x: Tensor, w: Tensor, hidden: Tensor, b: Tensor, transposed: bool) -> Tensor:
    w, b = (w, b) if transposed else (w.t(), b.t())
    return x.double() @ w.double() + hidden.double() @ b.double()


def assert_rounded_once(out: Tensor, want: Tensor, depth: int) -> None:
    """Within half a unit of the last place, and what a sum of so many terms loses in fp32."""
    bound = want.abs() * torch.finfo(out.dtype).eps / 2 + 1e-5 * depth**0.5
    assert ((out.double() - want).abs() <= bound).all()


def narrow(x: Tensor, s: int, transposed: bool) -> tuple[Tensor, float, Tensor]:
    """a of rank s, scaling and progress."""
    k = x.shape[1]
    a = torch.randn(*((k, s) if transposed else (s, k)), device=x.device, dtype=x.dtype)
    return a, 0.3, x.new_zeros(1 + -(-len(x) // 128), dtype=torch.int32)


def needs_kernel() -> None:
    if not _core.has_lora_product(0):
        pytest.skip("kernels for warpgroups exist for compute capability 9.0 alone")


@pytest.fixture
def launches(monkeypatch) -> list[tuple[bool, bool]]:
    """Of each launch of the kernel, which takes all that it can, whether w is transposed and
    whether hidden is made.
    """
    calls = []
    kernel = _core.lora_product

    def counted(*args):
        calls.append((args[4], args[6] is not None))
        kernel(*args)

    for rule in ("_fills_tiles", "_finds_room"):
        monkeypatch.setattr(MODULE, rule, lambda *sizes: True)
    monkeypatch.setattr(_core, "lora_product", counted)
    return calls


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
def test_product_against_fp64(device, dtype, transposed):
    args = operands(300, 264, 200, 16, dtype, device, transposed)
    want = exact(*args)
    got = lora_product(*args)
    bound = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= bound * want.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k, r", SIZES)
def test_kernel_rounds_the_sum_once(m, n, k, r, dtype, transposed):
    needs_kernel()
    x, w, hidden, b, _ = operands(
        m, n, k, r if transposed else rounded_up(r), dtype, torch.device("cuda"), transposed
    )
    home = torch.full((m + 2, n), 7.0, dtype=dtype, device="cuda")
    _core.lora_product(x, w, hidden, b, transposed, home[1:-1])
    assert (home[[0, -1]] == 7).all()
    assert_rounded_once(home[1:-1], exact(x, w, hidden, b, transposed), k + r)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("more", [-8, 0, 16])
def test_hidden_is_made_before_it_is_read(device, more, transposed):
    """Of more ranks than b has, as for weights that come after, or of fewer."""
    x, w, _, b, _ = operands(300, 264, 200, 16, torch.float32, device, transposed)
    a, scaling, _ = narrow(x, 16 + more, transposed)
    hidden = torch.randn(300, 32, device=device)
    want = hidden.clone()
    want[:, : 16 + more] = scaling * x @ (a if transposed else a.t())
    got = lora_product(x, w, hidden, b, transposed, a, scaling)
    torch.testing.assert_close(hidden, want)
    exactly = exact(x, w, want[:, :16], b, transposed)
    torch.testing.assert_close(got.double(), exactly, rtol=1e-4, atol=1e-4)


def test_op_says_what_it_writes(device):
    args = operands(6, 16, 24, 8, torch.float32, device, False)
    a, scaling, _ = narrow(args[0], 8, False)
    for given in (args, (*args, a, scaling)):
        torch.library.opcheck(torch.ops.halfbyte.lora_product, given)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k, r", SIZES)
def test_kernel_makes_hidden(m, n, k, r, dtype, transposed):
    needs_kernel()
    torch.manual_seed(0)
    r = rounded_up(r)
    x, w, _, b, _ = operands(m, n, k, r, dtype, torch.device("cuda"), transposed)
    for s in (r, r + 136, 8):
        args = narrow(x, s, transposed)
        home = torch.randn(m + 2, max(s, r) + 24, device="cuda").to(dtype)
        before, hidden = home.clone(), home[1:-1, 8:-16]
        out = x.new_full((m, n), -1)
        _core.lora_product(x, w, hidden, b, transposed, out, *args)
        made = hidden[:, :s]
        assert_rounded_once(
            made, 0.3 * x.double() @ (args[0] if transposed else args[0].t()).double(), k
        )
        assert_rounded_once(out, exact(x, w, hidden[:, :r], b, transposed), k + r)
        made.copy_(before[1:-1, 8 : 8 + s])
        assert torch.equal(home, before)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_repeats_its_bits(dtype, transposed):
    needs_kernel()
    args = operands(2200, 4096, 2048, 64, dtype, torch.device("cuda"), transposed)
    x, w, hidden, b, _ = args
    outs = [torch.full((2200, 4096), -1.0, dtype=dtype, device="cuda") for _ in range(20)]
    for out in outs:
        _core.lora_product(*args, out)
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    a, scaling, progress = narrow(x, 64, transposed)
    made = [hidden.clone().fill_(float("nan")) for _ in outs]
    for out, own in zip(outs, made, strict=True):
        _core.lora_product(x, w, own, b, transposed, out, a, scaling, progress.clone())
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert all(torch.equal(made[0], own) for own in made[1:])


@pytest.mark.gpu
def test_launches_on_two_streams_do_not_disturb_each_other():
    """Each of them has CTAs for all multiprocessors."""
    needs_kernel()
    args = operands(2200, 2048, 1024, 64, torch.bfloat16, torch.device("cuda"), False)
    x, w, hidden, b, _ = args
    a, scaling, progress = narrow(x, 64, False)
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1)]
    runs = [
        (stream, hidden.clone().zero_(), x.new_empty(2200, 2048), progress.clone())
        for _ in range(10)
        for stream in streams
    ]
    torch.cuda.synchronize()
    for stream, own, out, zeros in runs:
        with torch.cuda.stream(stream):
            _core.lora_product(x, w, own, b, False, out, a, scaling, zeros)
    torch.cuda.synchronize()
    assert_rounded_once(runs[0][1], 0.3 * x.double() @ a.t().double(), 1024)
    assert_rounded_once(runs[0][2], exact(x, w, runs[0][1], b, False), 1024 + 64)
    for _, own, out, _ in runs[1:]:
        assert torch.equal(own, runs[0][1]) and torch.equal(out, runs[0][2])


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_of_a_row_stays_in_its_hidden_values(transposed):
    needs_kernel()
    args = operands(300, 520, 136, 24, torch.bfloat16, torch.device("cuda"), transposed)
    x, w, _, b, _ = args
    x[3, 7], x[250, 0] = float("nan"), float("inf")
    hidden, out = torch.zeros_like(x[:, :64]), x.new_empty(300, 520)
    _core.lora_product(x, w, hidden, b, transposed, out, *narrow(x, 64, transposed))
    for made in (hidden, out):
        finite = torch.isfinite(made)
        assert not finite[[3, 250]].any() and finite.sum() == 298 * made.shape[1]


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_and_infinity_stay_in_their_rows_and_columns(transposed):
    needs_kernel()
    args = operands(300, 520, 136, 24, torch.bfloat16, torch.device("cuda"), transposed)
    x, w, hidden, b, _ = args
    x[3, 7], hidden[150, 0] = float("nan"), float("inf")
    of_column, of_rank = (w[:, 11], b[:, 300]) if transposed else (w[11], b[300])
    of_column[5], of_rank[2] = float("nan"), float("inf")
    out = x.new_empty(300, 520)
    _core.lora_product(*args, out)
    want = exact(*args)
    assert torch.equal(torch.isfinite(out), torch.isfinite(want))
    assert torch.equal(torch.isnan(out), torch.isnan(want))
    assert torch.isfinite(want).sum() == 298 * 518


@pytest.mark.gpu
def test_kernel_takes_what_is_aligned(launches):
    needs_kernel()
    device = torch.device("cuda")
    for transposed in (False, True):
        args = operands(300, 264, 200, 16, torch.bfloat16, device, transposed)
        lora_product(*args)
        assert launches == [(transposed, False)]
        x, w, hidden, b, _ = args
        shifted = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
        wide = hidden.new_empty(300, 24)[:, 1:17].copy_(hidden)
        strided = torch.stack((x, x), 2)[..., 0]
        for others in [(shifted, w, hidden, b), (x, w, wide, b), (strided, w, hidden, b),
                       tuple(tensor.float() for tensor in (x, w, hidden, b))]:  # fmt: skip
            out = lora_product(*others, transposed)
            assert (out.double() - exact(*args)).norm() <= 2**-6 * exact(*args).norm()
        a, scaling, _ = narrow(x, 16, transposed)
        shifted = a.new_empty(a.numel() + 1)[1:].view_as(a).copy_(a)
        want, got = (lora_product(*args, own, scaling) for own in (a, shifted))
        assert (want - got).norm() <= 2**-6 * got.norm()
        assert launches.pop() == (transposed, False) and launches.pop() == (transposed, True)
        odd = operands(300, 260, 200, 16, torch.bfloat16, device, transposed)
        assert lora_product(*odd).shape == (300, 260)
        assert launches == [(transposed, False)]
        launches.clear()


@pytest.mark.gpu
def test_layers_of_one_input_take_the_kernel(launches):
    needs_kernel()
    torch.manual_seed(0)
    sizes, ranks = (512, 264), (16, 8)
    weights = [quantize_4bit(torch.randn(n, 320, device="cuda"), double_quant=True) for n in sizes]
    a = [torch.randn(r, 320, device="cuda") for r in ranks]
    b = [torch.randn(n, r, device="cuda") for n, r in zip(sizes, ranks, strict=True)]
    leaves = [torch.randn(600, 320, device="cuda", dtype=torch.bfloat16), *a, *b]
    x, *rest = (tensor.requires_grad_() for tensor in leaves)
    outs = lora_4bit(x, weights, rest[:2], rest[2:], 0.3)
    assert launches == [(False, True), (False, False)]
    grads = [torch.randn_like(out) for out in outs]
    got = torch.autograd.grad(outs, leaves, grads)
    assert launches[2:] == [(True, True)]

    x, *rest = twins = [tensor.detach().double().requires_grad_() for tensor in leaves]
    dense = [dequantize_4bit(*weight, torch.float32).double() for weight in weights]
    want = [
        x @ w.t() + 0.3 * (x @ a.t() @ b.t())
        for w, a, b in zip(dense, rest[:2], rest[2:], strict=True)
    ]
    wanted = torch.autograd.grad(want, twins, [grad.double() for grad in grads])
    for ours, theirs in zip([*outs, *got], [*want, *wanted], strict=True):
        assert (ours.double() - theirs).norm() <= 4 * 2**-7 * theirs.norm()


@pytest.mark.gpu
def test_kernel_can_be_captured(launches):
    needs_kernel()
    args = operands(300, 520, 136, 24, torch.bfloat16, torch.device("cuda"), False)
    a, scaling, _ = narrow(args[0], 24, False)
    want = lora_product(*args, a, scaling)
    made = args[2].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = lora_product(*args, a, scaling)
    for _ in range(3):
        out.zero_()
        args[2].zero_()
        graph.replay()
        assert torch.equal(out, want) and torch.equal(args[2], made)
    assert launches == [(False, True)] * 2


# As measured on an H200, by the time of both passes.
@pytest.mark.parametrize(
    "m, n, k, fills",
    [
        (16384, 4096, 4096, True),  # 0.93
        (1024, 14336, 4096, True),  # three waves and a half: 0.94
        (2048, 1024, 4096, True),  # 64 tiles on 132 multiprocessors, cut in two: 0.88
        (2048, 5632, 2048, True),  # 0.91
        (1024, 5120, 5120, False),  # 160 tiles: 1.08
        (1024, 1024, 4096, False),  # 1.42
        (3000, 1024, 4096, False),  # 1.11
        (3000, 8192, 28672, False),  # 1.00
        (400, 4096, 4096, False),  # 1.03
    ],
)
def test_tiles_are_taken_where_multiprocessors_are_busy(m, n, k, fills):
    assert MODULE._fills_tiles(m, k, n, 132) == fills


# As measured on an H200, by the time of a product of its own and of the kernel without it.
@pytest.mark.parametrize(
    "m, n, s, fits",
    [
        (1024, 4096, 64, True),  # 128 tiles and 8 of hidden on 132 multiprocessors: 0.93
        (16384, 4096, 64, True),  # 0.96
        (16384, 14336, 64, True),  # half a wave more
        (2048, 1024, 64, False),  # 64 tiles are half a wave, 16 of hidden another one: 1.38
        (4096, 1024, 64, False),  # 1.26
        (8192, 1024, 64, False),  # 1.07
        (16384, 1024, 64, False),  # 1.08
        (4096, 2048, 64, False),  # 1.10
        (4096, 11008, 64, False),  # 1.02
        (4096, 4096, 64, True),  # 0.96
        (16384, 8192, 64, True),
        (4096, 4096, 192, False),  # two tiles of hidden a row
    ],
)
def test_hidden_is_made_where_multiprocessors_have_time(m, n, s, fits):
    assert MODULE._finds_room(m, n, s, 132) == fits


def test_what_the_kernel_does_not_take_is_named():
    x, w, hidden, b, _ = operands(4, 16, 24, 8, torch.bfloat16, torch.device("cpu"), False)
    out = x.new_empty(4, 16)
    with pytest.raises(ValueError, match="x.*on a GPU"):
        _core.lora_product(x, w, hidden, b, False, out)
    with pytest.raises(ValueError, match="w.*N x K"):
        _core.lora_product(x, w[1:], hidden, b, False, out)
    with pytest.raises(ValueError, match="b.*multiples of 16 bytes.*7 elements"):
        _core.lora_product(x, w, hidden[:, :7], b[:, :7].contiguous(), False, out)
    with pytest.raises(ValueError, match="bfloat16"):
        _core.lora_product(x.float(), w, hidden, b, False, out)
    with pytest.raises(ValueError, match="out must not share memory"):
        _core.lora_product(x, w, hidden, b, False, w)
    a, scaling, progress = narrow(x, 8, False)
    own = hidden.contiguous()
    with pytest.raises(ValueError, match="hidden must not share memory with a"):
        _core.lora_product(x, w, own, b, False, out, own, scaling, progress)
    with pytest.raises(ValueError, match="a.*S x K"):
        _core.lora_product(x, w, hidden, b, False, out, a[:, :16].contiguous(), scaling, progress)
    with pytest.raises(ValueError, match="progress.*1 . M / 128"):
        _core.lora_product(x, w, hidden, b, False, out, a, scaling, progress[1:])
    with pytest.raises(ValueError, match="hidden.*8 columns of 16"):
        wide, _, _ = narrow(x, 16, False)
        _core.lora_product(x, w, hidden, b, False, out, wide, scaling, progress)
