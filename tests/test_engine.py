"""The engine: batches of anything, limits, cancels, threads and tasks."""

from __future__ import annotations

import asyncio
import copy
import gc
import random
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from engines import (
    all_at_once,
    base_model,
    budget,
    four_bit_model,
    fully_free,
    gpu_work,
    requests_of,
    slowed,
)
from test_generate import byte_tokenizer, tiny  # noqa: F401
from tiny import tiny_folder

import halfbyte
from halfbyte import Engine, LoraConfig, Sampling, lora, optim
from halfbyte.capture import Captured
from halfbyte.engine import eos_ids
from halfbyte.errors import ContextLengthError, QueueFullError

FORKED = """
import asyncio, os, time, torch, halfbyte
engine = halfbyte.Engine(halfbyte.load("{base}", progress=False))

def reply():
    awaited = asyncio.wait_for(engine.agenerate([1, 2], max_new_tokens=5), 30)
    return asyncio.run(awaited).token_ids

expected = reply()
while engine._work.is_set():  # its thread has yet to find that nothing is left to do
    time.sleep(0.01)
time.sleep(0.1)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if reply() == expected else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def model(byte_tokenizer):  # noqa: F811
    return base_model(byte_tokenizer)


def test_any_mix_equals_each_alone(model):
    rng = random.Random(1)
    work = requests_of(rng, 40)
    engine = Engine(model, max_batch=8)
    requests = [engine.submit(prompt, sampling) for prompt, sampling in work]
    engine.run(requests)
    for (prompt, sampling), request in zip(work, requests, strict=True):
        alone = Engine(model, max_batch=1).generate(prompt, sampling)
        assert request.reply.tokens == alone.token_ids
        assert request.reply.finish_reason == alone.finish_reason
        assert request.reply.text.given == alone.text
        assert [e.token for e in request.reply.logprobs] == [e.token for e in alone.logprobs]
    assert fully_free(engine)


def test_text_and_lists_are_prompts(model):
    engine = Engine(model, max_batch=4)
    one = engine.generate("héllo", max_new_tokens=5)
    ids = list("héllo".encode())
    assert one == engine.generate(ids, max_new_tokens=5)
    assert engine.generate(["héllo", "x"], max_new_tokens=5)[0] == one
    assert engine.generate(torch.tensor([ids, ids]), max_new_tokens=5) == [one, one]
    assert one.usage == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}
    assert one.text == model.tokenizer.decode(one.token_ids)
    assert engine.generate([]) == asyncio.run(engine.agenerate([])) == []
    assert engine.generate([[]], max_new_tokens=5) == [engine.generate("", max_new_tokens=5)]


def fresh_tokens(model) -> list[int]:
    return Engine(model, max_batch=1).generate([5] * 40, max_new_tokens=20).token_ids


def test_a_model_in_training_is_sampled_between_steps(device):
    """Each sample is that of a new engine: no reload, no copy, nothing left of older weights."""
    model = tiny(max_position_embeddings=256).to(device)
    lora.inject(model, LoraConfig(r=4), torch.Generator().manual_seed(0))
    optimizer = optim.AdamW(lora.adapter_parameters(model), lr=0.05)
    engine = Engine(model, max_batch=2)
    samples = [engine.generate([5] * 40, max_new_tokens=20).token_ids]
    batch = torch.arange(32, device=device).reshape(2, 16)
    model.train()
    for _ in range(4):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.refresh()
        samples.append(engine.generate([5] * 40, max_new_tokens=20).token_ids)
        assert samples[-1] == fresh_tokens(model) and model.training
    assert len(set(map(tuple, samples))) == 5, "every step shows"
    assert not engine.stale


def test_a_callers_autocast_chooses_no_tokens(model):
    engine = Engine(model, max_batch=2)
    expected = engine.generate(["one", "two"], max_new_tokens=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert engine.generate(["one", "two"], max_new_tokens=9) == expected


def moved(model, _) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.7


def injected(model, device) -> None:
    lora.inject(model, LoraConfig(r=4), torch.Generator().manual_seed(0))
    for parameter in lora.adapter_parameters(model):
        parameter.data.copy_(torch.randn(parameter.shape).to(device))


def merged(model, device) -> None:
    injected(model, device)
    lora.merge(model, torch.float32)


@pytest.mark.parametrize("change", [moved, injected, merged])
def test_a_model_whose_weights_moved(change, device):
    torch.manual_seed(0)
    model = tiny(max_position_embeddings=256).to(device)
    engine = Engine(model, max_batch=2)
    before = [engine.generate([5] * 40, max_new_tokens=20).token_ids for _ in range(2)]
    change(model, device)
    assert engine.stale
    with pytest.raises(RuntimeError, match="weights were moved .* engine.refresh()"):
        engine.generate([5] * 40)
    for _ in range(2):
        engine.refresh()
        got = engine.generate([5] * 40, max_new_tokens=20).token_ids
        assert got == fresh_tokens(model) != before[0] == before[1]


def test_a_model_that_was_given_another_dtype():
    model = tiny(max_position_embeddings=256)
    engine = Engine(model, max_batch=1)
    before = model.generate([1, 2, 3], max_new_tokens=5)
    model.double()
    with pytest.raises(ValueError, match=r"refresh: expected the model on cpu in torch.float32"):
        engine.refresh()
    model.float()
    engine.refresh()
    assert engine.generate([1, 2, 3], max_new_tokens=5).token_ids == before
    assert model.bfloat16().generate([1, 2, 3], max_new_tokens=5), "it makes an engine of its own"


@pytest.mark.slow
def test_what_was_trained_is_what_is_served(shared, tmp_path, device):
    """200 greedy tokens, in the model itself and by name over its base, are the forward's."""
    path = shared / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    base = halfbyte.load(path, device=device, dtype=torch.float32, progress=False)
    model = lora.inject(copy.deepcopy(base), LoraConfig(r=8), torch.Generator().manual_seed(0))
    optimizer = optim.AdamW(lora.adapter_parameters(model), lr=2e-3)
    ids = model.tokenizer.encode(
        "Half a byte is a nibble, and a nibble holds one of sixteen values."
    )
    prompt = model.tokenizer.encode("Half a byte is")
    untrained = Engine(model, max_batch=1).generate(prompt, max_new_tokens=20).token_ids
    model.train()
    batch = torch.tensor([ids], device=device)
    for _ in range(4):
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sampling = Sampling(max_new_tokens=200, logit_bias={i: -1e4 for i in eos_ids(model)})
    served = Engine(model, max_batch=1).generate(prompt, sampling).token_ids
    assert len(served) == 200 and served[:20] != untrained
    # The training forward itself: in training mode, with gradients.
    whole = torch.tensor([[*prompt, *served]], device=device)
    logits = model(whole).logits[0, len(prompt) - 1 : -1]
    assert logits.requires_grad
    logits[:, sorted(eos_ids(model))] -= 1e4
    assert logits.argmax(-1).tolist() == served
    lora.save_adapter(model, tmp_path / "adapter")
    named = Engine(base, {"mine": tmp_path / "adapter"}, max_batch=2)
    both = [named.submit(prompt, sampling, name) for name in ("mine", None)]
    named.run(both)
    assert both[0].reply.tokens == served != both[1].reply.tokens


