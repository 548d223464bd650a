"""swiglu and its gradients against fp64 and torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte import _core
from halfbyte.ops import swiglu

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (1, 14336), (300, 128), (5, 1537), (2, 3, 64), (1000, 8)]


def values(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype).to(device)


def close(got: Tensor, exact: Tensor, size: Tensor) -> None:
    """One rounding of the result apart, and some of fp32 values of `size` that it was made of."""
    low = torch.finfo(got.dtype)
    allowed = low.eps * exact.abs() + 6 * torch.finfo(torch.float32).eps * size
    # Where fp16 has no normal number left, one of its steps.
    allowed += low.tiny * low.eps
    off = (got.double() - exact).abs()
    assert bool((off <= allowed).all()), f"{(off / allowed).max():.2f} times too far"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_and_gradients(device, dtype, shape):
    gate, up, grad = (values(*shape, dtype=dtype, device=device, seed=seed) for seed in range(3))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    g, u, d = (t.detach().double() for t in (gate, up, grad))
    exact_leaves = [g.requires_grad_(), u.requires_grad_()]
    out, exact = swiglu(*leaves), F.silu(g) * u
    assert out.shape == gate.shape and out.dtype == dtype
    close(out, exact, exact.abs())
    got = torch.autograd.grad(out, leaves, grad)
    want = torch.autograd.grad(exact, exact_leaves, d)
    # silu is flat near -1.28: the error is that of 1 + gate (1 - s) before the two cancel.
    close(got[0], want[0], (d * u).abs() * (1 + g.abs()))
    close(got[1], want[1], want[1].abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_as_torch_does(device, dtype):
    gate, up = (values(64, 512, dtype=dtype, device=device, seed=seed) for seed in range(2))
    got, expected = swiglu(gate, up), F.silu(gate) * up
    assert (got == expected).float().mean() > 0.999, "one fp32 rounding may turn a tie"


@pytest.mark.parametrize("columns", [64, 100, 1537])
@pytest.mark.parametrize("dtype", FLOATS)
def test_halves_of_one_tensor(device, dtype, columns):
    both = values(3, 5, 2 * columns, dtype=dtype, device=device).requires_grad_()
    gate, up = (half.detach().requires_grad_() for half in both.chunk(2, dim=-1))
    out, expected = swiglu(both), swiglu(gate.contiguous(), up.contiguous())
    torch.testing.assert_close(out, expected)
    grad = values(3, 5, columns, dtype=dtype, device=device, seed=1)
    got = torch.autograd.grad(out, both, grad)[0]
    want = torch.autograd.grad(expected, [gate, up], grad)
    torch.testing.assert_close(got, torch.cat(want, -1))
    with torch.no_grad():
        assert torch.equal(swiglu(gate, up), out) and torch.equal(swiglu(both), out)
    with torch.inference_mode():
        inferred = swiglu(gate, up)
        assert torch.equal(swiglu(both), inferred)
    # On the CPU inference has an exponential of its own.
    torch.testing.assert_close(inferred, out)
    assert device.type == "cpu" or torch.equal(inferred, out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_inference_agrees_with_fp64(device, dtype):
    gate, up = (values(300, 129, dtype=dtype, device=device, seed=seed) for seed in range(2))
    gate[0, :8] = torch.tensor([0.0, 20.0, -20.0, 60.0, -60.0, 1e-6, -1e-6, 88.0], dtype=dtype)
    exact = F.silu(gate.double()) * up
    with torch.inference_mode():
        close(swiglu(gate, up), exact, exact.abs())


def test_extremes_are_torchs(device):
    ends = torch.tensor([0.0, -0.0, 100.0, -100.0, 3e38, -3e38, torch.inf, -torch.inf, torch.nan])
    gate, up = (t.to(device) for t in torch.meshgrid(ends, ends, indexing="ij"))
    expected = F.silu(gate) * up
    torch.testing.assert_close(swiglu(gate, up), expected, equal_nan=True)
    with torch.inference_mode():
        torch.testing.assert_close(swiglu(gate, up), expected, equal_nan=True)


def test_second_derivatives_are_refused(device):
    gate, up = (torch.randn(2, 8, device=device, dtype=torch.bfloat16) for _ in range(2))
    (grad,) = torch.autograd.grad(
        swiglu(gate.requires_grad_(), up).square().sum(), gate, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_nothing(device):
    assert swiglu(torch.empty(0, 8, device=device)).shape == (0, 4)
    empty = torch.empty(3, 0, device=device, requires_grad=True)
    swiglu(empty, empty).sum().backward()


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"swiglu: up: expected .*\[2, 8\] on cpu, got .*\[2, 9\]"):
        swiglu(torch.ones(2, 8), torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"swiglu: gate: expected \[..., 2 d\], got \[2, 9\]"):
        swiglu(torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"up: expected torch.float32 .*, got torch.float16"):
        swiglu(torch.ones(2, 8), torch.ones(2, 8).half())


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_plain_loop(dtype, halves):
    both, grad = (values(5, n, dtype=dtype, device="cpu") for n in (14, 7))
    gate, up = both.chunk(2, dim=-1)
    out = torch.empty(5, 7, dtype=dtype)
    _core.swiglu(gate, up, out)
    grads = torch.empty((5, 2, 7) if halves else (2, 5, 7), dtype=dtype)
    _core.swiglu_backward(grad, gate, up, grads, halves)
    g, u, d = (t.double() for t in (gate, up, grad))
    leaves = g.requires_grad_(), u.requires_grad_()
    exact = F.silu(g) * u
    close(out, exact.detach(), exact.detach().abs())
    want = torch.autograd.grad(exact, leaves, d)
    for got, wanted in zip(grads.unbind(1 if halves else 0), want, strict=True):
        close(got, wanted, (d * u).abs().detach() * (1 + g.abs().detach()))


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [1, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_unaligned_and_inside_bounds(dtype, shift):
    n = 10_007
    gate, up = (values(1, n, dtype=dtype, device="cuda", seed=seed) for seed in range(2))
    expected = swiglu(gate, up)
    moved = torch.empty(n + shift, dtype=dtype, device="cuda")[shift:].copy_(gate[0])[None]
    around = torch.full((n + 64,), 7.0, dtype=dtype, device="cuda")
    out = around[16 + shift : 16 + shift + n]
    _core.swiglu(moved, up, out)
    assert torch.equal(out, expected[0])
    assert bool((around[: 16 + shift] == 7).all()) and bool((around[16 + shift + n :] == 7).all())
