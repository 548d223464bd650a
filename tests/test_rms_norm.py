"""rms_norm and its gradients against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops import add_rms_norm, rms_norm

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
# Rows for part of a warp, a warp, a CTA; longer than registers hold; not aligned.
SHAPES = [(1, 1), (3, 7), (5, 64), (300, 128), (2, 576), (9, 1000), (1, 4096), (600, 4096)]
SHAPES += [(7, 4099), (2, 8192), (2, 8200), (3, 20_000), (1, 100_003), (5000, 8)]


def values(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def definition(x: Tensor, weight: Tensor) -> Tensor:
    """In fp64 and without roundings, differentiable."""
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def close(got: Tensor, exact: Tensor, roundings: float) -> None:
    """As far apart as that many roundings of values of this size."""
    exact = exact.detach().cpu()
    allowed = roundings * torch.finfo(got.dtype).eps * exact.abs().amax(-1, keepdim=True)
    off = (got.detach().cpu().double() - exact).abs()
    assert bool((off <= allowed + 1e-6).all()), (
        f"{(off / (allowed + 1e-6)).max():.2f} times too far"
    )


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("wide_weight", [False, True])
def test_forward_and_gradients(device, dtype, rows, columns, wide_weight):
    x, residual, grad, grad_sum = (
        values(rows, columns, dtype=dtype, device=device, seed=seed) for seed in range(4)
    )
    weight = values(columns, dtype=torch.float32 if wide_weight else dtype, device=device)
    leaves = [t.requires_grad_() for t in (x, residual, weight)]
    out, total = add_rms_norm(*leaves, EPS)
    assert torch.equal(total, x + residual) and out.dtype == dtype

    exact_sum = total.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    exact = definition(exact_sum, exact_weight)
    close(out, exact, 2)

    got = torch.autograd.grad([out, total], leaves, [grad, grad_sum])
    want = torch.autograd.grad(exact, [exact_sum, exact_weight], grad.double())
    close(got[0], want[0] + grad_sum.double(), 2)
    assert torch.equal(got[0], got[1])
    assert got[2].dtype == weight.dtype
    # Its sum over the rows is one of fp32.
    off = (got[2].double() - want[1]).norm() / want[1].norm()
    assert off <= 2 * torch.finfo(dtype).eps + 1e-7 * rows**0.5

    alone = rms_norm(total.detach(), weight.detach(), EPS)
    close(alone, exact, 2)
    assert torch.equal(alone, out)
    with torch.inference_mode():
        inferred, inferred_total = add_rms_norm(x, residual, weight, EPS)
        assert torch.equal(inferred, rms_norm(total, weight, EPS))
    close(inferred, exact, 2)
    assert torch.equal(inferred_total, total)
    # On the CPU inference sums in another order.
    assert device.type == "cpu" or torch.equal(inferred, out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_frozen_weight_has_no_gradient_and_leading_dimensions_stay(device, dtype):
    x = values(2, 3, 48, dtype=dtype, device=device).requires_grad_()
    weight = values(48, dtype=dtype, device=device)
    out = rms_norm(x, weight, EPS)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape and weight.grad is None
    flat = x.detach().flatten(0, 1)
    assert torch.equal(rms_norm(flat, weight, EPS), out.flatten(0, 1))


def test_other_strides_are_read_as_they_look(device):
    x = values(48, 6, dtype=torch.float32, device=device).t().requires_grad_()
    weight = values(48, dtype=torch.float32, device=device)
    out = rms_norm(x, weight, EPS)
    out.backward(torch.ones(48, 6, device=device).t())
    twin = x.detach().contiguous().requires_grad_()
    rms_norm(twin, weight, EPS).backward(torch.ones(6, 48, device=device))
    torch.testing.assert_close(out, rms_norm(twin, weight, EPS))
    torch.testing.assert_close(x.grad, twin.grad)


@pytest.mark.parametrize("columns", [40, 4096, 20_000])
def test_nan_and_inf_stay_in_their_row(device, columns):
    x = values(4, columns, dtype=torch.float32, device=device)
    weight = values(columns, dtype=torch.float32, device=device)
    clean = rms_norm(x, weight, EPS)
    x[1, 3], x[2, columns - 1] = float("nan"), float("inf")
    out = rms_norm(x, weight, EPS)
    assert torch.equal(out[[0, 3]], clean[[0, 3]])
    assert out[1].isnan().all()
    assert out[2, -1].isnan() and bool((out[2, :-1] == 0).all())


def test_second_derivatives_are_refused(device):
    x = torch.randn(2, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(8, device=device, dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_rows(device):
    x = torch.empty(0, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device, requires_grad=True)
    out = rms_norm(x, weight, EPS)
    out.sum().backward()
    assert out.shape == (0, 16) and torch.equal(weight.grad, torch.zeros(16, device=device))


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"rms_norm: x: expected \[..., 8\].*got \[2, 9\]"):
        rms_norm(torch.ones(2, 9), torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual: .*\[2, 8\], got .*\[8\]"):
        add_rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8), EPS)
    with pytest.raises(
        ValueError, match=r"weight: expected torch.bfloat16 or .*, got torch.float16"
    ):
        rms_norm(torch.ones(2, 8).bfloat16(), torch.ones(8).half(), EPS)
    with pytest.raises(ValueError, match="residual and sum must be given together"):
        _core.rms_norm(torch.ones(8), torch.ones(8), EPS, torch.ones(8), residual=torch.ones(8))


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 7), (5, 1030)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_plain_loop(dtype, rows, columns):
    x, residual = (values(rows, columns, dtype=dtype, device="cpu", seed=seed) for seed in range(2))
    weight = values(columns, dtype=torch.float32, device="cpu")
    out, total = torch.empty_like(x), torch.empty_like(x)
    _core.rms_norm(x, weight, EPS, out, residual, total)
    expected, expected_total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(out, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)

    grad, grad_sum = (
        values(rows, columns, dtype=dtype, device="cpu", seed=seed) for seed in range(2, 4)
    )
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    scratch = torch.empty(rows), torch.empty(64, columns)
    _core.rms_norm_backward(grad, total, weight, EPS, grad_x, grad_sum, grad_weight, *scratch)
    leaves = total.double().requires_grad_(), weight.double().requires_grad_()
    want = torch.autograd.grad(definition(*leaves), leaves, grad.double())
    close(grad_x, want[0] + grad_sum.double(), 2)
    off = (grad_weight.double() - want[1]).norm() / want[1].norm()
    assert off <= 2 * torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [1, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unaligned_and_inside_bounds(dtype, shift):
    rows, columns = 37, 264
    n = rows * columns
    x = values(n, dtype=dtype, device="cuda")
    weight = values(columns, dtype=dtype, device="cuda")
    expected = rms_norm(x.view(rows, columns), weight, EPS)
    home = torch.empty(n + shift, dtype=dtype, device="cuda")
    moved = home[shift:].copy_(x).view(rows, columns)
    around = torch.full((n + 64,), 7.0, dtype=dtype, device="cuda")
    out = around[16 + shift : 16 + shift + n]
    _core.rms_norm(moved, weight, EPS, out)
    assert torch.equal(out.view(rows, columns), expected)
    assert bool((around[: 16 + shift] == 7).all()) and bool((around[16 + shift + n :] == 7).all())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 3000])
def test_runs_are_equal_and_a_row_is_its_own(rows):
    x = values(rows, 4096, dtype=torch.bfloat16, device="cuda")
    weight = values(4096, dtype=torch.bfloat16, device="cuda").requires_grad_()
    first = rms_norm(x, weight, EPS)
    grads = torch.autograd.grad(first, weight, x)
    for _ in range(20):
        again = rms_norm(x, weight, EPS)
        assert torch.equal(again, first)
        assert torch.equal(torch.autograd.grad(again, weight, x)[0], grads[0])


@pytest.mark.gpu
def test_capture():
    x = values(3, 4096, dtype=torch.bfloat16, device="cuda")
    weight = values(4096, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Each reads what the one before it wrote, which may still be running when it starts.
        y = x
        for _ in range(10):
            y, total = add_rms_norm(y, x, weight, EPS)
    for seed in range(3):
        x.copy_(values(3, 4096, dtype=torch.bfloat16, device="cuda", seed=seed))
        graph.replay()
        want = x
        for _ in range(10):
            want, want_total = add_rms_norm(want, x, weight, EPS)
            torch.cuda.synchronize()
        assert torch.equal(y, want) and torch.equal(total, want_total)