# --- limits and ends -------------------------------------------------------------------------


def test_what_no_cache_could_hold_is_refused(model):
    engine = Engine(model, max_batch=2, kv_budget=budget(model, 5))
    with pytest.raises(ContextLengthError, match="50 tokens and up to 100 new ones .* 80 tokens"):
        engine.generate([1] * 50, max_new_tokens=100)
    with pytest.raises(ContextLengthError, match="at most 256 tokens .*, got 300"):
        engine.generate([1] * 300)
    with pytest.raises(ValueError, match="max_batch: expected 1 to 32, got 33"):
        Engine(model, max_batch=33)
    with pytest.raises(ValueError, match="kv_budget: expected at least"):
        Engine(model, kv_budget=10)


def test_a_least_length_that_no_number_of_the_device_holds(model):
    engine = Engine(model, max_batch=2)
    other = engine.submit([9], Sampling(max_new_tokens=50))
    engine._advance_once()
    endless = engine.generate([1], max_new_tokens=30, min_new_tokens=1 << 31)
    assert len(endless.token_ids) == 30 and other.reply.finish_reason is None
    every = tuple(range(model.config.vocab_size))
    assert engine.generate([1], stop_ids=every).finish_reason == "stop"
    with pytest.raises(ValueError, match="stop_ids: expected an id that ends no reply, beside min"):
        engine.generate([1], stop_ids=every, min_new_tokens=1)
    engine.run([other])
    assert other.reply.finish_reason == "length" and fully_free(engine)


