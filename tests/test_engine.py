"""The engine: batches of anything, prefixes, cancels, limits, threads and tasks."""

from __future__ import annotations

import asyncio
import copy
import gc
import random
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import byte_tokenizer, tiny  # noqa: F401
from tiny import tiny_folder

import halfbyte
from halfbyte import Engine, Linear4bit, LoraConfig, Sampling, lora
from halfbyte.capture import Captured
from halfbyte.errors import (
    AdapterNotFoundError,
    CheckpointError,
    ContextLengthError,
    QueueFullError,
)
from halfbyte.kv_cache import block_bytes
from halfbyte.prefill import CHUNK
from halfbyte.prefix_cache import PrefixCache
from halfbyte.scheduler import Scheduler


def budget(model, blocks: int) -> int:
    return blocks * block_bytes(model.config, model.model.embed_tokens.weight.dtype)


@pytest.fixture(scope="module")
def model(byte_tokenizer):  # noqa: F811
    made = tiny(max_position_embeddings=256)
    made.tokenizer = byte_tokenizer
    return made


def requests_of(rng: random.Random, count: int) -> list[tuple[list[int], Sampling]]:
    """Prompts and settings of every sort."""
    made = []
    for _ in range(count):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 15, 16, 17, 33, 60]))]
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            seed=rng.randrange(1000),
            max_new_tokens=rng.choice([1, 2, 7, 20]),
            stop=rng.choice([(), (), "a", ("\n", "é")]),
            logit_bias=rng.choice([{}, {}, {65: 3.0}]),
            logprobs=rng.choice([None, None, 2]),
        )
        made.append((prompt, sampling))
    return made


def fully_free(engine: Engine) -> bool:
    scheduler = engine._scheduler
    prefixes = scheduler.prefixes
    return not scheduler.busy and prefixes.available == prefixes.blocks == len(
        set(prefixes._free) | set(prefixes._unheld)
    )


# --- batches ---------------------------------------------------------------------------------


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


def test_long_prompts_are_read_in_chunks(byte_tokenizer):  # noqa: F811
    model = tiny(max_position_embeddings=2 * CHUNK + 100)
    rng = random.Random(2)
    prompt = [rng.randrange(256) for _ in range(2 * CHUNK + 50)]
    got = Engine(model, max_batch=2).generate(prompt, max_new_tokens=4).token_ids
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert got == ids[len(prompt) :]


def test_padded_chunks_equal_exact_ones():
    """What a GPU captures, forward by forward, on the CPU."""
    model = tiny(max_position_embeddings=1024)
    prompt = [n * 7 % 251 for n in range(700)]
    exact = model(torch.tensor([prompt])).logits[0]
    prefill = Engine(model, max_batch=1)._scheduler.prefill
    table = list(range(1, 46))
    with torch.inference_mode():
        start = 0
        for count in (5, 300, 16, 379):
            shape = prefill._fill(prompt[start : start + count], table, start)
            assert shape.size >= count and shape.cached in (0, 64, 512, 1024)
            start += count
            got = prefill._padded(shape)[0]
            assert (got - exact[start - 1]).abs().max() < 2e-4
    assert start == 700


def test_running_sequences_go_on_while_a_long_prompt_is_read():
    model = tiny(max_position_embeddings=4 * CHUNK)
    engine = Engine(model, max_batch=2)
    first = engine.submit([1, 2], Sampling(max_new_tokens=50))
    engine._advance_once()
    long = engine.submit([3] * (3 * CHUNK), Sampling(max_new_tokens=1))
    before = len(first.reply.tokens)
    for _ in range(3):
        engine._advance_once()
    assert long.prefilled >= 2 * CHUNK
    assert len(first.reply.tokens) >= before + 2


def test_a_model_in_training_is_sampled_between_steps(model):
    model = tiny(max_position_embeddings=256)
    lora.inject(model, LoraConfig(r=4), torch.Generator().manual_seed(0))
    engine = Engine(model, max_batch=2)
    before = engine.generate([5] * 40, max_new_tokens=8).token_ids
    for parameter in lora.adapter_parameters(model):
        parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    engine.refresh()
    after = engine.generate([5] * 40, max_new_tokens=8).token_ids
    assert (
        after == Engine(model, max_batch=1).generate([5] * 40, max_new_tokens=8).token_ids != before
    )
    assert not engine.stale
    lora.merge(model, torch.float32)
    assert engine.stale


# --- prefixes --------------------------------------------------------------------------------


