"""A GPU that is not torch's current one gives what device 0 gives, and device 0 stays current."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from engines import four_bit_model
from test_generate import byte_tokenizer  # noqa: F401
from torch import Tensor

from halfbyte import Engine
from halfbyte.ops import gemm_4bit, lora_4bit, quantize_4bit
from halfbyte.ops.gemv_4bit_fused import LowRank, Product, fuses, gemv_4bit_fused

pytestmark = pytest.mark.gpu

K = 1024


def floats(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(device, dtype)


def weight(device, n=512):
    return quantize_4bit(floats(device, n, K), double_quant=True)


def quantized(device, _):
    packed, state = weight(device)
    return [packed, state.absmax, state.nested.absmax]


def multiplied(device, _, rows):
    return [gemm_4bit(floats(device, rows, K), *weight(device))]


def fused(device, _):
    adapter = LowRank(floats(device, 8, K), floats(device, 512, 8), None, 0.5)
    products = [Product(*weight(device), None, adapter), Product(*weight(device), None, None)]
    x = floats(device, 3, K)
    return gemv_4bit_fused(x, products) if fuses(x, products) else []


def trained(device, _):
    x = floats(device, 40, K).requires_grad_()
    a, b = (floats(device, *shape, dtype=torch.float32) for shape in [(8, K), (512, 8)])
    (y,) = lora_4bit(x, [weight(device)], [a.requires_grad_()], [b.requires_grad_()], 0.5)
    y.float().square().sum().backward()
    return [y, x.grad, a.grad, b.grad]


def generated(device, tokenizer):
    engine = Engine(four_bit_model(tokenizer).to(device), max_batch=2)
    replies = engine.generate([[1, 2, 3], [4] * 40], max_new_tokens=20)
    engine.close()
    return [torch.tensor(reply.token_ids, device=device) for reply in replies]


WORK = {
    "quantize": quantized,
    "gemv": partial(multiplied, rows=2),
    "gemm": partial(multiplied, rows=40),
    "dequantized": partial(multiplied, rows=700),
    "fused": fused,
    "backward": trained,
    "engine": generated,
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_another_device_gives_the_same(work, byte_tokenizer):  # noqa: F811
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = work(torch.device("cuda:0"), byte_tokenizer)
    found = work(torch.device("cuda:1"), byte_tokenizer)
    assert torch.cuda.current_device() == 0
    for ours, want in zip(found, expected, strict=True):
        assert ours.get_device() == 1 and torch.equal(ours.cpu(), want.cpu())