def test_a_batch_with_a_prompt_that_is_refused_leaves_nothing_behind(model):
    engine = Engine(model, max_batch=2)
    for call in (engine.generate, lambda *a, **o: asyncio.run(engine.agenerate(*a, **o))):
        with pytest.raises(ContextLengthError):
            call([[1], [2], [3] * 300], max_new_tokens=200)
        assert len(engine.generate([1], max_new_tokens=2).token_ids) == 2
        assert fully_free(engine)


def test_a_batch_that_finds_the_queue_full_does_not_fill_it(model):
    engine = Engine(model, max_batch=2, max_waiting=2)
    for _ in range(3):
        with pytest.raises(QueueFullError):
            engine.generate([[1], [2], [3]])
        assert engine.stats.waiting_requests == 0
    assert len(engine.generate([[1], [2]], max_new_tokens=2)) == 2


def test_a_batch_awaited_is_that_of_generate(model):
    engine = Engine(model, max_batch=2)
    prompts = [[1, 2], [3], [4, 5, 6]]
    expected = [c.token_ids for c in engine.generate(prompts, max_new_tokens=6)]
    got = asyncio.run(engine.agenerate(prompts, max_new_tokens=6))
    assert [c.token_ids for c in got] == expected
    assert asyncio.run(engine.agenerate(["ab"], max_new_tokens=3))[0].token_ids


def test_a_prompt_as_long_as_the_context_has_no_reply(model):
    engine = Engine(model, max_batch=1)
    got = engine.generate([1] * 256)
    assert got.token_ids == [] and got.finish_reason == "context" and got.text == ""
    assert len(engine.generate([1] * 255).token_ids) == 1