def test_a_known_prefix_is_not_read_again(model):
    engine = Engine(model, max_batch=2)
    prompt = list(range(100))
    first = engine.generate(prompt, max_new_tokens=30)
    again = engine.submit(prompt, Sampling(max_new_tokens=30))
    engine.run([again])
    assert again.cached_tokens == 96 and again.reply.tokens == first.token_ids
    onward = prompt + first.token_ids + [7, 8, 9]
    turn = engine.submit(onward, Sampling(max_new_tokens=10))
    engine.run([turn])
    assert turn.cached_tokens == 128, "129 tokens were fed: the newest never is"
    assert (
        turn.reply.tokens
        == Engine(model, max_batch=1).generate(onward, max_new_tokens=10).token_ids
    )
    engine.refresh()
    fresh = engine.submit(prompt, Sampling(max_new_tokens=1))
    engine.run([fresh])
    assert fresh.cached_tokens == 0
    assert fully_free(engine)


def test_running_sequences_share_a_prefix(model):
    engine = Engine(model, max_batch=4, kv_budget=budget(model, 1 + 4 + 3 * 2))
    prompt = list(range(64))
    engine.generate(prompt, max_new_tokens=1)
    requests = [engine.submit(prompt + [i], Sampling(max_new_tokens=8)) for i in range(3)]
    engine._advance_once()
    engine._advance_once()
    assert [r.cached_tokens for r in requests[:2]] == [64, 64]
    engine.run(requests)
    for i, request in enumerate(requests):
        alone = Engine(model, max_batch=1).generate(prompt + [i], max_new_tokens=8)
        assert request.reply.tokens == alone.token_ids
    assert fully_free(engine)


