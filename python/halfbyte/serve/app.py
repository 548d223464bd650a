"""The HTTP routes over an engine."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from halfbyte.engine import Engine, Stats
from halfbyte.errors import AdapterNotFoundError, CheckpointError, QueueFullError, SchemaError
from halfbyte.serve.answers import Answer, ChatAnswer, TextAnswer
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.replies import Closed, Replies, Timeout
from halfbyte.serve.schema import (
    Body,
    ChatBody,
    CompletionBody,
    LoadAdapterBody,
    UnloadAdapterBody,
)

log = logging.getLogger("halfbyte.serve")
PAGE = Path(__file__).with_name("page.html")
Parsed = TypeVar("Parsed", bound=BaseModel)
JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
NO_STATS = Stats(*(0 for _ in Stats._fields))


class ApiError(Exception):
    """An answer that is no success, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Service:
    """What the routes share. engine: None until the model is loaded."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.engine: Engine | None = None
        self.draining = False
        self.metrics = Metrics(lambda: self.engine.stats if self.engine else NO_STATS)

    def ready(self) -> Engine:
        if self.engine is None or self.draining:
            why = "the model is still being loaded" if self.engine is None else "shutting down"
            raise ApiError(503, why, "server_error", headers={"Retry-After": "5"})
        return self.engine

    def authorize(self, request: Request) -> None:
        key = self.config.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if key is not None and not hmac.compare_digest(given, key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "authentication_error")

    def adapter(self, engine: Engine, name: str) -> str | None:
        """The adapter that a request's `model` means; None for the base."""
        if name == self.config.name:
            return None
        if name not in engine.adapters:
            known = ", ".join([self.config.name, *sorted(engine.adapters)])
            raise ApiError(
                404,
                f"the model {name!r} does not exist; there is: {known}",
                "not_found_error",
                "model",
                "model_not_found",
            )
        return name

    async def read(self, request: Request, kind: type[Parsed]) -> Parsed:
        """A body of bounded size, as JSON of the expected shape."""
        received, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.config.max_body:
                raise ApiError(413, f"the body is larger than {self.config.max_body} bytes")
            received.append(chunk)
        try:
            return kind.model_validate_json(b"".join(received))
        except ValidationError as error:
            where, why = _complaint(error)
            raise ApiError(400, f"{where}: {why}" if where else why, param=where or None) from None


def _complaint(error: ValidationError) -> tuple[str, str]:
    """The first field that is wrong, and why; of one that may be of several kinds, all of them."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    path = list(takewhile(lambda part: not _is_kind(part), errors[0]["loc"]))
    at = len(path)
    tried = [e["loc"][at] for e in errors if e["loc"][:at] == tuple(path) and len(e["loc"]) > at]
    kinds = [str(kind) for kind in dict.fromkeys(tried) if _is_kind(kind)]
    if len(kinds) > 1:  # a single one is a client's own key that looks like it
        return ".".join(map(str, path)), f"expected {' or '.join(kinds)}"
    return ".".join(map(str, errors[0]["loc"])), errors[0]["msg"]


def _is_kind(part: int | str) -> bool:
    """Whether a part of an error's place is one of a union's kinds, as no field is called."""
    return part == "str" or "[" in str(part)


Handler = Callable[[Service, Request], Awaitable[Response]]


def create_app(service: Service) -> FastAPI:
    """The routes; `service.engine` may come later."""
    app = FastAPI(title="halfbyte", docs_url=None, redoc_url=None, openapi_url=None)
    for method, path, handler in ROUTES:
        app.router.add_route(path, partial(_guarded, service, handler), methods=[method])
    app.add_exception_handler(HTTPException, partial(_unrouted, service))  # type: ignore[arg-type]
    return app


async def _unrouted(service: Service, request: Request, error: HTTPException) -> Response:
    """What no route takes, answered and counted as all else is."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    refused = ApiError(error.status_code, message)
    service.metrics.requests.labels(refused.status).inc()
    return JSONResponse(refused.body, refused.status, error.headers)