def test_cancelled_streams_give_back_what_they_held(model):
    engine = Engine(model, max_batch=2)
    streams = [engine.stream([i, 2], max_new_tokens=100) for i in range(4)]
    assert next(streams[0])
    waiting, running = streams[3], streams[0]
    waiting.close()
    running.close()
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    assert list(running) == [] and waiting.token_ids == []
    assert "".join(streams[1]) and "".join(streams[2])
    assert fully_free(engine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_a_batch_that_was_interrupted_leaves_nothing_behind(model, monkeypatch, error):
    engine = Engine(model, max_batch=4)
    advance, calls = engine._advance, []

    def interrupted(request) -> bool:
        calls.append(request)
        if len(calls) == 3:
            raise error
        return advance(request)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_advance", interrupted)
        with pytest.raises(error):
            engine.generate([[1], [2], [3]], max_new_tokens=200)
    engine.generate([4], max_new_tokens=1)
    assert fully_free(engine)


def test_a_forgotten_stream_is_cancelled(model):
    engine = Engine(model, max_batch=1)
    pieces = engine.stream([1, 2], max_new_tokens=200)
    next(pieces)
    del pieces
    gc.collect()
    assert engine.generate([3], max_new_tokens=2).finish_reason == "length"
    assert fully_free(engine)


# --- threads and tasks -----------------------------------------------------------------------


def test_threads_share_an_engine(model):
    engine = Engine(model, max_batch=4)
    prompts = [[i, i + 1, i + 2] for i in range(8)]
    got: dict[int, list[int]] = {}

    def work(i: int) -> None:
        got[i] = engine.generate(prompts[i], max_new_tokens=12).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    alone = [Engine(model, max_batch=1).generate(p, max_new_tokens=12).token_ids for p in prompts]
    assert [got[i] for i in range(8)] == alone and fully_free(engine)


def test_tasks_share_an_engine(model):
    engine = Engine(model, max_batch=4)

    async def text(i: int) -> str:
        return "".join([piece async for piece in engine.stream([i, i + 1], max_new_tokens=9)])

    async def main() -> list:
        return await asyncio.gather(
            *(text(i) for i in range(6)), engine.agenerate([50], max_new_tokens=4)
        )

    *texts, last = asyncio.run(main())
    assert texts == [engine.generate([i, i + 1], max_new_tokens=9).text for i in range(6)]
    assert last == engine.generate([50], max_new_tokens=4)


def test_a_cancelled_task_cancels_its_request(model):
    engine = Engine(model, max_batch=1)

    async def main() -> None:
        with slowed(engine, 0.01):
            task = asyncio.create_task(engine.agenerate([1], max_new_tokens=200))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async for _ in engine.stream([2], max_new_tokens=200):
            break
        done = await engine.agenerate([3], max_new_tokens=2)
        assert done.finish_reason == "length"

    asyncio.run(main())
    engine._advance_once()
    assert fully_free(engine)


def test_a_loop_that_ends_early_disturbs_no_one(model):
    engine = Engine(model, max_batch=2)
    loop = asyncio.new_event_loop()
    pieces = engine.stream([1], max_new_tokens=200).__aiter__()
    loop.run_until_complete(pieces.__anext__())
    loop.close()
    assert len(engine.generate([2], max_new_tokens=150).token_ids) == 150


def test_a_second_reader_of_a_stream_is_refused(model):
    async def main() -> list:
        stream = Engine(model, max_batch=1).stream([1], max_new_tokens=20)

        async def read() -> str:
            return "".join([piece async for piece in stream])

        readers = asyncio.gather(read(), read(), return_exceptions=True)
        return await asyncio.wait_for(readers, 30)

    text, error = asyncio.run(main())
    assert text == Engine(model, max_batch=1).generate([1], max_new_tokens=20).text
    assert isinstance(error, RuntimeError) and "one task" in str(error)


@pytest.mark.skipif(sys.platform != "linux", reason="os.fork is not safe elsewhere")
def test_a_forked_engine_has_a_thread_of_its_own(tmp_path):
    tiny_folder(tmp_path / "base")
    program = FORKED.format(base=tmp_path / "base")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "0\n", run.stderr


def test_an_engine_and_its_thread_end_with_their_last_user(model):
    engine = Engine(model, max_batch=1)
    asyncio.run(engine.agenerate([1], max_new_tokens=2))
    thread, gone = engine._driver, weakref.ref(engine)
    del engine
    thread.join(10)
    gc.collect()
    assert not thread.is_alive() and gone() is None


def test_generate_keeps_no_model_alive(tmp_path):
    model = halfbyte.load(tiny_folder(tmp_path), device="cpu", dtype=torch.float32)
    expected = model.generate([5, 6, 7], max_new_tokens=4)
    assert model.generate([5, 6, 7], max_new_tokens=4) == expected
    pieces = halfbyte.stream(model, [5, 6, 7], max_new_tokens=4)
    gone = weakref.ref(model)
    del model
    assert "".join(pieces) is not None and pieces.token_ids == expected
    del pieces
    gc.collect()
    assert gone() is None


# --- on a GPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_model(byte_tokenizer):  # noqa: F811
    return four_bit_model(byte_tokenizer)


@pytest.mark.gpu
def test_gpu_graph_equals_eager(gpu_model, monkeypatch):
    captured = Engine(gpu_model, max_batch=8)
    expected = all_at_once(captured, gpu_work())
    steps = captured._scheduler.decode.forwards.values()
    assert sum(step.captured is not None for step in steps) >= 3
    forwards = captured._scheduler.prefill.forwards.values()
    assert sum(forward.captured is not None for forward in forwards) >= 3

    monkeypatch.setattr(Captured, "__call__", lambda captured: captured.work())
    assert all_at_once(Engine(gpu_model, max_batch=8), gpu_work()) == expected


@pytest.mark.gpu
def test_gpu_threads_capture_what_another_one_called(gpu_model):
    """A step is called on this thread, then by the engine's own, which never computed before."""
    engine = Engine(gpu_model, max_batch=2)
    expected = engine.generate([1, 2, 3], max_new_tokens=2).token_ids
    got = asyncio.run(engine.agenerate([1, 2, 3], max_new_tokens=40)).token_ids
    steps = engine._scheduler.decode.forwards.values()
    assert got[:2] == expected and any(step.captured for step in steps)


@pytest.mark.gpu
def test_gpu_any_mix_equals_each_alone(gpu_model):
    expected = [
        Engine(gpu_model, max_batch=1).generate(prompt, sampling).token_ids
        for prompt, sampling in gpu_work()
    ]
    engine = Engine(gpu_model, max_batch=16)
    assert all_at_once(engine, gpu_work()) == expected
    assert fully_free(engine)
