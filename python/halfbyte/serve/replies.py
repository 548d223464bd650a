"""Replies on their way to the client: waited for, timed, cancelled when it leaves."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from halfbyte.engine import Engine
from halfbyte.scheduler import Request
from halfbyte.serve.metrics import Metrics

KEEP_ALIVE = 15.0


class Timeout(Exception):
    """A reply that took longer than the server allows."""


class Closed(Exception):
    """A reply that the engine's close cut off."""


class Replies:
    """The replies to one HTTP request, each a choice of the answer, n to each prompt.

    Whoever iterates gets (choice, text) as text comes, (choice, None) at the end of a choice and
    None when nothing came for 15 seconds. Leaving early cancels what is not done.
    """

    def __init__(
        self, engine: Engine, requests: list[Request], n: int, metrics: Metrics, timeout: float
    ) -> None:
        self.engine, self.requests, self.metrics = engine, requests, metrics
        self.n = n
        self.started = time.monotonic()
        self.deadline = self.started + timeout
        self.first_text: float | None = None
        self.last_text: list[float | None] = [None] * len(requests)

    def usage(self) -> dict[str, int]:
        # The n choices of one prompt share it.
        prompt = sum(len(request.prompt) for request in self.requests[:: self.n])
        reply = sum(len(request.reply.tokens) for request in self.requests)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
        }

    async def __aiter__(self) -> AsyncGenerator[tuple[int, str | None] | None, None]:
        beat = min(KEEP_ALIVE, self.deadline - self.started)
        arrivals = self.engine.arrivals(self.requests, beat)
        sent = self.started
        try:
            async for item in arrivals:
                now = time.monotonic()
                if now >= self.deadline:
                    raise Timeout
                if item is not None:
                    self._check(*item)
                    self._time(*item, now)
                if item is not None or now - sent >= KEEP_ALIVE:
                    sent = now
                    yield item
        finally:
            self.cancel()
            await arrivals.aclose()
            self._count()

    def _check(self, choice: int, text: str | None) -> None:
        """Raise Closed at the end of a reply that has none of its own."""
        if text is None and self.requests[choice].reply.finish_reason == "cancelled":
            raise Closed

    def _time(self, choice: int, text: str | None, now: float) -> None:
        if text is None:
            return
        last = self.last_text[choice]
        kind = self.metrics.first_token if last is None else self.metrics.between
        kind.observe(now - (self.started if last is None else last))
        self.first_text = self.first_text or now - self.started
        self.last_text[choice] = now

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
