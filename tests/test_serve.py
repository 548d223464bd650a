"""The server as its clients see it: OpenAI's, a browser's, rude ones."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from engines import slowed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_lora import DAMAGES, damaged
from tiny import tiny_folder, tiny_model, write_tokenizer

from halfbyte import LoraConfig, Sampling, lora
from halfbyte.tokenizer import Tokenizer

httpx = pytest.importorskip("httpx", reason="needs the extra `test`")
openai = pytest.importorskip("openai", reason="needs the extra `test`")
pytest.importorskip("fastapi", reason="needs the extra `serve`")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from halfbyte.errors import SchemaError  # noqa: E402
from halfbyte.grammar import Grammar  # noqa: E402
from halfbyte.sampling import SamplingRows  # noqa: E402
from halfbyte.serve.app import ROUTES, Service, create_app  # noqa: E402
from halfbyte.serve.config import ServeConfig  # noqa: E402
from halfbyte.serve.server import make_engine  # noqa: E402

CONTEXT, VOCABULARY = 512, 258


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with two adapters for the tiny model, and its tokenizer."""
    root = tmp_path_factory.mktemp("serve")
    write_tokenizer(root / "tokenizer")
    for seed, name in enumerate(("red", "blue")):
        rng = torch.Generator().manual_seed(seed)
        made = lora.inject(tiny_model(max_position_embeddings=CONTEXT), LoraConfig(r=4), rng)
        for parameter in lora.adapter_parameters(made):
            parameter.data.normal_(0, 0.5, generator=rng)
        lora.save_adapter(made, root / "adapters" / name)
    return root


def model_of(folders):
    made = tiny_model(max_position_embeddings=CONTEXT, eos_token_id=None)
    made.tokenizer = Tokenizer.from_folder(folders / "tokenizer")
    return made


