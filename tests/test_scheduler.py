"""The scheduler: prompts in chunks, prefixes, limits, errors and thousands of requests."""

from __future__ import annotations

import copy
import importlib.util
import random
import resource
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import (
    ADAPTERS,
    all_at_once,
    base_model,
    budget,
    four_bit_model,
    fully_free,
    gpu_work,
    requests_of,
    write_adapters,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generate import byte_tokenizer, tiny  # noqa: F401

from halfbyte import Engine, Sampling
from halfbyte.errors import AdapterNotFoundError, ContextLengthError, QueueFullError
from halfbyte.prefill import CHUNK
from halfbyte.prefix_cache import PrefixCache
from halfbyte.sampling import SamplingRows
from halfbyte.scheduler import Scheduler


@pytest.fixture(scope="module")
def model(byte_tokenizer):  # noqa: F811
    return base_model(byte_tokenizer)


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


def test_a_gpu_gets_a_step_before_the_last_one_is_read(device):
    engine = Engine(tiny(max_position_embeddings=256).to(device), max_batch=2)
    scheduler = engine._scheduler
    assert scheduler.lookahead == (1 if device.type == "cuda" else 0)
    expected = engine.generate([1, 2], max_new_tokens=20).token_ids
    scheduler.lookahead = 1
    engine.refresh()
    request = engine.submit([1, 2], Sampling(max_new_tokens=20))
    for step in range(10):
        engine._advance_once()
        assert len(scheduler.pending) == 1
        assert len(request.reply.tokens) == step + 1
    engine.run([request])
    assert request.reply.tokens == expected


def test_short_prompts_do_not_wait_for_long_ones_nor_these_for_all_short_ones():
    model = tiny(max_position_embeddings=20 * CHUNK)
    engine = Engine(model, max_batch=6)
    long = engine.submit([3] * (8 * CHUNK), Sampling(max_new_tokens=1))
    engine._advance_once()
    short = engine.submit([1, 2], Sampling(max_new_tokens=1))
    engine._advance_once()
    engine._advance_once()
    assert short.done and not long.done
    for _ in range(16):
        read, others = long.prefilled, [engine.submit([4, 5], Sampling(max_new_tokens=1))]
        engine._advance_once()
        engine._advance_once()
        assert others[0].done and (long.done or long.prefilled == read + CHUNK)
        if long.done:
            break
    assert long.done


def test_equal_prompts_are_read_one_after_the_other():
    model = tiny(max_position_embeddings=4 * CHUNK)
    engine = Engine(model, max_batch=4)
    requests = [engine.submit([i] * 2 * CHUNK, Sampling(max_new_tokens=1)) for i in range(4)]
    steps = 0
    while engine._scheduler.busy:
        engine._advance_once()
        steps += 1
        assert sum(request.done for request in requests) == steps // 2
    assert steps == 8, "no step without a chunk"


def test_what_hinders_one_request_from_starting_ends_it_alone(model, monkeypatch):
    engine = Engine(model, max_batch=3)
    good = engine.submit([1, 2], Sampling(max_new_tokens=20))
    engine._advance_once()
    set_row = SamplingRows.set

    def set_but_one(rows, row, sampling, *rest):
        set_row(rows, row, sampling, *rest)
        if sampling.seed == 7:
            raise RuntimeError("no room for a seed of 7")

    monkeypatch.setattr(SamplingRows, "set", set_but_one)
    bad = engine.submit([3], Sampling(seed=7))
    later = engine.submit([4, 5], Sampling(max_new_tokens=5))
    engine.run([good, later])
    assert bad.reply.finish_reason == "error" and not bad.reply.tokens
    with pytest.raises(RuntimeError, match="a seed of 7"):
        engine.run([bad])
    for request in (good, later):
        options = {"max_new_tokens": request.sampling.max_new_tokens}
        alone = Engine(model, max_batch=1).generate(request.prompt, **options)
        assert request.reply.tokens == alone.token_ids
    assert fully_free(engine)


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


def test_a_full_queue_refuses(model):
    engine = Engine(model, max_batch=1, max_waiting=2)
    for _ in range(2):
        engine.submit([1, 2], Sampling())
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.submit([1, 2], Sampling())


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


def check_invariants(engine: Engine) -> None:
    """Every block and row has the holders that it should have."""
    scheduler = engine._scheduler
    prefixes, active = scheduler.prefixes, [*scheduler.running, *scheduler.prefilling]
    held = {block for request in active for block in request.blocks}
    assert len(active) <= scheduler.max_batch
    assert prefixes.held == len(held) and 0 not in held
    assert held.isdisjoint(prefixes._free) and held.isdisjoint(prefixes._unheld)
    assert not any(request.blocks for request in scheduler.waiting)
    users = Counter(r.adapter for r in [*active, *scheduler.waiting] if r.adapter is not None)
    assert all(adapter.users == users[adapter] for adapter in scheduler.decode.adapters._places)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def odd_sampling(rng: random.Random, sampling: Sampling) -> Sampling:
    """Now and then with a schema, where grammars can be had."""
    if importlib.util.find_spec("llguidance") is None or rng.random() < 0.9:
        return sampling
    schema = rng.choice([{"type": "boolean"}, {"enum": [1, "é", None]}, {"type": "object"}])
    return replace(sampling, json_schema=schema)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_random_requests(byte_tokenizer, tmp_path, count):  # noqa: F811
    """Cancels, bad input, adapters that change and all settings: nothing is lost or mixed up."""
    rng = random.Random(4)
    folders, carriers = write_adapters(tmp_path, byte_tokenizer)
    bare = base_model(byte_tokenizer)
    model = base_model(byte_tokenizer)
    engine = Engine(model, folders, max_batch=4, kv_budget=budget(model, 24), max_waiting=6)
    live, ends, compared, early = [], Counter(), 0, 0.0
    for i, (prompt, sampling) in enumerate(requests_of(rng, count)):
        sampling, name = odd_sampling(rng, sampling), rng.choice([None, None, *ADAPTERS])
        try:
            if rng.random() < 0.05:
                engine.submit([*prompt, 10_000], sampling)
            if rng.random() < 0.05:
                engine.submit([1] * 300, sampling)
            live.append((name, engine.submit(prompt, sampling, rng.choice([name] * 19 + ["gone"]))))
        except (QueueFullError, ContextLengthError, AdapterNotFoundError, ValueError) as error:
            ends[type(error).__name__] += 1
        for _ in range(rng.randrange(5)):
            engine._advance_once()
            check_invariants(engine)
        if live and rng.random() < 0.1:
            rng.choice(live)[1].cancelled = True
        if i % 50 == 49:
            changed = rng.choice([*ADAPTERS])
            engine.unload_adapter(changed)
            engine.load_adapter(changed, folders[changed])
        for entry in [entry for entry in live if entry[1].done]:
            live.remove(entry)
            name, request = entry
            ends[request.reply.finish_reason] += 1
            if request.reply.finish_reason != "cancelled" and compared < 60:
                compared += 1
                alone = Engine(carriers.get(name, bare), max_batch=1)
                alone = alone.generate(request.prompt, request.sampling)
                assert (alone.token_ids, alone.text) == (
                    request.reply.tokens,
                    request.reply.text.given,
                )
        if i == count // 4:
            early = resident_mb()
    while engine._scheduler.busy:
        engine._advance_once()
        check_invariants(engine)
    assert all(request.done for _, request in live)
    assert ends["length"] + ends["stop"] > count / 4 and ends["error"] == 0
    for name in ("QueueFullError", "ContextLengthError", "AdapterNotFoundError", "ValueError"):
        assert ends[name] > 0, name
    assert fully_free(engine) and all(a.users == 0 for a in engine.adapters.values())
    assert resident_mb() - early < 20


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


# --- on a GPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_model(byte_tokenizer):  # noqa: F811
    return four_bit_model(byte_tokenizer)


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
def test_gpu_memory_stays_flat(gpu_model):
    engine = Engine(gpu_model, max_batch=8)
    all_at_once(engine, gpu_work())
    all_at_once(engine, gpu_work())
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        all_at_once(engine, gpu_work())
    assert torch.cuda.memory_allocated() <= before
