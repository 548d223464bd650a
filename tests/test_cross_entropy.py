"""Chunked cross entropy against torch's whole one."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte import _core
from halfbyte.ops import cross_entropy


def case(device, tokens=37, width=16, vocab=101):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(device).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=generator).to(device)
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk", [1, 7, 37, 1000, None])
def test_loss_and_gradients_equal_torch(device, chunk):
    hidden, weight, labels = case(device)
    loss = cross_entropy(hidden, weight, labels, chunk=chunk)
    loss.backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    expected = F.cross_entropy(hidden @ weight.t(), labels)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours[0], hidden.grad)
    torch.testing.assert_close(ours[1], weight.grad)


def test_num_items_is_the_divisor(device):
    hidden, weight, labels = case(device)
    total = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    torch.testing.assert_close(cross_entropy(hidden, weight, labels, num_items=128), total / 128)


def test_all_masked_is_zero_and_masked_rows_do_not_leak(device):
    hidden, weight, labels = case(device)
    loss = cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and hidden.grad.abs().max() == 0
    with torch.no_grad():
        hidden[0] = float("inf")
    hidden.grad = None
    loss = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all()


def test_frozen_head_costs_no_weight_gradient(device):
    hidden, weight, labels = case(device)
    cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None and weight.grad is None


def test_bf16(device):
    hidden, weight, labels = case(device)
    low = cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, cross_entropy(hidden, weight, labels), rtol=2e-2, atol=2e-2)


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"labels: expected \[4\], got \[5\]"):
        cross_entropy(torch.ones(4, 8), torch.ones(9, 8), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"hidden: expected \[T, 8\]"):
        cross_entropy(torch.ones(4, 7), torch.ones(9, 8), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("label", [-1, 101, -(2**40), 2**40])
def test_labels_that_are_no_token_are_refused(label):
    hidden, weight, labels = case("cpu")
    labels[3] = label
    with pytest.raises(ValueError, match=rf"labels: expected -100 or 0 to 100, got {label}"):
        cross_entropy(hidden, weight, labels)


@pytest.mark.parametrize("num_items", [0, -3, torch.tensor(0), float("nan")])
def test_num_items_that_divide_nothing_are_refused(num_items):
    with pytest.raises(ValueError, match="num_items: expected > 0, got"):
        cross_entropy(*case("cpu"), num_items=num_items)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("wrong", [dict(label=-1), dict(label=101), dict(num_items=0)])
def test_on_a_gpu_what_is_out_of_range_makes_loss_and_gradients_nan(wrong):
    hidden, weight, labels = case("cuda")
    labels[3] = wrong.get("label", 3)
    items = torch.full((), wrong.get("num_items", 7), device="cuda")
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = cross_entropy(hidden, weight, labels, num_items=items)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss.backward()
    assert loss.isnan() and hidden.grad.isnan().any() and weight.grad.isnan().any()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch 2.11 makes one itself while it traces an autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_what_is_out_of_range_makes_the_loss_nan(fresh_dynamo):
    hidden, weight, labels = case("cpu")
    compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(hidden, weight, labels), cross_entropy(hidden, weight, labels)
    )
    assert compiled(hidden, weight, labels.clamp(min=-1)).isnan()
    assert compiled(hidden, weight, labels, num_items=torch.tensor(0)).isnan()


class LargestFloat32(TorchDispatchMode):
    """Watches every tensor that is made and remembers the elements of the largest in fp32."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
                self.elements = max(self.elements, made.numel())
        return result


