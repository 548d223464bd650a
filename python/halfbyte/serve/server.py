"""A server process: listen, load, answer, drain."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn

from halfbyte.engine import Engine
from halfbyte.models import Decoder
from halfbyte.serve.app import Service, create_app, log
from halfbyte.serve.config import ServeConfig


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, and the message's own fields if it is JSON."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
        }
        text = record.getMessage()
        try:
            parsed = json.loads(text)
        except ValueError:
            parsed = None
        fields |= parsed if isinstance(parsed, dict) else {"message": text}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class Server(uvicorn.Server):
    """Starts its loader once it listens: exiting beside it, for a port that is taken, aborts."""

    loader: threading.Thread

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loader.start()


def serve(
    load: Callable[[], Decoder],
    config: ServeConfig,
    adapters: Mapping[str, str | Path] | None = None,
) -> None:
    """Listen at once, answer when `load` has given the model, until SIGINT or SIGTERM.

    Requests that run then are finished, within drain_timeout. Raises what loading raises.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.getLogger().handlers = [handler]
    logging.captureWarnings(True)
    for name in ("halfbyte.serve", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    service, failure = Service(config), []
    app = create_app(service)

    def load_engine() -> None:
        try:
            service.engine = make_engine(load(), config, adapters)
            log.info(json.dumps({"message": "ready", "model": config.name}))
        except BaseException as error:
            failure.append(error)
            server.should_exit = True

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        service.draining = True
        if service.engine is not None:
            await asyncio.to_thread(service.engine.close)

    app.router.lifespan_context = lifespan
    server = Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=config.drain_timeout,
        )
    )
    server.loader = threading.Thread(target=load_engine, name="halfbyte-load", daemon=True)
    server.run()
    if failure:
        raise failure[0]


def make_engine(
    model: Decoder, config: ServeConfig, adapters: Mapping[str, str | Path] | None = None
) -> Engine:
    """The engine of a server. Raises ValueError for a model without a tokenizer."""
    if model.tokenizer is None:
        raise ValueError("serve: expected a model with a tokenizer, but model.tokenizer is None")
    return Engine(
        model,
        adapters=adapters,
        max_batch=config.max_batch,
        kv_budget=config.kv_budget,
        max_waiting=config.max_waiting,
        kv_dtype=config.kv_dtype,
    )