async def _guarded(service: Service, handler: Handler, request: Request) -> Response:
    """Turn what handlers raise into answers, and count all."""
    try:
        if request.url.path.startswith("/v1/"):
            service.authorize(request)
        response = await handler(service, request)
    except ApiError as error:
        response = JSONResponse(error.body, error.status, error.headers)
    except ClientDisconnect:
        response = Response(status_code=499)
    except Exception:
        log.exception("an answer failed")
        failure = ApiError(500, "internal error", "server_error")
        response = JSONResponse(failure.body, failure.status)
    service.metrics.requests.labels(response.status_code).inc()
    return response


async def health(_: Service, __: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def ready(service: Service, _: Request) -> Response:
    service.ready()
    return JSONResponse({"status": "ready"})


async def metrics(service: Service, _: Request) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


async def page(_: Service, __: Request) -> Response:
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    headers = {"Content-Security-Policy": policy + "connect-src 'self'"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)


async def models(service: Service, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": _models(service)})


async def model(service: Service, request: Request) -> Response:
    name = request.path_params["name"]
    service.adapter(service.ready(), name)
    return JSONResponse(next(entry for entry in _models(service) if entry["id"] == name))


async def chat(service: Service, request: Request) -> Response:
    engine = service.ready()
    body = await service.read(request, ChatBody)
    return await _answer(service, engine, request, body, ChatAnswer)


async def complete(service: Service, request: Request) -> Response:
    engine = service.ready()
    body = await service.read(request, CompletionBody)
    return await _answer(service, engine, request, body, TextAnswer)


async def load_adapter(service: Service, request: Request) -> Response:
    engine = service.ready()
    body = await service.read(request, LoadAdapterBody)
    folder = _inside(service.config.adapter_root, body.lora_path)
    taken = {service.config.name, *(() if body.load_inplace else engine.adapters)}
    if body.lora_name in taken:
        raise ApiError(400, f"lora_name: {body.lora_name!r} is taken", param="lora_name")
    try:
        adapter = await asyncio.to_thread(engine.load_adapter, body.lora_name, folder)
    except (CheckpointError, ValueError, OSError) as error:
        raise ApiError(400, str(error), param="lora_path") from None
    loaded = {"generation": adapter.generation, "warning": adapter.warning}
    return JSONResponse({"lora_name": adapter.name, **loaded})


async def unload_adapter(service: Service, request: Request) -> Response:
    engine = service.ready()
    body = await service.read(request, UnloadAdapterBody)
    _inside(service.config.adapter_root, ".")
    try:
        await asyncio.to_thread(engine.unload_adapter, body.lora_name)
    except AdapterNotFoundError as error:
        raise ApiError(404, str(error), "not_found_error", "lora_name") from None
    return JSONResponse({"lora_name": body.lora_name})


ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/", page),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/metrics", metrics),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/v1/chat/completions", chat),
    ("POST", "/v1/completions", complete),
    ("POST", "/v1/load_lora_adapter", load_adapter),
    ("POST", "/v1/unload_lora_adapter", unload_adapter),
]


def _models(service: Service) -> list[dict[str, Any]]:
    base = service.config.name
    listed = {"object": "model", "created": 0, "owned_by": "halfbyte"}
    adapters = service.ready().adapters.values()
    entries = [{"id": base, **listed, "parent": None}]
    return entries + [
        {"id": a.name, **listed, "parent": base, "generation": a.generation} for a in adapters
    ]


def _inside(root: Path | None, path: str) -> Path:
    """A folder under the root that adapters may be loaded from."""
    if root is None:
        raise ApiError(403, "this server was started without --adapter-root", "permission_error")
    try:
        folder = (root / path).resolve()
    except (OSError, ValueError) as error:
        raise ApiError(400, f"lora_path: {error}", param="lora_path") from None
    if not folder.is_relative_to(root.resolve()):
        raise ApiError(403, "lora_path: expected a folder under --adapter-root", param="lora_path")
    return folder


