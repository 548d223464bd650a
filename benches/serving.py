"""The server beside the engine it serves: the same prompts, all at once, greedy.

The server runs in this process, its clients in others, which read raw bytes as they come. Tokens
are random strings, so that every one of them is a chunk of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from statistics import median, quantiles
from string import ascii_lowercase

import torch
import uvicorn
from bench import append_row, rate_row, summary
from journey import SHAPES, random_model

from halfbyte.checkpoint import default_device
from halfbyte.engine import Engine
from halfbyte.models import Decoder
from halfbyte.sampling import Sampling
from halfbyte.serve.app import Service, create_app
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.server import make_engine
from halfbyte.tokenizer import Tokenizer

PROCESSES = 4
# Longer than any reply here.
SCHEMA = {"type": "string", "minLength": 1 << 16}


def tokenizer(vocab_size: int) -> Tokenizer:
    """The printable characters, then words of two to four letters."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = ("".join(word) for n in (2, 3, 4) for word in product(ascii_lowercase, repeat=n))
    texts = chain(map(chr, range(ord("!"), ord("~") + 1)), words)
    vocab = {text: i for i, text in zip(range(vocab_size), texts, strict=False)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        (Path(folder) / "tokenizer_config.json").write_text("{}")
        return Tokenizer.from_folder(folder)


@contextmanager
def serving(model: Decoder, streams: int) -> Iterator[tuple[Engine, int]]:
    """Yields the engine and the port of a server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = ServeConfig(name="random", port=port, max_batch=streams, max_waiting=2 * streams)
    service = Service(config)
    service.engine = make_engine(model, config)
    settings = uvicorn.Config(create_app(service), port=port, log_level="error", lifespan="off")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield service.engine, port
    server.should_exit = True
    thread.join()


async def stream(port: int, prompt: list[int], tokens: int) -> list[float]:
    """When each chunk of text came."""
    body = {"model": "random", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    raw = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    writer.write(head.encode() + raw)
    times = []
    while b"[DONE]" not in (line := await reader.readline()):
        assert line, "the server closed the connection"
        if line.startswith(b"data:"):
            times.append(time.perf_counter())
    writer.close()
    return times


def client(pipe, port: int) -> None:
    """One process of clients: prompts in, the times of their chunks out."""

    async def all_of(prompts: list[list[int]], tokens: int) -> list[list[float]]:
        return await asyncio.gather(*(stream(port, prompt, tokens) for prompt in prompts))

    while (work := pipe.recv()) is not None:
        pipe.send(asyncio.run(all_of(*work)))


class Clients:
    """Processes that ask all at once."""

    def __init__(self, port: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(PROCESSES):
            own, other = context.Pipe()
            self.processes.append(context.Process(target=client, args=(other, port), daemon=True))
            self.processes[-1].start()
            self.pipes.append(own)

    def ask(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[float]]:
        """Seconds until all have all, and the seconds between chunks of a stream."""
        start = time.perf_counter()
        for i, pipe in enumerate(self.pipes):
            pipe.send((prompts[i::PROCESSES], tokens))
        times = [one for pipe in self.pipes for one in pipe.recv()]
        took = time.perf_counter() - start
        return took, [b - a for one in times for a, b in zip(one, one[1:], strict=False)]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=int, default=0, help="also so many rows with a schema")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(args.shape, default_device())
    model.tokenizer = tokenizer(model.config.vocab_size)
    prompts = torch.randint(0, model.config.vocab_size, (args.streams, args.prompt)).tolist()
    with serving(model, args.streams) as (engine, port):
        clients = Clients(port)

        def alone() -> float:
            engine.refresh()
            start = time.perf_counter()
            engine.generate(prompts, max_new_tokens=args.tokens)
            return time.perf_counter() - start

        def served() -> tuple[float, list[float]]:
            engine.refresh()
            return clients.ask(prompts, args.tokens)

        def with_json() -> float:
            engine.refresh()
            start = time.perf_counter()
            settings = [Sampling(max_new_tokens=args.tokens)] * args.streams
            settings[: args.json] = [replace(settings[0], json_schema=SCHEMA)] * args.json
            engine.run([engine.submit(*work) for work in zip(prompts, settings, strict=True)])
            return time.perf_counter() - start

        works = {"halfbyte": served, "the engine alone": lambda: (alone(), [])}
        if args.json:
            works[f"the engine, {args.json} of them JSON"] = lambda: (with_json(), [])
        # The first two rounds capture the steps.
        rounds = [{name: work() for name, work in works.items()} for _ in range(args.rounds + 2)]
        clients.close()
    times = {name: summary([one[name][0] for one in rounds[2:]]) for name in works}
    between = [gap for one in rounds[2:] for gap in one["halfbyte"][1]]
    middle, worst = median(between), quantiles(between, n=100)[98]
    fields = {"dtype": "bf16", "model": f"llama-{args.shape}", "batch": args.streams}
    fields |= {"seq": args.prompt, "new_tokens": args.tokens}
    row = rate_row("serving", args.streams * args.tokens, times, **fields)
    row |= {"inter_token_us": round(middle * 1e6), "inter_token_p99_us": round(worst * 1e6)}
    share = times["the engine alone"].median / times["halfbyte"].median
    print(f"serving {fields}: {row['tokens_per_s']} tokens/s, {share:.1%} of {row['peers']}")
    print(f"between tokens: median {middle * 1e3:.2f} ms, p99 {worst * 1e3:.2f} ms")
    append_row("serving", row)


if __name__ == "__main__":
    main()
