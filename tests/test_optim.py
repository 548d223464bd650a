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


def test_parameters_that_cannot_train_are_refused():
    weights = [torch.nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)]
    with pytest.raises(ValueError, match="got torch.uint8 .* Hint: lora.adapter_parameters"):
        AdamW(weights)


def test_a_copy_that_would_lose_the_state_is_refused():
    optimizer, _, _ = trained("fp32")
    with pytest.raises(TypeError, match="saved by its state_dict"):
        copy.deepcopy(optimizer)


def trained(state, n=(8192, 77), dtype=torch.float32):
    """An optimizer after three steps, with its parameters and two more gradients."""
    params, grads = problem("cpu", n=n, dtype=dtype)
    optimizer = AdamW(params, 1e-2, state=state)
    run(optimizer, params, grads[:3])
    return optimizer, params, grads[3:]


def copies(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def test_torchs_optimizer_goes_on_from_our_state_and_back():
    optimizer, params, grads = trained("fp32")
    theirs = copies(params)
    torchs = torch.optim.AdamW(theirs, 1e-2, weight_decay=0.0)
    torchs.load_state_dict(optimizer.export("torch"))
    back = copies(params)
    returned = AdamW(back, 1e-2)
    returned.load_state_dict(copy.deepcopy(torchs.state_dict()))
    expected = run(torchs, theirs, grads)
    for a, b, c in zip(
        run(optimizer, params, grads), expected, run(returned, back, grads), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
        assert torch.equal(a, c)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_bitsandbytes_state_is_taken_over_to_the_bit(state):
    bnb = pytest.importorskip("bitsandbytes")
    optimizer, params, grads = trained(state)
    theirs = (bnb.optim.AdamW8bit if state == "8bit" else bnb.optim.AdamW32bit)(copies(params))
    theirs.load_state_dict(optimizer.export("bitsandbytes"))
    back = copies(params)
    returned = AdamW(back, 1e-2, state=state)
    # Newer versions of bitsandbytes wrap the tensors of an 8-bit state.
    returned.load_state_dict(theirs.state_dict())
    ours, again = optimizer.state_dict()["state"], returned.state_dict()["state"]
    for number, one in ours.items():
        assert all(torch.equal(one[name], again[number][name]) for name in one if name != "step")
    for a, b in zip(run(optimizer, params, grads), run(returned, back, grads), strict=True):
        assert torch.equal(a, b)


def moments(state_dict, params):
    """(exp_avg, exp_avg_sq) of every parameter in fp32, whoever wrote the 8-bit states."""
    optimizer = AdamW(copies(params), state="8bit")
    optimizer.load_state_dict(state_dict)
    states = optimizer.export("torch")["state"].values()
    return [(state["exp_avg"], state["exp_avg_sq"]) for state in states]


def test_bitsandbytes_makes_the_same_8bit_steps():
    bnb = pytest.importorskip("bitsandbytes")
    theirs, grads = problem("cpu", n=((300, 77), (8192,)))
    reference = bnb.optim.AdamW8bit(theirs, lr=1e-2, weight_decay=0.1)
    run(reference, theirs, grads[:1])
    # From one state each time: where a moment lies between two codes both may be taken.
    for step in grads[1:]:
        ours = copies(theirs)
        optimizer = AdamW(ours, 1e-2, weight_decay=0.1, state="8bit")
        optimizer.load_state_dict(reference.state_dict())
        for a, b in zip(run(optimizer, ours, [step]), run(reference, theirs, [step]), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
        mine, other = (moments(of.state_dict(), theirs) for of in (optimizer, reference))
        for found, expected in zip(mine, other, strict=True):
            for a, b, widest in zip(found, expected, (0.0142, 0.0071), strict=True):
                assert (a - b).abs().max() <= widest * b.abs().max(), "one code at most"


def test_a_state_may_change_its_width():
    fine, params, grads = trained("fp32")
    for state in ("8bit", "fp32"):
        narrow = copies(params)
        optimizer = AdamW(narrow, 1e-2, state=state)
        optimizer.load_state_dict(fine.state_dict())
        moved = run(optimizer, narrow, grads)
    coarse = AdamW(copies(params), 1e-2)
    coarse.load_state_dict(trained("8bit")[0].state_dict())
    assert "exp_avg" in coarse.state_dict()["state"][0]
    for a, b in zip(run(fine, params, grads), moved, strict=True):
        assert torch.equal(a, b)


def test_states_that_do_not_fit_are_named():
    optimizer, params, _ = trained("fp32")
    with pytest.raises(ValueError, match="expected the state of 1 params, got 2"):
        AdamW(params[:1]).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="expected \\[100\\] for param 0"):
        AdamW(problem("cpu", n=(100, 77))[0]).load_state_dict(optimizer.state_dict())
    sgd = torch.optim.SGD(params, 0.1, momentum=0.9)
    for param in params:
        param.grad = torch.ones_like(param)
    sgd.step()
    with pytest.raises(ValueError, match="expected exp_avg and exp_avg_sq"):
        AdamW(params).load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match="export: layout"):
        optimizer.export("numpy")


def test_a_closure_and_a_grad_scaler_see_an_optimizer():
    params, _ = problem("cpu", n=(300,))
    optimizer = AdamW(params, 1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = params[0].detach().clone()
    scaler.scale((params[0] * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(params[0], before), "a step with infinite gradients is skipped"
