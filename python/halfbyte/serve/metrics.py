"""What Prometheus can read of a server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from halfbyte.engine import Stats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters and histograms of one server; the engine's numbers are read when asked for."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"halfbyte_{name}", text, buckets=SECONDS, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"halfbyte_{name}", text, labels, registry=registry)

        self.first_token = histogram("time_to_first_token_seconds", "Until the first text.")
        self.between = histogram("inter_token_seconds", "Between two pieces of text.")
        self.duration = histogram("request_seconds", "Until a request has ended.")
        self.requests = counter("requests", "Requests by status of the answer.", "status")
        self.finished = counter("replies", "Replies by how they ended.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.reply_tokens = counter("reply_tokens", "Tokens of replies.")
        for name in Stats._fields:
            gauge = Gauge(f"halfbyte_{name}", f"{name.replace('_', ' ')} now.", registry=registry)
            gauge.set_function(partial(_read, stats, name))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _read(stats: Callable[[], Stats], name: str) -> float:
    return getattr(stats(), name)