async def _answer(
    service: Service, engine: Engine, request: Request, body: Body, kind: type[Answer]
) -> Response:
    """Submit what a body asks for and answer it, whole or in chunks."""
    adapter = service.adapter(engine, body.model)
    requests: list[Any] = []
    try:
        # Long prompts and grammars take their time, in which others are to be served.
        await asyncio.to_thread(_submit, engine, body, adapter, requests)
    except BaseException as error:
        _cancel(requests)
        raise _refusal(error) from None
    timeout = service.config.request_timeout
    replies = Replies(engine, requests, body.n, service.metrics, timeout)
    answer = kind(body.model, requests, engine.model.tokenizer)
    if body.stream:
        chunks = _events(answer, replies, body)
        return StreamingResponse(chunks, media_type="text/event-stream")
    await _until_gone(request, replies.whole())
    _log(answer, replies)
    return JSONResponse(answer.whole(replies.usage()))


def _refusal(error: BaseException) -> BaseException:
    """What a client is told of requests that could not be submitted."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), "rate_limit_error", headers={"Retry-After": "1"})
    if isinstance(error, AdapterNotFoundError):
        return ApiError(404, str(error), "not_found_error", "model", "model_not_found")
    if isinstance(error, (ValueError, TypeError, ImportError)):
        return ApiError(400, str(error))
    return error


def _submit(engine: Engine, body: Body, adapter: str | None, requests: list[Any]) -> None:
    """Add the requests that a body asks for, as far as they can be submitted."""
    body.check()
    for prompt in _prompts(engine, body):
        for choice in range(body.n):
            requests.append(engine.submit(prompt, body.sampling(choice), adapter))


def _prompts(engine: Engine, body: Body) -> list[Any]:
    if isinstance(body, CompletionBody):
        return body.prompts()
    assert isinstance(body, ChatBody)
    messages = body.conversation()
    try:
        return [engine.model.tokenizer.chat_ids(messages)]
    except Exception as error:
        # Templates are programs of the model's maker, and may refuse what they like.
        raise ValueError(f"messages: {error}") from None


def _cancel(requests: list[Any]) -> None:
    for request in requests:
        request.cancelled = True


def _cut_off(error: Exception) -> ApiError | None:
    """What a client is told of a reply that ends in its middle; None: nobody foresaw it."""
    if isinstance(error, Timeout):
        return ApiError(504, "the reply took too long", "timeout_error")
    if isinstance(error, Closed):
        return ApiError(503, "shutting down", "server_error")
    if isinstance(error, SchemaError):
        return ApiError(400, str(error))
    if isinstance(error, FloatingPointError):
        return ApiError(500, str(error), "server_error")
    return None


async def _until_gone(request: Request, work: Any) -> None:
    """Await work, but give it up when the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=0.25))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        task.result()
    except Exception as error:
        if (known := _cut_off(error)) is None:
            raise
        raise known from None
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _events(answer: Answer, replies: Replies, body: Body) -> AsyncIterator[str]:
    """Server-sent events."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    extra = {"usage": None} if with_usage else {}
    arrivals = aiter(replies)
    try:
        for chunk in answer.opening():
            yield _event({**chunk, **extra})
        async for item in arrivals:
            if item is None:
                yield ": keep-alive\n\n"
                continue
            choice, text = item
            chunk = answer.end(choice) if text is None else answer.piece(choice, text)
            yield _event({**chunk, **extra})
        if with_usage:
            yield _event(answer.chunk([], usage=replies.usage()))
        yield "data: [DONE]\n\n"
    except Exception as error:
        if (known := _cut_off(error)) is None:
            log.exception("a stream failed")
            known = ApiError(500, str(error), "server_error")
        yield _event(known.body)
    finally:
        replies.cancel()
        await arrivals.aclose()
        _log(answer, replies)


def _event(data: dict[str, Any]) -> str:
    return f"data: {JSON.encode(data)}\n\n"


def _log(answer: Answer, replies: Replies) -> None:
    reasons = [request.reply.finish_reason or "cancelled" for request in replies.requests]
    fields = {
        "id": answer.head["id"],
        "model": answer.head["model"],
        **replies.usage(),
        "cached_tokens": sum(request.cached_tokens for request in replies.requests),
        "finish_reasons": reasons,
        "first_text_s": replies.first_text and round(replies.first_text, 4),
    }
    log.info(json.dumps(fields))
