"""Adapters in an engine: chosen by row, loaded, swapped and unloaded while requests run."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
from engines import ADAPTERS, base_model, fully_free, write_adapters
from test_generate import byte_tokenizer, tiny  # noqa: F401

from halfbyte import Engine, LoraConfig, Sampling, checkpoint, lora
from halfbyte.errors import AdapterNotFoundError, CheckpointError, QueueFullError


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, byte_tokenizer):  # noqa: F811
    return write_adapters(tmp_path_factory.mktemp("adapters"), byte_tokenizer)


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


def test_layers_with_adapters_are_in_the_models_mode(adapters, byte_tokenizer):  # noqa: F811
    """In training they take no part in the launches of a decode step."""
    folders, _ = adapters
    for mode in (False, True):
        engine = Engine(base_model(byte_tokenizer).train(mode), adapters=folders, max_batch=1)
        assert {module.training for module in engine.model.modules()} == {mode}


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


def test_a_prefix_belongs_to_one_loading_of_its_adapter(adapters, byte_tokenizer):  # noqa: F811
    folders, carriers = adapters
    engine = Engine(base_model(byte_tokenizer), adapters={"a": folders["one"]}, max_batch=2)
    prompt, options = list(range(50)), Sampling(max_new_tokens=8)
    engine.generate(prompt, options, adapter="a")
    for known, loaded in ((0, "two"), (0, "one"), (48, None)):
        if loaded is not None:
            engine.load_adapter("a", folders[loaded])
        request = engine.submit(prompt, options, "a")
        engine.run([request])
        assert request.cached_tokens == known
        alone = Engine(carriers[loaded or "one"], max_batch=1).generate(prompt, options)
        assert request.reply.tokens == alone.token_ids


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
    saved.lm_head.trained["weight"].data += 1
    lora.save_adapter(saved, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="only LoRA matrices can be served"):
        Engine(base_model(byte_tokenizer), adapters={"x": tmp_path / "saved"})


def test_a_rank_that_the_files_do_not_have(adapters, byte_tokenizer, tmp_path):  # noqa: F811
    folders, _ = adapters
    shutil.copytree(folders["one"], tmp_path / "one")
    config = tmp_path / "one/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 8}))
    engine = Engine(base_model(byte_tokenizer), max_batch=1)
    expected = r"one: .*lora_A.weight: expected rank 8 by adapter_config.json, got 4 in \[4, \d+\]"
    with pytest.raises(CheckpointError, match=expected):
        engine.load_adapter("one", tmp_path / "one")
    with pytest.raises(CheckpointError, match=expected):
        lora.load_adapter(base_model(byte_tokenizer), tmp_path / "one")
    assert engine.adapters == {} and engine.generate([1], max_new_tokens=2).token_ids


def test_an_adapter_of_another_base_is_warned_of(adapters, byte_tokenizer):  # noqa: F811
    folders, _ = adapters
    other = base_model(byte_tokenizer)
    other.model.norm.weight.data[0] += 1
    with pytest.warns(UserWarning, match="one: .*another base"):
        engine = Engine(other, adapters={"one": folders["one"]}, max_batch=1)
    assert "another base" in engine.adapters["one"].warning
    own = Engine(base_model(byte_tokenizer), adapters={"one": folders["one"]}, max_batch=1)
    assert own.adapters["one"].warning is None


@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_an_adapter_of_nan_cannot_reach_the_rows_of_others(adapters, tmp_path, matrix):
    carrier = copy.deepcopy(adapters[1]["one"])
    next(p for name, p in carrier.named_parameters() if matrix in name).data[0, 0] = math.nan
    lora.save_adapter(carrier, tmp_path)
    with pytest.raises(CheckpointError, match="q_proj: expected finite numbers in torch.float32"):
        Engine(base_model(None), adapters={"nan": tmp_path}, max_batch=2)


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
    for work in (
        lambda: engine.generate([1, 2], adapter="one"),
        lambda: engine.load_adapter("two", folders["two"]),
        lambda: engine.unload_adapter("one"),
    ):
        with pytest.raises(RuntimeError, match="the engine was closed. Hint: make a new one"):
            work()
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_model_under_adapters_is_left_alone(adapters, byte_tokenizer, tmp_path):  # noqa: F811
    folders, _ = adapters
    model = base_model(byte_tokenizer)
    with Engine(model, adapters=folders):
        for work in (
            lambda: lora.inject(model, LoraConfig(r=2)),
            lambda: lora.load_adapter(model, folders["one"]),
            lambda: lora.merge(model),
            lambda: checkpoint.save(model, tmp_path / "saved"),
        ):
            with pytest.raises(ValueError, match="Hint: engine.close.. gives the model back"):
                work()
    checkpoint.save(lora.merge(lora.inject(model, LoraConfig(r=2))), tmp_path / "saved")


def test_a_with_block_closes(adapters, byte_tokenizer):  # noqa: F811
    folders, _ = adapters
    model = base_model(byte_tokenizer)
    before = {name: type(module) for name, module in model.named_modules()}
    with Engine(model, adapters={"one": folders["one"]}) as engine:
        assert engine.generate([1, 2], adapter="one", max_new_tokens=3).token_ids
    assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="the engine was closed"):
        engine.generate([1, 2])


def test_what_comes_in_while_an_engine_closes_does_not_run(adapters, byte_tokenizer, monkeypatch):  # noqa: F811
    folders, _ = adapters
    model = base_model(byte_tokenizer)
    before = {name: type(module) for name, module in model.named_modules()}
    engine = Engine(model, adapters={"one": folders["one"]})
    check = engine._check_open
    monkeypatch.setattr(engine, "_check_open", lambda: None)
    engine.close()
    assert engine.generate([1, 2], adapter="one").finish_reason == "cancelled"
    calls = iter((lambda: None, check))
    monkeypatch.setattr(engine, "_check_open", lambda: next(calls)())
    with pytest.raises(RuntimeError, match="the engine was closed"):
        engine.load_adapter("two", folders["two"])
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.gpu
def test_gpu_captures_again_where_a_load_dropped_all(adapters, byte_tokenizer):  # noqa: F811
    folders, _ = adapters
    engine = Engine(base_model(byte_tokenizer).cuda(), {"a": folders["one"]}, max_batch=1)
    first = engine.generate([1, 2, 3], adapter="a", max_new_tokens=20).token_ids
    for name in ("b", "c"):
        engine.load_adapter(name, folders["two"])
        assert engine.generate([1, 2, 3], adapter="a", max_new_tokens=20).token_ids == first
        assert all(step.captured for step in engine._scheduler.decode.forwards.values())


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