def test_logits_are_never_whole_in_fp32(monkeypatch):
    """512 tokens of a vocabulary of 1000, in pieces of 64 KiB or of a tenth of the tokens."""
    module = importlib.import_module("halfbyte.ops.cross_entropy")
    monkeypatch.setattr(module, "CHUNK_BYTES", 64 << 10)
    hidden, weight, labels = case("cpu", tokens=512, vocab=1000)
    frozen = weight.detach().bfloat16()
    low = hidden.detach().bfloat16().requires_grad_()
    # The operation is one to whoever watches from outside: its parts are watched instead.
    monkeypatch.setattr(torch.ops.halfbyte, "cross_entropy", module._loss)
    with LargestFloat32() as largest:
        cross_entropy(low, frozen, labels).backward()
    assert 16 * 1000 <= largest.elements <= 512 * 1000 // 10
    with LargestFloat32() as largest:
        F.cross_entropy((low @ frozen.t()).float(), labels)
    assert largest.elements == 512 * 1000, "the measure sees whole logits"


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 50_257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_against_fp64(vocab, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(300, 64, generator=generator)).to("cuda", dtype).requires_grad_()
    weight = (torch.randn(vocab, 64, generator=generator) / 4).to("cuda", dtype).requires_grad_()
    labels = torch.randint(vocab, (300,), generator=generator).cuda()
    labels[::7] = -100
    loss = cross_entropy(hidden, weight, labels, chunk=128)
    loss.backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].t(), labels)
    expected.backward()
    eps = torch.finfo(dtype).eps
    assert abs(loss.item() - expected.item()) <= max(eps, 1e-6) * expected.item()
    for ours, theirs in ((hidden, exact[0]), (weight, exact[1])):
        off = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert off <= max(2 * eps, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab, stride", [(1, 8), (7, 7), (8192, 8192), (50_257, 50_264), (9, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_equals_the_plain_loop(vocab, stride, dtype):
    logits = torch.randn(9, stride, generator=torch.Generator().manual_seed(1)) * 5
    logits[2, : vocab // 2] = float("-inf")
    logits[3, 0], logits[4, vocab - 1] = float("nan"), float("inf")
    labels = torch.tensor([0, vocab - 1, vocab - 1, 0, 0, -1, vocab, vocab // 2, 0]).int()
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(dtype).to(device, copy=True)
        losses, logsumexps = torch.empty(2, 9, device=device)
        _core.cross_entropy(x, labels.to(device), losses, logsumexps, vocab)
        assert torch.equal(x.cpu().nan_to_num(7), logits.to(dtype).nan_to_num(7)), "only read"
        again = torch.empty_like(losses)
        divisor = torch.full((1,), 0.5, device=device)
        _core.cross_entropy(x, labels.to(device), again, logsumexps, vocab, divisor)
        assert torch.equal(losses.nan_to_num(7), again.nan_to_num(7))
        assert torch.equal(x[:, vocab:].cpu(), logits.to(dtype)[:, vocab:])
        results.append((losses.cpu(), x[:, :vocab].cpu()))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-6, atol=2e-6, equal_nan=True)
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(
        results[1][1], results[0][1], rtol=tolerance, atol=1e-6, equal_nan=True
    )
    assert bool((results[1][1][[5, 6]] == 0).all()) and results[1][0][5] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("first, width, stride", [(0, 8, 8), (7, 7, 7), (100, 4099, 4104)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_of_some_columns_equals_the_plain_loop(first, width, stride, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(9, stride, generator=generator) * 5).to(dtype)
    labels = torch.tensor([0, first, first + width - 1, first + width, -1, 7, 8, 200, -1]).int()
    logsumexps, divisor = logits.float().logsumexp(1) + 0.5, torch.full((1,), 3.0)
    logits[4], logsumexps[4] = float("nan"), float("inf")
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device, copy=True)
        rest = labels.to(device), logsumexps.to(device), divisor.to(device)
        _core.cross_entropy_backward(x, *rest, first, width)
        assert torch.equal(x[[0, 1], width:].cpu(), logits[[0, 1], width:])
        results.append(x[:, :width].cpu())
    tolerance = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=1e-6)
    assert not results[1][[4, 8]].any()


@pytest.mark.parametrize("width", [1, 30, 101, 500])
def test_columns_at_a_time_make_the_same_gradient(device, width, monkeypatch):
    module = importlib.import_module("halfbyte.ops.cross_entropy")
    monkeypatch.setattr(module, "WIDEST", width)
    hidden, weight, labels = case(device)
    (2 * cross_entropy(hidden, weight, labels)).backward()
    (exact,) = torch.autograd.grad(2 * F.cross_entropy(hidden @ weight.t(), labels), weight)
    torch.testing.assert_close(weight.grad, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
def test_memory_is_a_tenth_of_the_logits(trained):
    tokens, width, vocab = 4096, 256, 32_000
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16, requires_grad=trained)
    labels = torch.randint(vocab, (tokens,), device="cuda")
    cross_entropy(hidden, weight, labels).backward()
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    cross_entropy(hidden, weight, labels).backward()
    gradients = 2 * hidden.nbytes + (weight.nbytes if trained else 0)
    peak = torch.cuda.max_memory_allocated() - before - gradients
    assert peak <= 0.1 * 4 * tokens * vocab
