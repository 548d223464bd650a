"""Chunked cross entropy against torch's whole one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

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
