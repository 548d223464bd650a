"""rope against torch's own arithmetic, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops import rope

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
# batch, tokens, heads, kv_heads, head_dim
SHAPES = [
    (1, 1, 32, 8, 128),
    (1, 1, 9, 3, 64),
    (2, 37, 4, 2, 64),
    (1, 5, 3, 1, 10),
    (2, 3, 2, 2, 2),
]
SHAPES += [(3, 700, 8, 8, 96), (1, 3, 2, 1, 80)]


def values(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def angles(batch: int, tokens: int, dim: int, dtype, device) -> tuple[Tensor, Tensor]:
    phase = values(batch, tokens, 1, dim // 2, dtype=torch.float32, device=device, seed=9) * 10
    cos, sin = phase.cos(), phase.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shared", [True, False])
def test_equals_torch_to_the_bit(device, dtype, shape, shared):
    batch, tokens, heads, kv_heads, dim = shape
    q = values(batch, tokens, heads, dim, dtype=dtype, device=device).requires_grad_()
    k = values(batch, tokens, kv_heads, dim, dtype=dtype, device=device, seed=1).requires_grad_()
    cos, sin = angles(1 if shared else batch, tokens, dim, dtype, device)
    got, want = rope(q, k, cos, sin), (rotate(q, cos, sin), rotate(k, cos, sin))
    grads = [torch.randn_like(x) for x in got]
    assert all(map(torch.equal, got, want))
    ours = torch.autograd.grad(got, [q, k], grads)
    assert all(map(torch.equal, ours, torch.autograd.grad(want, [q, k], grads)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_strides_of_batch_tokens_and_heads(device, dtype):
    batch, tokens, heads, kv_heads, dim = 2, 19, 4, 2, 64
    cos, sin = angles(1, tokens, dim, dtype, device)
    fused = values(batch, tokens, heads + 2 * kv_heads, dim, dtype=dtype, device=device)
    q, k = fused[:, :, :heads], fused[:, :, heads : heads + kv_heads]
    for view in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        got = rope(view(q), view(k), cos, sin)
        assert torch.equal(got[0], rotate(q, cos, sin)) and torch.equal(got[1], rotate(k, cos, sin))
    scattered = values(batch, dim, tokens, heads, dtype=dtype, device=device).permute(0, 2, 3, 1)
    assert torch.equal(rope(scattered, k, cos, sin)[0], rotate(scattered, cos, sin))
    one = fused[:1, :1, :1].expand(batch, tokens, heads, dim)
    assert torch.equal(rope(one, k, cos, sin)[0], rotate(one, cos, sin))


def test_gradients_of_other_strides(device):
    q = values(2, 9, 4, 64, dtype=torch.float32, device=device).requires_grad_()
    k = values(2, 9, 2, 64, dtype=torch.float32, device=device).requires_grad_()
    cos, sin = angles(1, 9, 64, torch.float32, device)
    grad = values(2, 4, 9, 64, dtype=torch.float32, device=device).transpose(1, 2)
    rope(q, k, cos, sin)[0].backward(grad)
    twin = q.detach().requires_grad_()
    rotate(twin, cos, sin).backward(grad)
    assert torch.equal(q.grad, twin.grad)
    assert k.grad is None or not k.grad.any()


def test_second_derivatives(device):
    def second(turn):
        q = values(1, 3, 2, 8, dtype=torch.float32, device=device).requires_grad_()
        k = values(1, 3, 1, 8, dtype=torch.float32, device=device, seed=1).requires_grad_()
        loss = sum(x.pow(3).sum() for x in turn(q, k)) + q.square().sum() * k.square().sum()
        grads = torch.autograd.grad(loss, [q, k], create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), [q, k])

    cos, sin = angles(1, 3, 8, torch.float32, device)
    ours = second(lambda q, k: rope(q, k, cos, sin))
    torch.testing.assert_close(
        ours, second(lambda q, k: (rotate(q, cos, sin), rotate(k, cos, sin)))
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_of_torch_see_its_own_arithmetic():
    q, k = (values(4, 1, 3, 2, 8, dtype=torch.float32, device="cpu", seed=s) for s in (0, 1))
    cos, sin = angles(1, 3, 8, torch.float32, "cpu")
    together = torch.vmap(lambda q, k: rope(q, k, cos, sin)[0])(q, k)
    assert torch.equal(
        together, torch.stack([rope(*pair, cos, sin)[0] for pair in zip(q, k, strict=True)])
    )
    _, tangent = torch.func.jvp(lambda q: rope(q, k[0], cos, sin)[0], (q[0],), (q[1],))
    torch.testing.assert_close(tangent, rotate(q[1], cos, sin))


def test_no_tokens_and_nan(device):
    cos, sin = angles(1, 0, 64, torch.float32, device)
    q = torch.empty(2, 0, 4, 64, device=device)
    assert [x.shape for x in rope(q, q, cos, sin)] == [q.shape, q.shape]
    q = torch.ones(1, 2, 1, 64, device=device)
    q[0, 0, 0, 5] = float("nan")
    out = rope(q, q, *angles(1, 2, 64, torch.float32, device))[0]
    assert out.isnan().nonzero()[:, 3].tolist() == [5, 37]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inverse", [False, True])
def test_the_plain_loop(dtype, inverse):
    q = values(2, 5, 4, 10, dtype=dtype, device="cpu").transpose(0, 1)
    k = values(5, 2, 1, 10, dtype=dtype, device="cpu", seed=1)
    cos, sin = angles(5, 2, 10, dtype, "cpu")
    outs = torch.empty(5, 2, 4, 10, dtype=dtype), torch.empty_like(k)
    _core.rope(q, k, cos, sin, inverse, *outs)
    sin = -sin if inverse else sin
    assert torch.equal(outs[0], rotate(q, cos, sin)) and torch.equal(outs[1], rotate(k, cos, sin))


def test_misfits_are_named():
    x, angle = torch.ones(1, 2, 3, 8), torch.ones(1, 2, 1, 8)

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        _core.rope(q, k, cos, sin, False, torch.empty(q.shape), torch.empty(k.shape))

    with pytest.raises(ValueError, match="cos must have 16 elements"):
        rotated(x, x, torch.ones(1, 3, 1, 8), angle)
    with pytest.raises(ValueError, match="k must have the batch, tokens and head_dim of q"):
        rotated(x, torch.ones(1, 2, 3, 4), angle, angle)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        rotated(x[0], x, angle, angle)
    with pytest.raises(ValueError, match="head_dim must be even, got 7"):
        rotated(x[..., :7], x[..., :7], angle[..., :7].contiguous(), angle[..., :7].contiguous())
    with pytest.raises(ValueError, match="sin must have dtype float32, got bfloat16"):
        rotated(x, x, angle, angle.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [1, 4, 8])
def test_unaligned_and_inside_bounds(shift):
    batch, tokens, heads, dim = 1, 7, 5, 128
    n = tokens * heads * dim
    q = values(batch, tokens, heads, dim, dtype=torch.bfloat16, device="cuda")
    cos, sin = angles(1, tokens, dim, torch.bfloat16, "cuda")
    home = torch.empty(n + shift, dtype=torch.bfloat16, device="cuda")
    moved = home[shift:].copy_(q.flatten()).view(q.shape)
    around = torch.full((n + 64,), 7.0, dtype=torch.bfloat16, device="cuda")
    out = around[16 + shift : 16 + shift + n].view(q.shape)
    _core.rope(moved, q, cos, sin, False, out, torch.empty_like(q))
    assert torch.equal(out, rotate(q, cos, sin))
    assert bool((around[: 16 + shift] == 7).all()) and bool((around[16 + shift + n :] == 7).all())
