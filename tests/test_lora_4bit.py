"""lora_4bit: several adapted weights of one input, against fp64 and against one by one."""

from __future__ import annotations

import pytest
import torch

from halfbyte.models.recompute import recomputed
from halfbyte.ops import dequantize_4bit, lora_4bit, quantize_4bit

SCALING = 0.3


def group(device, k: int, sizes: list[int], ranks: list[int]):
    """weights, a and b of one input."""
    weights = [quantize_4bit(torch.randn(n, k, device=device), double_quant=True) for n in sizes]
    a = [torch.randn(r, k, device=device).requires_grad_() for r in ranks]
    pairs = zip(sizes, ranks, strict=True)
    b = [torch.randn(n, r, device=device).requires_grad_() for n, r in pairs]
    return weights, a, b


def twins(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def definition(x, weights, a, b, dropped=None):
    inputs = dropped or [x] * len(a)
    return [
        x @ dequantize_4bit(*weight, torch.float32).double().t() + SCALING * (h @ a.t() @ b.t())
        for weight, h, a, b in zip(weights, inputs, a, b, strict=True)
    ]


# Few rows go through kernels of codes, many through a dequantized weight.
@pytest.mark.parametrize("shape", [(3,), (2, 150), (0,)])
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_group_against_fp64(device, shape, drops, dtype):
    torch.manual_seed(0)
    # Of x's dtype are W, a, b, what is between them, and the result.
    bound = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    weights, a, b = group(device, 65, [33, 7, 40], [4, 8, 1])
    x = torch.randn(*shape, 65, device=device, dtype=dtype).requires_grad_()
    dropped = [torch.randn_like(x).requires_grad_() for _ in a] if drops else []
    leaves = [x, *a, *b, *dropped]
    outs = lora_4bit(x, weights, a, b, SCALING, dropped)
    grads = [torch.randn_like(out) for out in outs]
    got = torch.autograd.grad(outs, leaves, grads)

    x64, *rest = twins(leaves)
    a64, b64, dropped64 = rest[:3], rest[3:6], rest[6:]
    exact = definition(x64, weights, a64, b64, dropped64)
    want = torch.autograd.grad(exact, [x64, *rest], [grad.double() for grad in grads])
    for ours, theirs in zip([*outs, *got], [*exact, *want], strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    assert all(out.dtype == dtype for out in outs)
    assert all(grad.dtype == torch.float32 for grad in got[1:7])


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
def test_gradients_of_16_bit_products_are_not_rounded(device):
    weights, a, b = group(device, 64, [32], [8])
    x = torch.randn(40, 64, device=device, dtype=torch.bfloat16)
    (out,) = lora_4bit(x, weights, a, b, SCALING)
    for grad in torch.autograd.grad(out, [*a, *b], torch.randn_like(out)):
        assert not torch.equal(grad, grad.bfloat16().float())


# torch's own, of a thread in which no kernel ran yet.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
def test_only_what_asks_for_a_gradient_gets_one(device):
    weights, a, b = group(device, 64, [32, 32], [8, 8])
    x = torch.randn(5, 64, device=device)
    outs = lora_4bit(x, weights, a, b, SCALING)
    sum(out.sum() for out in outs).backward()
    assert x.grad is None and all(tensor.grad is not None for tensor in (*a, *b))
    with torch.no_grad():
        again = lora_4bit(x, weights, a, b, SCALING)
    assert all(map(torch.equal, outs, again)) and not any(out.requires_grad for out in again)


def test_one_output_may_stay_unused(device):
    weights, a, b = group(device, 64, [32, 24], [8, 8])
    x = torch.randn(5, 64, device=device, requires_grad=True)
    lora_4bit(x, weights, a, b, SCALING)[1].sum().backward()
    alone = torch.autograd.grad(
        lora_4bit(x, weights[1:], a[1:], b[1:], SCALING)[0].sum(), [x, a[1], b[1]]
    )
    for ours, theirs in zip((x.grad, a[1].grad, b[1].grad), alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not a[0].grad.any() and not b[0].grad.any()


@pytest.mark.parametrize("rows", [3, 300])
def test_unread_outputs_have_the_same_gradients(device, rows):
    weights, a, b = group(device, 64, [32, 24], [8, 8])
    x = torch.randn(rows, 64, device=device, requires_grad=True)
    read, unread = (lora_4bit(x, weights, a, b, SCALING, unread=u) for u in (False, True))
    grads = [torch.randn_like(out) for out in read]
    ours, theirs = (torch.autograd.grad(outs, [x, *a, *b], grads) for outs in (unread, read))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
def test_second_derivatives_are_refused(device):
    weights, a, b = group(device, 64, [32], [8])
    x = torch.randn(9, 64, device=device, requires_grad=True)
    (out,) = lora_4bit(x, weights, a, b, SCALING)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_computes_in_its_dtype(device):
    weights, a, b = group(device, 64, [32], [8])
    x = torch.randn(9, 64, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        (out,) = lora_4bit(x, weights, a, b, SCALING)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == a[0].grad.dtype == torch.float32


def test_an_input_of_another_size_is_named(device):
    weights, a, b = group(device, 64, [32], [8])
    with pytest.raises(ValueError, match=r"expected \[..., 64\] for W \[32, 64\]"):
        lora_4bit(torch.randn(3, 60, device=device), weights, a, b, SCALING)


def test_a_recomputed_layer_draws_the_same_numbers(device):
    weight = torch.randn(64, 64, device=device, requires_grad=True)
    calls = []

    def layer(x: torch.Tensor, p: float, unread: bool) -> torch.Tensor:
        calls.append(unread)
        return torch.nn.functional.dropout(x @ weight, p)

    def run(work):
        torch.manual_seed(7)
        x = torch.randn(8, 64, device=device, requires_grad=True)
        out = work(work(x))
        before = torch.rand(3, device=device)
        out.sum().backward()
        grad, weight.grad = weight.grad, None
        return out, before, x.grad, grad, torch.rand(3, device=device)

    def plain(x):
        return layer(x, 0.5, False)

    def kept(x):
        return recomputed(layer, x, 0.5)

    assert all(map(torch.equal, run(plain), run(kept)))
    assert calls == [False] * 4 + [True] * 2


def test_a_recomputed_layer_refuses_autograd_grad():
    x = torch.randn(8, requires_grad=True)
    out = recomputed(lambda x, unread: x * 2, x)
    with pytest.raises(RuntimeError, match=r"expected loss.backward\(\)"):
        torch.autograd.grad(out.sum(), x)