def test_prefixes_left_by_old_weights_are_not_found(model):
    engine = Engine(model, max_batch=2)
    running = engine.submit(list(range(40)), Sampling(max_new_tokens=20))
    engine._advance_once()
    engine.refresh()
    engine.run([running])
    later = engine.submit(list(range(40)), Sampling(max_new_tokens=1))
    engine.run([later])
    assert later.cached_tokens == 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_blocks_are_never_lost_nor_given_twice(seed):
    rng = random.Random(seed)
    prefixes = PrefixCache(20)
    held: list[tuple[list[int], list[int]]] = []
    for _ in range(200):
        if rng.random() < 0.55:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 100))]
            shared = prefixes.match("root", tokens)
            own = prefixes.take(-(-len(tokens) // 16) - len(shared))
            if own is None:
                prefixes.release(shared)
                continue
            held.append((tokens, shared + own))
            owned = {block for _, blocks in held[:-1] for block in blocks}
            assert not owned & set(own) and len(set(own)) == len(own) and 0 not in own
        elif held:
            tokens, blocks = held.pop(rng.randrange(len(held)))
            prefixes.keep("root", tokens[: rng.randrange(len(tokens) + 1)], blocks)
            prefixes.release(blocks)
        in_use = {block for _, blocks in held for block in blocks}
        assert prefixes.held == len(in_use)
        assert not in_use & (set(prefixes._free) | set(prefixes._unheld))
    prefixes.clear()
    for _, blocks in held:
        prefixes.release(blocks)
    assert sorted(prefixes._free) == list(range(1, 20))


def test_prefixes_of_different_roots_stay_apart():
    prefixes = PrefixCache(10)
    blocks = prefixes.take(2)
    prefixes.keep("one", list(range(32)), blocks)
    assert prefixes.match("other", list(range(40))) == []
    assert prefixes.match("one", list(range(40))) == blocks
    assert prefixes.match("one", list(range(32))) == blocks[:1], "one token is left to compute"


# --- adapters --------------------------------------------------------------------------------


ADAPTERS = {
    "one": LoraConfig(r=4, lora_alpha=8),
    "two": LoraConfig(r=9, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    "head": LoraConfig(r=2, lora_alpha=16, use_rslora=True, target_modules=["lm_head", "v_proj"]),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, byte_tokenizer):  # noqa: F811
    """A base's folder-like maker, adapters over it, and a model that carries each."""
    folder = tmp_path_factory.mktemp("adapters")
    carriers = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        rng = torch.Generator().manual_seed(seed)
        made = lora.inject(base_model(byte_tokenizer), config, rng)
        for parameter in lora.adapter_parameters(made):
            parameter.data.normal_(0, 0.3, generator=rng)
        lora.save_adapter(made, folder / name)
        carriers[name] = made
    return {name: folder / name for name in ADAPTERS}, carriers


def base_model(tokenizer):
    made = tiny(max_position_embeddings=256)
    made.tokenizer = tokenizer
    return made


def test_rows_use_their_own_adapters(adapters, byte_tokenizer):  # noqa: F811
    folders, carriers = adapters
    engine = Engine(base_model(byte_tokenizer), adapters=folders, max_batch=6)
    prompts = [list(range(i, i + 40)) for i in range(8)]
    names = [None, *ADAPTERS, None, *ADAPTERS]
    options = Sampling(max_new_tokens=12, temperature=0.5, seed=4)
    requests = [engine.submit(p, options, n) for p, n in zip(prompts, names, strict=True)]
    engine.run(requests)
    carriers = {None: base_model(byte_tokenizer), **carriers}
    for prompt, name, request in zip(prompts, names, requests, strict=True):
        alone = Engine(carriers[name], max_batch=1).generate(prompt, options)
        assert request.reply.tokens == alone.token_ids, name
    assert fully_free(engine) and all(a.users == 0 for a in engine.adapters.values())


def test_a_prefix_belongs_to_its_adapter(adapters, byte_tokenizer):  # noqa: F811
    folders, carriers = adapters
    engine = Engine(base_model(byte_tokenizer), adapters=folders, max_batch=2)
    prompt = list(range(50))
    plain = engine.generate(prompt, max_new_tokens=8)
    adapted = engine.submit(prompt, Sampling(max_new_tokens=8), "one")
    engine.run([adapted])
    assert adapted.cached_tokens == 0
    alone = Engine(carriers["one"], max_batch=1).generate(prompt, max_new_tokens=8)
    assert adapted.reply.tokens == alone.token_ids != plain.token_ids
    again = engine.submit(prompt, Sampling(max_new_tokens=8), "one")
    engine.run([again])
    assert again.cached_tokens == 48 and again.reply.tokens == alone.token_ids


def test_adapters_come_and_go_while_requests_run(adapters, byte_tokenizer):  # noqa: F811
    folders, carriers = adapters
    engine = Engine(base_model(byte_tokenizer), max_batch=4)
    alone = {
        name: Engine(carrier, max_batch=1).generate([1, 2, 3], max_new_tokens=30).token_ids
        for name, carrier in carriers.items()
    }
    engine.load_adapter("a", folders["one"])
    first = engine.submit([1, 2, 3], Sampling(max_new_tokens=30), "a")
    for _ in range(4):
        engine._advance_once()
    generation = engine.load_adapter("a", folders["two"]).generation
    assert generation > first.adapter.generation
    second = engine.submit([1, 2, 3], Sampling(max_new_tokens=30), "a")
    engine.load_adapter("b", folders["head"])
    engine._advance_once()
    engine.unload_adapter("a")
    third = engine.submit([1, 2, 3], Sampling(max_new_tokens=30), "b")
    with pytest.raises(AdapterNotFoundError, match="a: no such adapter is loaded; there is: b"):
        engine.submit([1, 2, 3], Sampling(), "a")
    engine.run([first, second, third])
    assert first.reply.tokens == alone["one"]
    assert second.reply.tokens == alone["two"]
    assert third.reply.tokens == alone["head"]
    assert [a.name for a in engine._scheduler.decode.adapters._places] == ["b"]
    engine.unload_adapter("b")
    plain = base_model(byte_tokenizer)
    expected = plain.generate([1, 2, 3], max_new_tokens=9)
    assert engine.generate([1, 2, 3], max_new_tokens=9).token_ids == expected


def test_an_error_lets_go_of_adapters(adapters, byte_tokenizer):  # noqa: F811
    folders, _ = adapters
    model = base_model(byte_tokenizer)
    engine = Engine(model, adapters={"a": folders["one"]}, max_batch=2, max_waiting=1)
    engine.submit([1], Sampling(max_new_tokens=50), "a")
    with pytest.raises(QueueFullError):
        engine.submit([2], Sampling(), "a")
    engine._advance_once()
    engine.unload_adapter("a")
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([3])
    handle.remove()
    assert engine._scheduler.decode.adapters._places == []
    assert engine.generate([3], max_new_tokens=3).finish_reason == "length"


def test_adapters_that_do_not_fit_are_refused(adapters, byte_tokenizer, tmp_path):  # noqa: F811
    folders, carriers = adapters
    with pytest.raises(ValueError, match="a base model without an adapter of its own"):
        Engine(carriers["one"], adapters={"two": folders["two"]})
    narrow = tiny(hidden_size=16, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"lora_B.weight: expected \[16, 4\], got \[32, 4\]"):
        Engine(narrow, adapters={"one": folders["one"]})
    with pytest.raises(CheckpointError, match="no such file"):
        Engine(base_model(byte_tokenizer), adapters={"x": tmp_path / "nothing"})
    saved = lora.inject(base_model(None), LoraConfig(r=2, modules_to_save=["lm_head"]))
    lora.save_adapter(saved, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="only LoRA matrices can be served"):
        Engine(base_model(byte_tokenizer), adapters={"x": tmp_path / "saved"})


def test_close_gives_the_model_back(adapters, byte_tokenizer):  # noqa: F811
    folders, _ = adapters
    model = base_model(byte_tokenizer)
    before = {name: type(module) for name, module in model.named_modules()}
    engine = Engine(model, adapters=folders)
    pieces = engine.stream([1, 2], adapter="one")
    assert {name: type(module) for name, module in model.named_modules()} != before
    engine.close()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert list(pieces) == [] and pieces.finish_reason == "cancelled"


# --- limits and ends -------------------------------------------------------------------------


def test_more_requests_than_rows_or_blocks_wait(model):
    engine = Engine(model, max_batch=3, kv_budget=budget(model, 7))
    prompts = [[i] * (10 + i) for i in range(12)]
    got = engine.generate(prompts, max_new_tokens=20)
    assert [c.token_ids for c in got] == [
        Engine(model, max_batch=1).generate(prompt, max_new_tokens=20).token_ids
        for prompt in prompts
    ]
    assert fully_free(engine)


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


def test_a_full_queue_refuses(model):
    engine = Engine(model, max_batch=1, max_waiting=2)
    for _ in range(2):
        engine.submit([1, 2], Sampling())
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.submit([1, 2], Sampling())


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


def test_a_forgotten_stream_is_cancelled(model):
    engine = Engine(model, max_batch=1)
    pieces = engine.stream([1, 2], max_new_tokens=200)
    next(pieces)
    del pieces
    gc.collect()
    assert engine.generate([3], max_new_tokens=2).finish_reason == "length"
    assert fully_free(engine)


def test_an_error_in_a_step_ends_all_and_the_engine_goes_on(model):
    engine = Engine(model, max_batch=2)
    expected = engine.generate([1, 2, 3], max_new_tokens=5)
    other = engine.submit([9], Sampling(max_new_tokens=50))
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.generate([1, 2, 3], max_new_tokens=5)
    handle.remove()
    assert other.reply.finish_reason == "error" and isinstance(other.error, ZeroDivisionError)
    assert engine.generate([1, 2, 3], max_new_tokens=5) == expected
    assert fully_free(engine)


def test_numbers_that_are_not_finite_end_their_own_request(model):
    broken = tiny(max_position_embeddings=256)
    broken.model.embed_tokens.weight.data[77] = float("nan")
    engine = Engine(broken, max_batch=2)
    good = engine.submit([1, 2], Sampling(max_new_tokens=5, logit_bias={77: -1e5}))
    bad = engine.submit([77], Sampling())
    with pytest.raises(FloatingPointError, match="logits at position 1"):
        engine.run([bad])
    engine.run([good])
    assert len(good.reply.tokens) == 5 and fully_free(engine)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_random_requests(model, count):
    """Cancels, bad input and all settings; nothing is lost, nothing is mixed up."""
    rng = random.Random(4)
    engine = Engine(model, max_batch=4, kv_budget=budget(model, 24), max_waiting=6)
    expected: dict[tuple, list[int]] = {}
    live, finished, refused = [], 0, 0
    for prompt, sampling in requests_of(rng, count):
        if rng.random() < 0.05:
            with pytest.raises(ValueError):
                engine.submit([*prompt, 10_000], sampling)
        try:
            live.append((tuple(prompt), sampling, engine.submit(prompt, sampling)))
        except QueueFullError:
            refused += 1
        for _ in range(rng.randrange(4)):
            engine._advance_once()
        if live and rng.random() < 0.1:
            live[rng.randrange(len(live))][2].cancelled = True
        for entry in [entry for entry in live if entry[2].done]:
            live.remove(entry)
            prompt, sampling, request = entry
            finished += 1
            if request.reply.finish_reason != "cancelled" and len(expected) < 40:
                alone = Engine(model, max_batch=1).generate(list(prompt), sampling)
                assert request.reply.tokens == alone.token_ids
                expected[prompt, sampling.seed] = alone.token_ids
    while engine._scheduler.busy:
        engine._advance_once()
    assert all(request.done for _, _, request in live)
    assert finished > count / 3 and refused > 0 and fully_free(engine)


def test_a_reply_is_not_done_before_its_last_text_is_there(model, monkeypatch):
    """Who fetches on another thread would go away without it."""
    seen, leave = [], Scheduler._leave

    def leaving(scheduler, request):
        leave(scheduler, request)
        seen.append((request.reply.finish_reason, request.done))

    monkeypatch.setattr(Scheduler, "_leave", leaving)
    engine = Engine(model, max_batch=2)
    engine.generate(["ab", "cd"], max_new_tokens=3)
    stream = engine.stream("ef")
    stream.close()
    assert seen == [("length", False), ("length", False), ("cancelled", False)]
    assert stream._request.done


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
    """bf16 over 4-bit layers of sizes that the fast kernels take."""
    made = tiny(hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=1024)
    made.bfloat16()
    for name, linear in list(made.named_modules()):
        if type(linear) is torch.nn.Linear and name != "lm_head":
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False)
            layer.quantize_(linear.weight.detach().cuda(), name=name)
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, layer)
    made.tokenizer = byte_tokenizer
    return made.cuda().eval()


def gpu_work() -> list[tuple[list[int], Sampling]]:
    """Also prompts of several chunks."""
    work = requests_of(random.Random(6), 24)
    long = [n % 256 for n in range(900)]
    return [(long[i * 9 :] if i % 5 == 0 else prompt, s) for i, (prompt, s) in enumerate(work)]


def all_at_once(engine: Engine, work) -> list[list[int]]:
    requests = [engine.submit(prompt, sampling) for prompt, sampling in work]
    engine.run(requests)
    return [request.reply.tokens for request in requests]


@pytest.mark.gpu
def test_gpu_graph_equals_eager(gpu_model, monkeypatch):
    captured = Engine(gpu_model, max_batch=8)
    expected = all_at_once(captured, gpu_work())
    steps = captured._scheduler.decode.steps.values()
    assert sum(step.captured is not None for step in steps) >= 3
    forwards = captured._scheduler.prefill.forwards.values()
    assert sum(forward.captured is not None for forward in forwards) >= 3

    monkeypatch.setattr(Captured, "__call__", lambda captured: captured.work())
    assert all_at_once(Engine(gpu_model, max_batch=8), gpu_work()) == expected


@pytest.mark.gpu
def test_gpu_reads_a_known_prefix_and_the_rest_as_it_reads_all(gpu_model):
    engine = Engine(copy.deepcopy(gpu_model).float(), max_batch=2)
    prompt = [n * 7 % 251 for n in range(700)]
    whole = engine.generate(prompt, max_new_tokens=20).token_ids
    for known in (16, 300, 512, 690):
        engine.refresh()
        engine.generate(prompt[:known] + [9], max_new_tokens=1)
        for _ in range(3):  # as it is, captured, replayed
            request = engine.submit(prompt, Sampling(max_new_tokens=20))
            engine.run([request])
            assert request.cached_tokens >= known // 16 * 16
            assert request.reply.tokens == whole
            engine._scheduler.prefixes.clear()
            engine.generate(prompt[:known] + [9], max_new_tokens=1)


@pytest.mark.gpu
def test_gpu_any_mix_equals_each_alone(gpu_model):
    expected = [
        Engine(gpu_model, max_batch=1).generate(prompt, sampling).token_ids
        for prompt, sampling in gpu_work()
    ]
    engine = Engine(gpu_model, max_batch=16)
    assert all_at_once(engine, gpu_work()) == expected
    assert fully_free(engine)


@pytest.mark.gpu
def test_gpu_memory_stays_flat(gpu_model):
    engine = Engine(gpu_model, max_batch=8)
    all_at_once(engine, gpu_work())
    all_at_once(engine, gpu_work())
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        all_at_once(engine, gpu_work())
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.gpu
def test_gpu_adapters_equal_the_cpus(adapters, byte_tokenizer):  # noqa: F811
    folders, _ = adapters
    prompts = [list(range(i, i + 40)) for i in range(8)]
    names = [None, *ADAPTERS, None, *ADAPTERS]

    def replies(device: str) -> list[list[int]]:
        engine = Engine(base_model(byte_tokenizer).to(device), adapters=folders, max_batch=4)
        requests = [
            engine.submit(prompt, Sampling(max_new_tokens=40), name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        engine.run(requests)
        return [request.reply.tokens for request in requests]

    assert replies("cuda") == replies("cpu")
