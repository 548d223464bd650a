"""AdamW: torch's results in 32 bits, bitsandbytes' figures in 8 bits, state dicts, clipping."""

from __future__ import annotations

import copy

import pytest
import torch

from halfbyte.optim import AdamW


def problem(device, n=(300, 77), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in n]
    grads = [
        [torch.randn(p.shape, generator=generator).to(device, dtype) for p in params]
        for _ in range(5)
    ]
    return params, grads


def run(optimizer, params, grads):
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_fp32_state_equals_torch(device, weight_decay, clip):
    params, grads = problem(device)
    ours = run(AdamW(params, 1e-2, weight_decay=weight_decay, max_grad_norm=clip), params, grads)
    params, grads = problem(device)
    optimizer = torch.optim.AdamW(params, 1e-2, weight_decay=weight_decay)
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
    for a, b in zip(ours, params, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters(device, dtype):
    params, grads = problem(device, dtype=dtype)
    ours = run(AdamW(params, 1e-2), params, grads)
    reference = [torch.nn.Parameter(p.float()) for p in problem(device, dtype=dtype)[0]]
    expected = run(
        torch.optim.AdamW(reference, 1e-2, weight_decay=0.0), reference, grads_float(grads)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)


def grads_float(grads):
    return [[g.float() for g in step] for step in grads]


def test_8bit_figures_of_the_formats_reference(device):
    w = torch.nn.Parameter(torch.linspace(-1, 1, 8192).to(device))
    optimizer = AdamW([w], lr=1e-3, weight_decay=1e-2, state="8bit")
    for _ in range(3):
        w.grad = (0.01 * torch.sin(torch.arange(8192).float())).to(device)
        optimizer.step()
    expected = [-0.9999699592590332, -1.0027215480804443, -1.0024800300598145]
    assert w[:3].tolist() == pytest.approx(expected, abs=2e-7)


def test_8bit_follows_fp32(device):
    params, grads = problem(device, n=(8192,))
    start = params[0].detach().clone()
    coarse = run(AdamW(params, 1e-3, state="8bit"), params, grads)[0] - start
    params, grads = problem(device, n=(8192,))
    exact = run(AdamW(params, 1e-3), params, grads)[0] - start
    assert torch.nn.functional.cosine_similarity(coarse, exact, dim=0) > 0.99


def test_8bit_ignores_a_non_finite_gradient_element(device):
    w = torch.nn.Parameter(torch.ones(8192, device=device))
    optimizer = AdamW([w], lr=1e-2, state="8bit")
    w.grad = torch.ones(8192, device=device)
    w.grad[[5, 700]] = torch.tensor([float("nan"), float("inf")], device=device)
    optimizer.step()
    assert w[5] == 1 and w[700] == 1 and w[6] < 1
    assert torch.isfinite(w).all()


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_state_dict_resumes_to_the_bit(device, state, tmp_path):
    params, grads = problem(device, n=(8192, 77))
    straight = run(AdamW(params, 1e-2, state=state), params, grads)
    params, grads = problem(device, n=(8192, 77))
    first = AdamW(params, 1e-2, state=state)
    run(first, params, grads[:2])
    torch.save(copy.deepcopy(first.state_dict()), tmp_path / "optimizer.pt")
    second = AdamW(params, 1e-2, state=state)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for a, b in zip(straight, run(second, params, grads[2:]), strict=True):
        assert torch.equal(a, b)


def test_groups_schedulers_and_missing_gradients(device):
    params, _ = problem(device)
    optimizer = AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = params[1].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    schedule.step()
    assert torch.equal(params[1], before)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.005]


@pytest.mark.parametrize(
    "kwargs", [{"lr": -1}, {"state": "4bit"}, {"betas": (1.0, 0.9)}, {"max_grad_norm": 0}]
)
def test_bad_options(kwargs):
    with pytest.raises(ValueError, match=f"AdamW: {next(iter(kwargs))}"):
        AdamW([torch.nn.Parameter(torch.ones(2))], **kwargs)
