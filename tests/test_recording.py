"""record: what a replay computes against the same work done eagerly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from halfbyte import Linear4bit, quantize_4bit
from halfbyte.capture import Captured, Pool
from halfbyte.ops import gemm_4bit
from halfbyte.recording import record

CPU = torch.device("cpu")


def block(k: int, n: int) -> tuple[Linear4bit, Linear4bit]:
    up, down = Linear4bit(k, n), Linear4bit(n, k, bias=False)
    return up.quantize_(torch.randn(n, k)), down.quantize_(torch.randn(k, n))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_replay_has_the_bits_of_eager_work(rows, dtype):
    torch.manual_seed(0)
    up, down = block(192, 320)
    scale = torch.rand(192).to(dtype)

    def work(x: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(up(x * scale))
        low, high = hidden.chunk(2, dim=-1)
        hidden = torch.cat((high, low), -1)
        x = x + down(hidden)
        return x.view(-1)[: 192 * rows].reshape(rows, 192).t().contiguous()

    x = torch.randn(rows, 192).to(dtype)
    recording, y = record(lambda: work(x))
    assert torch.equal(y, work(x))
    for _ in range(3):
        x.copy_(torch.randn(rows, 192))
        recording.replay()
        assert torch.equal(y, work(x))


@torch.inference_mode()
def test_state_that_is_updated_in_place_goes_on():
    position, tokens = torch.zeros(2, dtype=torch.int64), torch.zeros(9, 2)

    def work() -> Tensor:
        tokens.index_put_((position[:1],), torch.ones(()) * position[0])
        position.add_(1)
        return tokens.sum(0)

    recording, total = record(work)
    for _ in range(3):
        recording.replay()
    assert position.tolist() == [4, 4]
    assert tokens[:, 0].tolist() == [0, 1, 2, 3, 0, 0, 0, 0, 0]
    assert total.tolist() == [6, 6]


@torch.inference_mode()
def test_tensors_of_the_first_run_are_kept():
    packed, state = quantize_4bit(torch.randn(64, 128))
    x = torch.randn(1, 128)
    recording, y = record(
        lambda: gemm_4bit(gemm_4bit(x, packed, state) @ torch.ones(64, 128), packed, state)
    )
    expected = y.clone()
    packed, state = None, None
    garbage = [torch.full((64, 64), float("nan")) for _ in range(64)]
    y.zero_()
    recording.replay()
    assert len(garbage) == 64 and torch.equal(y, expected)


@torch.inference_mode()
def test_several_results_and_random_numbers():
    x = torch.randn(4, 10)
    recording, (values, places) = record(lambda: x.topk(3))
    x.copy_(torch.randn(4, 10))
    recording.replay()
    assert torch.equal(values, x.topk(3).values) and torch.equal(places, x.topk(3).indices)
    recording, noise = record(lambda: torch.rand(8))
    before = noise.clone()
    recording.replay()
    assert not torch.equal(noise, before)


@torch.inference_mode()
def test_a_value_read_on_the_host_is_named():
    x = torch.ones(3)
    with pytest.raises(
        RuntimeError, match=r"record: aten\.item\.default: expected tensors only, got float"
    ):
        record(lambda: x.sum().item())
    recording, y = record(lambda: x + 1)
    recording.replay()
    assert y.tolist() == [2, 2, 2]


@torch.inference_mode()
def test_an_error_ends_the_recording():
    packed, state = quantize_4bit(torch.randn(64, 128))
    with pytest.raises(ValueError, match="expected"):
        record(lambda: gemm_4bit(torch.ones(1, 64), packed, state))
    assert torch.isfinite(gemm_4bit(torch.ones(1, 128), packed, state)).all()
    recording, _ = record(lambda: None)
    assert recording._steps == []


@torch.inference_mode()
def test_who_captures_has_called_before_on_the_same_thread():
    x, calls = torch.ones(3), []
    captured = Captured(lambda: (calls.append(1), x + 1)[1], CPU, Pool(CPU))
    assert torch.equal(captured(), x + 1)

    def elsewhere() -> bool:
        with torch.inference_mode():
            assert torch.equal(captured(), x + 1)
        return captured.captured is not None

    with ThreadPoolExecutor(1) as pool:
        assert not pool.submit(elsewhere).result()
        assert pool.submit(elsewhere).result()
    x.fill_(5)
    assert torch.equal(captured(), x + 1) and len(calls) == 3, "a replay by now"
