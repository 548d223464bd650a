"""Replies on their way to the client: waited for, timed, cancelled when it leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from halfbyte.engine import Engine
from halfbyte.scheduler import Request
from halfbyte.serve.metrics import Metrics

KEEP_ALIVE = 15.0


class Timeout(Exception):
    """A reply that took longer than the server allows."""


class Replies:
    """The replies to one HTTP request, each a choice of the answer.

    Whoever iterates gets (choice, text) as text comes, (choice, None) at the end of a choice and
    None when nothing came for 15 seconds. Leaving early cancels what is not done.
    """

    def __init__(
        self, engine: Engine, requests: list[Request], metrics: Metrics, timeout: float
    ) -> None:
        self.engine, self.requests, self.metrics = engine, requests, metrics
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.first_text: float | None = None

    def usage(self) -> dict[str, int]:
        # Choices of one prompt share it.
        prompts = {tuple(request.prompt) for request in self.requests}
        prompt = sum(map(len, prompts))
        reply = sum(len(request.reply.tokens) for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
        }

    async def __aiter__(self) -> AsyncGenerator[tuple[int, str | None] | None, None]:
        queue: asyncio.Queue[tuple[int, str | None] | Exception] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._forward(choice, request, queue))
            for choice, request in enumerate(self.requests)
        ]
        try:
            open_choices = len(tasks)
            while open_choices:
                left = self.deadline - time.monotonic()
                try:
                    item = await asyncio.wait_for(queue.get(), max(0.0, min(left, KEEP_ALIVE)))
                except asyncio.TimeoutError:
                    if time.monotonic() >= self.deadline:
                        raise Timeout from None
                    yield None
                    continue
                if isinstance(item, Exception):
                    raise item
                open_choices -= item[1] is None
                yield item
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            self._count()

    async def _forward(self, choice: int, request: Request, queue: asyncio.Queue) -> None:
        last = self.started
        try:
            async for piece in self.engine.arrivals(request):
                now = time.monotonic()
                first = last == self.started
                (self.metrics.first_token if first else self.metrics.between).observe(now - last)
                self.first_text = self.first_text or now - self.started
                last = now
                queue.put_nowait((choice, piece))
            queue.put_nowait((choice, None))
        except Exception as error:
            queue.put_nowait(error)

    async def whole(self) -> None:
        """Wait for all of it."""
        async for _ in self:
            pass

    def cancel(self) -> None:
        for request in self.requests:
            request.cancelled = True

    def _count(self) -> None:
        metrics, usage = self.metrics, self.usage()
        metrics.duration.observe(time.monotonic() - self.started)
        metrics.prompt_tokens.inc(usage["prompt_tokens"])
        metrics.reply_tokens.inc(usage["completion_tokens"])
        for request in self.requests:
            metrics.finished.labels(request.reply.finish_reason or "cancelled").inc()
