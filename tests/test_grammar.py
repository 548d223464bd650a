"""Replies that are JSON by a schema, alone and beside others."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter

import pytest
import torch
from engines import all_at_once, base_model, four_bit_model, fully_free, requests_of
from test_generate import byte_tokenizer, tiny  # noqa: F401

import halfbyte
from halfbyte import Engine, Sampling
from halfbyte.capture import Captured
from halfbyte.grammar import Grammar, Vocabulary

pytest.importorskip("llguidance", reason="needs the extra `json`")
jsonschema = pytest.importorskip("jsonschema", reason="needs the extra `test`")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/home"},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {
        "home": {
            "type": "object",
            "properties": {"city": {"type": ["string", "null"], "maxLength": 5}},
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS = [
    PERSON,
    {"enum": ["yes", "no", None, 3]},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-f]{2,4}$"}]},
    {"type": "string", "format": "date"},
]


@pytest.fixture(scope="module")
def model(byte_tokenizer):  # noqa: F811
    made = tiny(max_position_embeddings=1024)
    made.tokenizer = byte_tokenizer
    return made


def settings_of(seed: int, schema: dict, **others) -> Sampling:
    return Sampling(
        temperature=seed % 3 / 2, seed=seed, json_schema=schema, max_new_tokens=500, **others
    )


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: next(iter(schema)))
def test_replies_satisfy_their_schema(model, schema):
    engine = Engine(model, max_batch=4)
    sampling = [settings_of(seed, schema, top_p=0.9 + seed % 2 / 10) for seed in range(9)]
    requests = [engine.submit(f"prompt {i % 5}", s) for i, s in enumerate(sampling)]
    engine.run(requests)
    for request in requests:
        assert request.reply.finish_reason == "stop"
        jsonschema.validate(json.loads(request.reply.text.given), schema)
        assert model.tokenizer.decode(request.reply.tokens) == request.reply.text.given
    assert fully_free(engine)


def test_any_object(model):
    sampling = Sampling(temperature=1.0, json_schema={"type": "object"}, max_new_tokens=900)
    replies = Engine(model, max_batch=8).generate(["a"] * 8, sampling)
    whole = [json.loads(reply.text) for reply in replies if reply.finish_reason == "stop"]
    assert len(whole) >= 2 and all(type(value) is dict for value in whole)


def mixed(count: int) -> list[tuple[list[int], Sampling]]:
    """Half of them plain, half of them JSON."""
    rng = random.Random(8)
    work = requests_of(rng, count)
    json_work = [
        ([rng.randrange(256) for _ in range(rng.randrange(1, 40))], settings_of(seed, schema))
        for seed, schema in enumerate(rng.choices(SCHEMAS[:5], k=count))
    ]
    return [entry for pair in zip(work, json_work, strict=True) for entry in pair]


def test_any_mix_equals_each_alone(model):
    work = mixed(16)
    engine = Engine(model, max_batch=6)
    requests = [engine.submit(prompt, sampling) for prompt, sampling in work]
    engine.run(requests)
    for (prompt, sampling), request in zip(work, requests, strict=True):
        alone = Engine(model, max_batch=1).generate(prompt, sampling)
        assert request.reply.tokens == alone.token_ids
        assert request.reply.finish_reason == alone.finish_reason
    assert fully_free(engine)


def test_rows_that_end_between_a_forward_and_its_tokens(model):
    """Another sequence moves to their row; its tokens must come from its own logits."""
    work = mixed(8)
    engine = Engine(model, max_batch=8)
    requests = [engine.submit(prompt, sampling) for prompt, sampling in work]
    rng = random.Random(3)
    while engine._scheduler.busy:
        engine._advance_once()
        running = engine._scheduler.running
        if engine._scheduler.undrawn and len(running) > 3 and rng.random() < 0.2:
            running[rng.randrange(len(running) - 1)].cancelled = True
    for (prompt, sampling), request in zip(work, requests, strict=True):
        alone = Engine(model, max_batch=1).generate(prompt, sampling)
        assert request.reply.tokens == alone.token_ids[: len(request.reply.tokens)]
    reasons = Counter(request.reply.finish_reason for request in requests)
    assert reasons["cancelled"] >= 2 and reasons["stop"] >= 2 and fully_free(engine)


def test_plain_batches_keep_their_step(model):
    engine = Engine(model, max_batch=2)
    plain = Sampling(max_new_tokens=40)
    expected = engine.generate("abc", plain)
    forwards = dict(engine._scheduler.decode.forwards)
    both = [engine.submit("abc", plain), engine.submit("x", settings_of(0, {"type": "boolean"}))]
    engine.run(both)
    assert both[0].reply.tokens == expected.token_ids
    assert forwards.items() <= engine._scheduler.decode.forwards.items()


def test_limits_stops_and_logprobs(model):
    engine = Engine(model, max_batch=2)
    short = engine.generate("a", json_schema=PERSON, max_new_tokens=9)
    assert short.finish_reason == "length" and len(short.token_ids) == 9
    stopped = engine.generate("a", json_schema=PERSON, stop='"', max_new_tokens=500)
    assert stopped.finish_reason == "stop" and stopped.text.strip() == "{"
    exact = engine.generate("a", json_schema={"const": "abc"}, max_new_tokens=5, logprobs=2)
    assert exact.text == '"abc"' and exact.finish_reason == "stop", "complete, not cut"
    assert [entry.token for entry in exact.logprobs] == exact.token_ids
    # They are the model's, which knows nothing of the schema.
    ids = torch.tensor([[*b"a", *b'"ab']])
    with torch.no_grad():
        logprobs = model(ids).logits[0, 1:].float().log_softmax(-1)
    for row, entry in zip(logprobs, exact.logprobs[1:4], strict=True):
        assert math.isclose(row[entry.token], entry.logprob, abs_tol=1e-4)


def test_an_end_is_allowed_where_the_json_may_end(byte_tokenizer):  # noqa: F811
    model = base_model(byte_tokenizer)
    model.lm_head.weight.data[256] = 0.1
    sampling = Sampling(json_schema={"type": "integer"}, temperature=1.0, max_new_tokens=200)
    for reply in Engine(model, max_batch=8).generate(["a"] * 8, sampling):
        assert reply.finish_reason == "stop" and str(int(reply.text)) == reply.text
        assert 256 not in reply.token_ids


def test_a_vocabulary_smaller_than_the_models(byte_tokenizer):  # noqa: F811
    """Ids that stand for nothing never come."""
    model = tiny(vocab_size=333, max_position_embeddings=512)
    model.tokenizer = byte_tokenizer
    reply = Engine(model).generate("a", settings_of(1, PERSON))
    jsonschema.validate(json.loads(reply.text), PERSON)


@pytest.mark.parametrize(
    "schema, message",
    [
        ({"type": "bogus"}, "json_schema: Invalid type: bogus"),
        ({"not": {"type": "string"}}, 'json_schema: Unimplemented keys: \\["not"\\]'),
        ({"$ref": "https://example.com/schema"}, "json_schema: "),
        ({"type": "string", "pattern": "((("}, "json_schema: regex parse error"),
        ({"enum": [{1, 2}]}, "json_schema: expected values of JSON"),
        ({"const": -(2**63)}, "json_schema: .*, got -9223372036854775808, too small"),
        ({"type": "integer", "minimum": -1e19, "maximum": -(2**63) + 512}, "json_schema: .*small"),
        ([], "json_schema: expected a mapping"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "json_schema: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_schemas_that_are_refused(model, schema, message):
    engine = Engine(model, max_batch=1)
    with pytest.raises(ValueError, match=message):
        engine.generate("a", json_schema=schema)
    assert fully_free(engine)


@pytest.mark.parametrize("levels", [3000, 9000, 60_000])
def test_long_chains_of_references_are_answered(model, levels):
    """An error or a reply: by recursion on an ordinary stack they would end the process."""
    inner = {"type": "object", "properties": {"a": None}, "required": ["a"]}
    chain = {
        f"d{i}": inner | {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(levels)
    }
    schema = {"$defs": chain | {f"d{levels}": {"type": "integer"}}, "$ref": "#/$defs/d0"}
    engine = Engine(model, max_batch=1)
    try:
        engine.generate("a", json_schema=schema, max_new_tokens=3)
    except ValueError as error:
        assert levels > 3000 and str(error).startswith("json_schema: ")
        assert "backtrace" not in str(error)
    assert fully_free(engine)


def test_what_is_missing_is_named(model, monkeypatch):
    with pytest.raises(ValueError, match="min_new_tokens: expected 0 beside json_schema, got 3"):
        Sampling(json_schema={}, min_new_tokens=3)
    with pytest.raises(ValueError, match="json_schema: expected a model with a tokenizer"):
        Engine(tiny()).generate([1], json_schema={})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"llguidance.*pip install 'halfbyte\[json\]'"):
        Engine(model).generate("a", json_schema={})


def test_a_grammar_that_fails_ends_its_own_request(model, monkeypatch):
    engine = Engine(model, max_batch=3)
    plain = engine.submit("b", Sampling(max_new_tokens=60))
    bad = engine.submit("a", settings_of(0, PERSON))
    good = engine.submit("a", settings_of(2, PERSON))
    fill, left = Grammar.fill, iter(range(5))

    def filling(grammar):
        if grammar is bad.reply.grammar and next(left, None) is None:
            raise ValueError("json_schema: too complex")
        return fill(grammar)

    monkeypatch.setattr(Grammar, "fill", filling)
    with pytest.raises(ValueError, match="too complex"):
        engine.run([bad])
    engine.run([plain, good])
    assert bad.reply.finish_reason == "error" and len(plain.reply.tokens) == 60
    jsonschema.validate(json.loads(good.reply.text.given), PERSON)
    assert fully_free(engine)


def test_a_vocabulary_is_made_once(model, monkeypatch):
    made, init = [], Vocabulary.__init__
    monkeypatch.setattr(Vocabulary, "__init__", lambda *a: made.append(a) or init(*a))
    engine = Engine(model, max_batch=2)
    for _ in range(3):
        engine.generate("a", json_schema={"type": "boolean"})
    assert len(made) == 1


def test_smollm2_describes_by_a_schema(shared):
    """With a real vocabulary and a model that means what it writes."""
    path = shared / "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    model = halfbyte.load(path, device="cpu", dtype=torch.float32, progress=False)
    text = "Describe Ada Lovelace as JSON with her name, year of birth and fields."
    ids = model.tokenizer.chat_ids([{"role": "user", "content": text}])
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "born": {"type": "integer", "minimum": 1000, "maximum": 2100},
            "fields": {
                "type": "array",
                "items": {"type": "string", "maxLength": 30},
                "maxItems": 3,
            },
        },
        "required": ["name", "born", "fields"],
        "additionalProperties": False,
    }
    engine = Engine(model, max_batch=3)
    plain = Sampling(max_new_tokens=40)
    alone = engine.generate(ids, plain)
    both = [
        engine.submit(ids, plain),
        engine.submit(ids, Sampling(json_schema=schema, max_new_tokens=150)),
        engine.submit(ids, settings_of(1, schema)),
    ]
    engine.run(both)
    assert both[0].reply.tokens == alone.token_ids
    for request in both[1:]:
        assert request.reply.finish_reason == "stop", request.reply.text.given
        jsonschema.validate(json.loads(request.reply.text.given), schema)
    assert json.loads(both[1].reply.text.given)["name"].startswith("Ada ")


# --- on a GPU --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_model(byte_tokenizer):  # noqa: F811
    return four_bit_model(byte_tokenizer)


@pytest.mark.gpu
def test_gpu_any_mix_equals_each_alone(gpu_model):
    work = mixed(12)
    expected = [
        Engine(gpu_model, max_batch=1).generate(prompt, sampling).token_ids
        for prompt, sampling in work
    ]
    engine = Engine(gpu_model, max_batch=8)
    assert all_at_once(engine, work) == expected
    assert fully_free(engine)
    for (_, sampling), tokens in zip(work, expected, strict=True):
        if sampling.json_schema is not None:
            value = json.loads(gpu_model.tokenizer.decode(tokens))
            jsonschema.validate(value, sampling.json_schema)


@pytest.mark.gpu
def test_gpu_graph_equals_eager(gpu_model, monkeypatch):
    captured = Engine(gpu_model, max_batch=8)
    expected = all_at_once(captured, mixed(12))
    decode = captured._scheduler.decode
    assert any(part.captured for part in decode.forwards.values())
    monkeypatch.setattr(Captured, "__call__", lambda captured: captured.work())
    assert all_at_once(Engine(gpu_model, max_batch=8), mixed(12)) == expected