@contextmanager
def serving(folders, **options):
    """A running server; yields its service, whose engine is there, and its address."""
    config = ServeConfig(name="tiny", port=free_port(), **options)
    service = Service(config)
    adapters = {"red": folders / "adapters" / "red"}
    service.engine = make_engine(model_of(folders), config, adapters)
    server = uvicorn.Server(
        uvicorn.Config(create_app(service), port=config.port, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield service, f"http://127.0.0.1:{config.port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        service.engine.close()


@pytest.fixture(scope="module")
def server(folders):
    with serving(folders, adapter_root=folders / "adapters") as running:
        yield running


@pytest.fixture
def url(server):
    return server[1]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


HELLO = [{"role": "user", "content": "hé"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


def idle(service, seconds: float = 10) -> bool:
    """Whether all blocks come back."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = service.engine.stats
        if not stats.running_requests and not stats.waiting_requests and not stats.used_blocks:
            return True
        time.sleep(0.02)
    return False


# --- OpenAI's client -------------------------------------------------------------------------


def test_a_chat_is_the_engines(server, client):
    engine = server[0].engine
    ids = engine.model.tokenizer.chat_ids(HELLO)
    expected = engine.generate(ids, max_new_tokens=12)
    got = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert got.choices[0].message.content == expected.text
    assert got.choices[0].finish_reason == "length" and got.object == "chat.completion"
    assert got.usage.prompt_tokens == len(ids) and got.usage.completion_tokens == 12


def test_a_stream_is_the_whole_in_pieces(client):
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_plain_completions(server, client):
    engine = server[0].engine
    got = client.completions.create(model="tiny", prompt="abc", **GREEDY)
    assert got.choices[0].text == engine.generate("abc", max_new_tokens=12).text
    many = client.completions.create(model="tiny", prompt=["abc", "de"], **GREEDY)
    assert [c.index for c in many.choices] == [0, 1]
    assert many.choices[0].text == got.choices[0].text
    ids = client.completions.create(model="tiny", prompt=[70, 71], **GREEDY)
    assert ids.choices[0].text == engine.generate([70, 71], max_new_tokens=12).text
    stream = client.completions.create(model="tiny", prompt="abc", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == got.choices[0].text


def test_adapters_are_models(server, client, folders):
    plain = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    red = client.chat.completions.create(model="red", messages=HELLO, **GREEDY)
    assert red.choices[0].message.content != plain.choices[0].message.content
    assert red.model == "red" and red.adapter_generation >= 1
    listed = client.models.list().data
    assert [(m.id, m.parent) for m in listed] == [("tiny", None), ("red", "tiny")]
    assert client.models.retrieve("red").id == "red"
    with pytest.raises(openai.NotFoundError, match="'green' does not exist; there is: tiny, red"):
        client.chat.completions.create(model="green", messages=HELLO)


def test_adapters_come_and_go(url, client):
    def post(what: str, **body) -> httpx.Response:
        return httpx.post(f"{url}/v1/{what}_lora_adapter", json=body)

    assert post("load", lora_name="blue", lora_path="blue").status_code == 200
    first = client.chat.completions.create(model="blue", messages=HELLO, **GREEDY)
    assert "taken" in post("load", lora_name="blue", lora_path="red").json()["error"]["message"]
    anew = post("load", lora_name="blue", lora_path="red", load_inplace=True).json()
    second = client.chat.completions.create(model="blue", messages=HELLO, **GREEDY)
    assert second.adapter_generation == anew["generation"] > first.adapter_generation
    red = client.chat.completions.create(model="red", messages=HELLO, **GREEDY)
    assert second.choices[0].message.content == red.choices[0].message.content
    assert post("unload", lora_name="blue").status_code == 200
    assert post("unload", lora_name="blue").status_code == 404
    for path in ("../..", "/etc", "nothing", "red\0"):
        assert post("load", lora_name="x", lora_path=path).status_code in (400, 403), path
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="blue", messages=HELLO)


def test_a_damaged_adapter_is_the_clients_error(url, folders):
    for how in DAMAGES:
        folder = folders / "adapters" / "damaged"
        shutil.copytree(folders / "adapters" / "blue", folder)
        file_and_field = damaged(folder, how)
        body = {"lora_name": "x", "lora_path": "damaged"}
        response = httpx.post(f"{url}/v1/load_lora_adapter", json=body)
        assert response.status_code == 400, (how, response.text)
        assert re.search(file_and_field, response.json()["error"]["message"])
        shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore:.*another base")
def test_an_adapter_of_another_base_is_said_to_be_one(url, folders):
    def load(name: str) -> dict:
        body = {"lora_name": name, "lora_path": name}
        response = httpx.post(f"{url}/v1/load_lora_adapter", json=body)
        assert response.status_code == 200, response.text
        httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name})
        return response.json()

    folder = folders / "adapters" / "foreign"
    shutil.copytree(folders / "adapters" / "blue", folder)
    damage_base(folder)
    assert "sha256: trained on 'other'" in load("foreign")["warning"]
    assert load("blue")["warning"] is None


def damage_base(folder) -> None:
    path = folder / "halfbyte_base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "other"}))


def test_settings_reach_the_sampler(server, client):
    def text(**settings) -> str:
        return client.completions.create(model="tiny", prompt="abc", **settings).choices[0].text

    drawn = text(seed=5, max_tokens=20)
    assert drawn == text(seed=5, max_tokens=20) != text(seed=6, max_tokens=20)
    free = text(**GREEDY)
    assert text(stop=free[3], **GREEDY) == free[: free.index(free[3])]
    assert (
        text(logit_bias={"70": 100}, **GREEDY)
        == client.completions.create(
            model="tiny",
            prompt="abc",
            extra_body={"top_k": 1},
            logit_bias={"70": 100},
            max_tokens=12,
        )
        .choices[0]
        .text
    )
    two = client.chat.completions.create(model="tiny", messages=HELLO, n=2, seed=1, max_tokens=9)
    assert len(two.choices) == 2 and two.usage.completion_tokens == 18
    assert two.choices[0].message.content != two.choices[1].message.content


def test_logprobs(client):
    options = {"logprobs": True, "top_logprobs": 2, **GREEDY}
    got = client.chat.completions.create(model="tiny", messages=HELLO, **options)
    entries = got.choices[0].logprobs.content
    assert len(entries) == 12 and all(len(e.top_logprobs) == 2 for e in entries)
    assert all(e.top_logprobs[0].logprob == e.logprob <= 0 for e in entries), "greedy is best"
    written = bytes(byte for entry in entries for byte in entry.bytes)
    assert written.decode(errors="replace") == got.choices[0].message.content
    stream = client.chat.completions.create(model="tiny", messages=HELLO, stream=True, **options)
    shown = [e for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.logprob for e in shown] == [e.logprob for e in entries]
    plain = client.completions.create(model="tiny", prompt="abc", logprobs=1, **GREEDY)
    logprobs = plain.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 12
    assert len(logprobs.text_offset) == 12
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        # Bytes that turn out to be no character are given with the next one that is.
        rest = plain.choices[0].text[offset:].lstrip("\ufffd")
        assert "\ufffd" in token or rest.startswith(token)
    stream = client.completions.create(
        model="tiny", prompt="abc", logprobs=1, stream=True, **GREEDY
    )
    shown = [o for c in stream if c.choices[0].logprobs for o in c.choices[0].logprobs.text_offset]
    assert shown == logprobs.text_offset


def test_many_at_once(server, client):
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server[1]}/v1", api_key="any") as api:

            async def one(i: int) -> str:
                stream = await api.chat.completions.create(
                    model=["tiny", "red"][i % 2],
                    messages=[{"role": "user", "content": "x" * i}],
                    stream=True,
                    **GREEDY,
                )
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one(i) for i in range(32)))

    texts = asyncio.run(main())
    for i in (0, 1, 7, 31):
        alone = client.chat.completions.create(
            model=["tiny", "red"][i % 2],
            messages=[{"role": "user", "content": "x" * i}],
            **GREEDY,
        )
        assert texts[i] == alone.choices[0].message.content
    assert idle(server[0])


def test_json_replies(server, client):
    pytest.importorskip("llguidance", reason="needs the extra `json`")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema |= {"additionalProperties": False}
    named = {"name": "answer", "schema": schema, "strict": True}
    options = {"response_format": {"type": "json_schema", "json_schema": named}, "seed": 3}
    got = client.chat.completions.create(model="red", messages=HELLO, **options)
    assert got.choices[0].finish_reason == "stop"
    assert type(json.loads(got.choices[0].message.content)["ok"]) is bool
    stream = client.chat.completions.create(model="red", messages=HELLO, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == got.choices[0].message.content
    options = {"response_format": {"type": "json_object"}, "max_tokens": 40}
    got = client.chat.completions.create(model="tiny", messages=HELLO, **options)
    assert got.choices[0].message.content.lstrip().startswith("{")
    named["schema"] = {"not": {}}
    options = {"response_format": {"type": "json_schema", "json_schema": named}}
    with pytest.raises(openai.BadRequestError, match="json_schema: Unimplemented keys"):
        client.chat.completions.create(model="tiny", messages=HELLO, **options)
    assert idle(server[0])


# --- limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("1e400")}, "JSON|temperature|finite"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "messages: expected content .* 'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, r"0.content: expected str or list\[Part"),
        ({"stop": [1]}, r"^stop: expected str or list\[str\]$"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "at most 512 tokens"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        ({"tools": [{"type": "function"}]}, "tools: not supported"),
        ({"tool_choice": "required"}, "tool_choice: not supported"),
        ({"functions": [{"name": "f"}]}, "functions: not supported"),
        ({"function_call": {"name": "f"}}, "^function_call: not supported"),
        ({"messages": [*HELLO, {"role": "tool", "content": "5"}]}, "messages: calls of tools"),
        (
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "messages: calls of tools",
        ),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages.0.role: .*'user'"),
        ({"modalities": ["text", "audio"]}, "modalities: not supported"),
        ({"top_logprobs": 2}, "top_logprobs: expected logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options: expected stream"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"str": "x"}}, r"^logit_bias.str: .* number"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"n": 100}, "n:"),
        ({"stop": ["a"] * 17}, "stop"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_are_named(url, change, message):
    body = json.dumps({"model": "tiny", "messages": HELLO, **change})
    response = httpx.post(f"{url}/v1/chat/completions", content=body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"echo": True}, "echo: not supported"),
        ({"suffix": "x"}, "suffix: not supported"),
        ({"best_of": 3}, "best_of: not supported"),
        ({"prompt": []}, "prompt: expected at least one"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_completions_are_named(url, change, message):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 2} | change
    response = httpx.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_nulls_and_what_changes_nothing_are_taken(url):
    nulls = dict.fromkeys(["n", "stream", "stop", "seed", "echo", "tools", "best_of", "user"])
    nulls |= {"stream": True, "stream_options": {"include_usage": None}}
    idle = {"tool_choice": "none", "tools": [], "modalities": ["text"], "best_of": 1, "store": True}
    for path in ("chat/completions", "completions"):
        for more in (nulls, idle):
            body = {"model": "tiny", "messages": HELLO, "prompt": "ab", "max_tokens": 2} | more
            response = httpx.post(f"{url}/v1/{path}", json=body)
            assert response.status_code == 200, response.text


def test_developers_speak_as_the_system_does(client):
    def asked(role: str) -> tuple:
        messages = [{"role": role, "content": "Be brief."}, *HELLO]
        got = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
        return got.choices[0].message.content, got.usage

    assert asked("developer") == asked("system") != asked("user")


def test_every_prompt_counts_once_for_all_its_choices(client):
    one = client.completions.create(model="tiny", prompt="abc", **GREEDY).usage.prompt_tokens
    usage = client.completions.create(model="tiny", prompt=["abc"] * 3, n=2, **GREEDY).usage
    assert usage.prompt_tokens == 3 * one


@pytest.mark.parametrize("method, path", [("GET", "/v1/chat/completions"), ("POST", "/v1/nope")])
def test_what_no_route_takes_has_the_shape_of_an_error(server, url, method, path):
    status = 405 if method == "GET" else 404
    counter = server[0].metrics.requests.labels(status)._value
    before = counter.get()
    response = httpx.request(method, url + path)
    error = response.json()["error"]
    assert response.status_code == status and counter.get() == before + 1
    assert f"{method} {path}: " in error["message"] and error["type"] == "invalid_request_error"


EDGES = [
    -0.0, 1e-300, 1e-45, 1e-40, 1e-38, 0.01, 3.5e38, 1e308, 2**24 + 1,
    2**31 - 2, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
]  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(EDGES)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = [
    "model", "messages", "prompt", "n", "stream", "temperature", "top_p", "top_k", "min_p", "seed",
    "stop", "stop_token_ids", "max_tokens", "min_tokens", "logit_bias", "logprobs", "top_logprobs",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "stream_options",
    "response_format", "max_completion_tokens", "tools", "echo", "suffix",
]  # fmt: skip
NUMBERS = [
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "logprobs",
    "top_logprobs", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "max_completion_tokens",
]  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    chat=st.booleans(),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    dropped=st.sets(st.sampled_from(["model", "messages", "prompt"]), max_size=1),
)
def test_fuzzed_bodies_are_answered(url, chat, changes, dropped):
    sane = {"model": "tiny", "messages": HELLO, "prompt": "ab", "max_tokens": 2}
    body = {name: value for name, value in {**sane, **changes}.items() if name not in dropped}
    path = "chat/completions" if chat else "completions"
    response = httpx.post(f"{url}/v1/{path}", json=body, timeout=30)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("field", [*NUMBERS, "logit_bias", "stop_token_ids", "prompt"])
def test_edge_numbers_are_answered(server, url, field):
    """Every number that some format cannot hold, with every other setting on."""
    around = {"temperature": 0.5, "min_tokens": 1, "repetition_penalty": 1.1, "max_tokens": 2}
    for number in EDGES:
        value = {"logit_bias": {"70": number}, "stop_token_ids": [number], "prompt": [number]}
        changed = around | {field: value.get(field, number)}
        for path in ("chat/completions", "completions"):
            body = {"model": "tiny", "messages": HELLO, "prompt": "ab"} | changed
            response = httpx.post(f"{url}/v1/{path}", json=body, timeout=30)
            assert response.status_code in (200, 400), (number, response.text)
    assert idle(server[0])


def test_the_whole_vocabulary_as_ends_is_answered(url):
    body = {"model": "tiny", "prompt": "ab", "stop_token_ids": list(range(VOCABULARY))}
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
    response = httpx.post(f"{url}/v1/completions", json=body | {"min_tokens": 2})
    assert response.status_code == 400 and "stop_ids" in response.json()["error"]["message"]


def test_a_request_that_fails_leaves_others_alone(server, url, monkeypatch):
    """An error of ours in one row, and the settings that once were one, beside a stream."""
    service, _ = server
    set_row = SamplingRows.set

    def failing(rows, row, sampling, *rest):
        if sampling.seed == 7:
            raise RuntimeError("a bug")
        set_row(rows, row, sampling, *rest)

    monkeypatch.setattr(SamplingRows, "set", failing)
    body = {"model": "tiny", "prompt": "ab", "temperature": 0}
    with slowed(service.engine, 0.01):
        long = body | {"max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            for change, status in (({"min_tokens": 1 << 31}, 200), ({"seed": 7}, 500)):
                short = body | {"max_tokens": 2} | change
                response = httpx.post(f"{url}/v1/completions", json=short, timeout=60)
                assert response.status_code == status, response.text
            assert service.engine.stats.running_requests == 1
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {},
            {"type": "boolean"},
            {"type": "integer"},
            {"type": ["string", "null"]},
            {"enum": [1, ""]},
        ]
    ),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["object", "array", "string", "number", "bogus", 3]),
            "properties": st.dictionaries(st.text(max_size=3), inner, max_size=3),
            "required": st.lists(st.text(max_size=3), max_size=2),
            "additionalProperties": st.booleans() | inner,
            "items": inner,
            "anyOf": st.lists(inner, max_size=3),
            "minItems": st.integers(-1, 3),
            "maxLength": st.integers(-1, 3),
            "pattern": st.text(alphabet="a(*)[]\\+^$", max_size=6),
            "minimum": st.floats(allow_nan=False, allow_infinity=False),
            "$ref": st.sampled_from(["#", "#/x", "http://a"]),
            "const": JSON,
        },
    ),
    max_leaves=5,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(schema=SCHEMAS)
def test_fuzzed_schemas_are_answered(url, schema):
    pytest.importorskip("llguidance", reason="needs the extra `json`")
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "response_format": asked}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    if response.status_code != 200:
        assert response.status_code == 400, response.text
        assert "json_schema" in response.json()["error"]["message"]
    elif (choice := response.json()["choices"][0])["finish_reason"] == "stop":
        json.loads(choice["message"]["content"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_that_becomes_too_complex_is_the_clients_error(server, url, monkeypatch, stream):
    pytest.importorskip("llguidance", reason="needs the extra `json`")
    fill, left = Grammar.fill, iter(range(3))

    def filling(grammar):
        if next(left, None) is None:
            raise SchemaError("json_schema: too complex")
        return fill(grammar)

    monkeypatch.setattr(Grammar, "fill", filling)
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 9, "response_format": asked}
    response = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": stream}, timeout=60)
    assert response.status_code == (200 if stream else 400)
    last = response.text.split("data: ")[-1] if stream else response.text
    assert json.loads(last)["error"]["message"] == "json_schema: too complex"
    assert idle(server[0])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{" * 5000])
def test_what_is_no_json_object_is_refused(url, content):
    for path in ("chat/completions", "completions", "load_lora_adapter"):
        assert httpx.post(f"{url}/v1/{path}", content=content).status_code == 400


def test_large_bodies_are_refused(url):
    response = httpx.post(f"{url}/v1/chat/completions", content=b"x" * (3 << 20))
    assert response.status_code == 413


def test_a_full_queue_is_429(folders):
    with serving(folders, max_batch=1, max_waiting=1) as (service, url):
        engine = service.engine
        with engine._lock:  # nobody can step
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 400, "temperature": 0}
            waiting = engine.submit("ab", Sampling())
            response = httpx.post(f"{url}/v1/completions", json=body)
        assert response.status_code == 429 and response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        waiting.cancelled = True
        engine._advance_once()
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


def test_a_reply_that_takes_too_long(folders):
    with serving(folders, request_timeout=0.05) as (service, url), slowed(service.engine, 0.01):
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 400, "temperature": 0}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 504 and idle(service)
        with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert "timeout_error" in events[-1] and idle(service)


@pytest.mark.parametrize("stream, status", [(True, 200), (False, 503)])
def test_a_reply_that_is_cut_off_does_not_look_finished(folders, stream, status):
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 400, "stream": stream}
    with serving(folders) as (service, url), ThreadPoolExecutor() as pool:
        with slowed(service.engine, 0.01):
            answer = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            while not service.engine.stats.running_requests:
                time.sleep(0.01)
            service.engine.close()
            response = answer.result()
    assert response.status_code == status and "shutting down" in response.text
    assert "[DONE]" not in response.text and '"stop"' not in response.text


def test_a_key_is_asked_for(folders):
    with serving(folders, api_key="sesame") as (_, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="sesame") as client:
            assert client.models.list().data[0].id == "tiny"
            assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.post(f"{url}/v1/load_lora_adapter", json={}).status_code == 401


def test_adapters_cannot_be_loaded_unless_allowed(folders):
    with serving(folders) as (_, url):
        body = {"lora_name": "blue", "lora_path": str(folders / "adapters" / "blue")}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=body).status_code == 403


# --- clients that leave ----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server, stream):
    service, url = server
    long = {"model": "red", "prompt": "ab", "max_tokens": 400, "temperature": 0, "stream": stream}
    address = url.removeprefix("http://").split(":")
    raw = json.dumps(long).encode()
    with slowed(service.engine, 0.01):
        with socket.create_connection((address[0], int(address[1]))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            time.sleep(0.2)
            assert service.engine.stats.running_requests == 1
        assert idle(service)
    assert service.engine.adapters["red"].users == 0


# --- health, metrics, page, process ----------------------------------------------------------


def values(url: str) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name.removeprefix("halfbyte_"): float(value) for name, _, value in pairs}


def test_health_and_metrics(server, client, url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{url}/ready").status_code == 200
    client.completions.create(model="tiny", prompt=list(range(40)), temperature=0, max_tokens=4)
    before = values(url)
    client.completions.create(model="tiny", prompt=list(range(40)), temperature=0, max_tokens=4)
    after = values(url)
    grown = {name: after[name] - before.get(name, 0) for name in after if "bucket" not in name}
    for name, expected in {
        'requests_total{status="200"}': 2,  # and the reading of these numbers
        'replies_total{reason="length"}': 1,
        "prompt_tokens_total": 40,
        "reply_tokens_total": 4,
        "prefix_hit_blocks": 2,
        "time_to_first_token_seconds_count": 1,
        "request_seconds_count": 1,
    }.items():
        assert grown[name] == expected, name
    assert 0 <= grown["inter_token_seconds_count"] <= 3
    assert 0 < grown["time_to_first_token_seconds_sum"] <= grown["request_seconds_sum"]
    assert after["running_requests"] == after["waiting_requests"] == after["used_blocks"] == 0
    assert after["total_blocks"] == server[0].engine.stats.total_blocks > 0


def test_metrics_of_requests_that_run_and_wait(folders):
    with serving(folders, max_batch=1) as (service, url):
        requests = [service.engine.submit([1] * 20, Sampling(max_new_tokens=9)) for _ in range(3)]
        service.engine._advance_once()
        seen = values(url)
        assert (seen["running_requests"], seen["waiting_requests"]) == (1, 2)
        assert seen["used_blocks"] == 2, "28 tokens are written, 16 to a block"
        service.engine.run(requests)
        assert values(url)["used_blocks"] == 0


def test_the_documentation_has_every_endpoint_and_metric():
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text()
    for method, path, _ in ROUTES:
        assert f"{method} {path.replace('{name:path}', 'NAME')}`" in page, path
    for family in Service(ServeConfig(name="x")).metrics.registry.collect():
        assert family.name.removeprefix("halfbyte_") in page, family.name


def test_who_says_nothing_listens_to_this_machine_only():
    from halfbyte.cli import serve

    assert ServeConfig(name="x").host == inspect.signature(serve).parameters["host"].default
    assert ServeConfig(name="x").host == "127.0.0.1"


def test_what_a_key_does_not_cover(folders):
    with serving(folders, api_key="sesame") as (_, url):
        for path in ("", "health", "ready", "metrics"):
            assert httpx.get(f"{url}/{path}").status_code == 200, path
        for _, path, _ in ROUTES:
            if path.startswith("/v1/"):
                assert httpx.get(url + path).status_code in (401, 405)


def test_not_ready_before_the_model_is_there():
    service = Service(ServeConfig(name="tiny"))
    app = create_app(service)
    from starlette.testclient import TestClient

    api = TestClient(app)
    assert api.get("/health").status_code == 200
    assert api.get("/ready").status_code == 503
    answer = api.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
    assert answer.status_code == 503 and "being loaded" in answer.json()["error"]["message"]


def test_the_page_is_there_and_allows_no_foreign_code(url):
    page = httpx.get(url)
    assert page.status_code == 200 and "<title>halfbyte</title>" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "innerHTML" not in page.text


@contextmanager
def process(tmp_path, context: int, *options: str):
    """`halfbyte serve` of a tiny model; yields the process and its address."""
    folder = tiny_folder(tmp_path / "model", max_position_embeddings=context)
    port = free_port()
    words = [sys.executable, "-m", "halfbyte", "serve", folder, "--device", "cpu", *options]
    command = [*map(str, words), "--port", str(port), "--name", "m", "--dtype", "float32"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_ready(url)
            yield running, url
        finally:
            running.kill()


@contextmanager
def begun(url: str, tokens: int):
    """The lines of a reply of so many tokens, of which the first has come."""
    body = {"model": "m", "prompt": "ab", "max_tokens": tokens, "stream": True}
    body["logit_bias"] = {"1": -100}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        yield lines


def test_the_process_drains_on_sigterm(tmp_path, folders):
    shutil.copytree(folders / "adapters" / "red", tmp_path / "red")
    damage_base(tmp_path / "red")
    with process(tmp_path, CONTEXT, "--adapter", f"red={tmp_path / 'red'}") as (running, url):
        with begun(url, 300) as lines:
            running.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "what runs is finished"
        logged = [json.loads(line) for line in running.stderr]
        assert any(line.get("completion_tokens") == 300 for line in logged)
        warned = [line["message"] for line in logged if line["level"] == "WARNING"]
        assert len(warned) == 1 and "another base" in warned[0]
        assert running.wait(30) in (0, -signal.SIGTERM)


def test_the_process_does_not_drain_for_ever(tmp_path):
    with process(tmp_path, 1 << 17, "--drain-timeout", "1", "--kv-gb", "2") as (running, url):
        with begun(url, 100_000) as lines:
            running.terminate()
            stopped = time.monotonic()
            with suppress(httpx.RemoteProtocolError):
                assert "data: [DONE]" not in lines
        assert running.wait(30) in (0, -signal.SIGTERM)
        assert 0.9 < time.monotonic() - stopped < 20


def wait_until_ready(url: str) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server is not ready after a minute")


@pytest.mark.parametrize(
    "field, value",
    [
        ("port", 65536),
        ("max_batch", 33),
        ("max_waiting", 0),
        ("kv_budget", 0),
        ("kv_dtype", "int4"),
        ("request_timeout", float("nan")),
        ("drain_timeout", -1),
        ("api_key", ""),
        ("adapter_root", Path("no/such/folder")),
    ],
)
def test_settings_that_cannot_be_are_said_before_the_model_is_loaded(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, got"):
        ServeConfig(name="x", **{field: value})


def test_a_port_that_is_taken_ends_the_process_before_it_loads():
    code = "import sys; from halfbyte.serve import ServeConfig, serve\n"
    code += "serve(lambda: print('loads', flush=True), ServeConfig('x', port=int(sys.argv[1])))"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-c", code, port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode > 0 and done.stdout == "", done.stderr
    logged = [json.loads(line) for line in done.stderr.splitlines()]
    assert any(line["level"] == "ERROR" and port in line["message"] for line in logged)


def test_without_its_extra_the_server_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("halfbyte.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"uvicorn.*halfbyte\[serve\]"):
        importlib.import_module("halfbyte.serve")
