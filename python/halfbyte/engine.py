"""Engine: requests in, replies out, over one model that is loaded or being trained."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from halfbyte.adapters import Adapter
from halfbyte.errors import ContextLengthError
from halfbyte.grammar import Vocabulary
from halfbyte.kv_cache import KVCache, block_bytes, blocks_for, check_kv_dtype
from halfbyte.models import Decoder
from halfbyte.models.config import token_ids
from halfbyte.ops.paged_attention import BLOCK
from halfbyte.reply import Reply, ReplyText, TokenLogprobs
from halfbyte.sampling import Sampling
from halfbyte.scheduler import Request, Scheduler

# Rows that run at once, at most: the largest bucket of a decode step.
MAX_BATCH = 32
# Share of the free device memory, and bytes of host memory, that a cache takes unless told.
DEVICE_SHARE = 0.8
HOST_BYTES = 1 << 30


class Completion(NamedTuple):
    """One whole reply. text: None where the model has no tokenizer."""

    token_ids: list[int]
    text: str | None
    finish_reason: str
    usage: dict[str, int]
    logprobs: list[TokenLogprobs]


class Stats(NamedTuple):
    """What an engine is at: requests, blocks of 16 tokens, and blocks found by their prefix."""

    running_requests: int
    waiting_requests: int
    used_blocks: int
    total_blocks: int
    prefix_hit_blocks: int


class Stream:
    """Iterator over the text of one reply, always valid UTF-8, never part of a stop string.

    Afterwards (and so far, meanwhile): finish_reason, "stop" (eos or stop string), "length",
    "context" or, after close(), "cancelled"; token_ids; logprobs; usage, token counts named as in
    OpenAI's API. `async for` works too, fed by the engine's own thread.
    """

    def __init__(self, engine: Engine, request: Request, model: Decoder) -> None:
        self._engine, self._request = engine, request
        # The engine of `halfbyte.stream` does not keep it.
        self._model = model

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        if not self._engine._advance(self._request):
            raise StopIteration
        return self._request.pieces.popleft()

    async def __aiter__(self) -> AsyncIterator[str]:
        if self._request.listener is not None:
            raise RuntimeError("the stream is being read already. Hint: let one task read it")
        try:
            async for item in self._engine.arrivals([self._request]):
                if item is not None and item[1] is not None:
                    yield item[1]
        finally:
            self._request.cancelled = True

    def close(self) -> None:
        """Stop here; the tokens that are out stay."""
        self._engine._cancel(self._request)
        self._request.pieces.clear()

    def __del__(self) -> None:
        self._request.cancelled = True

    @property
    def finish_reason(self) -> str | None:
        return self._request.reply.finish_reason

    @property
    def token_ids(self) -> list[int]:
        return self._request.reply.tokens

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        return self._request.reply.logprobs

    @property
    def usage(self) -> dict[str, int]:
        return self._request.reply.usage


class Engine:
    """Runs prompts of any lengths and settings together, one token a step each.

    A `with` block closes it at its end.

    model: a loaded Decoder, or one that is being trained: weights are read where they are, so
    replies come from what they are now; call `refresh` after they have changed or moved, since the
    cache still holds what the old ones wrote. adapters: LoRA adapters by name, folders that PEFT or
    halfbyte saved, over a model that carries none itself; requests choose one, and all run in one
    batch. On a GPU they join the launches of a step's products: of compute capability 9.0 over
    doubly quantized weights always, else for up to 8 rows if their ranks together are at most 256;
    else each layer takes slower ones of its own. max_batch: sequences that run at once, at most 32;
    others wait. kv_budget: bytes for keys and values; default: what max_batch sequences of the
    model's whole context need, but at most 80 % of the free device memory (1 GiB on the CPU).
    max_waiting: requests that may wait before QueueFullError; None: any number. kv_dtype: "int8"
    keeps keys and values in 8 bits, so that the budget holds nearly twice the tokens (see KVCache);
    None: in the model's dtype.

    What else runs does not choose a request's tokens. On a GPU a step's logits have the same bits
    for up to 8 rows, 16 where none uses an adapter, over double-quantized 4-bit layers whose inputs
    are multiples of 256; larger batches and other layers sum in another order, so two tokens whose
    logits lie within rounding may change places. So may they where a prompt's beginning was found
    in the cache, which leaves other chunks to read.

    Not bound to a thread: whoever waits for a reply drives the engine, and an async caller has it
    driven by a thread of its own.
    """

    def __init__(
        self,
        model: Decoder,
        adapters: Mapping[str, str | os.PathLike[str]] | None = None,
        max_batch: int = MAX_BATCH,
        kv_budget: int | None = None,
        max_waiting: int | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        check_kv_dtype(kv_dtype)
        if not 1 <= max_batch <= MAX_BATCH:
            raise ValueError(f"max_batch: expected 1 to {MAX_BATCH}, got {max_batch!r}")
        self.model = model
        embedding = model.model.embed_tokens.weight
        self._weights, self._place = _addresses(model), _place(model)
        most = max_batch * blocks_for(model.config.max_position_embeddings)
        each = block_bytes(model.config, embedding.dtype, kv_dtype)
        budget = _default_budget(embedding.device) if kv_budget is None else kv_budget
        if budget < each:
            raise ValueError(
                f"kv_budget: expected at least {each} bytes ({BLOCK} tokens), got {budget}"
            )
        with torch.inference_mode():
            cache = KVCache(
                model.config,
                1 + min(most, budget // each),
                embedding.dtype,
                embedding.device,
                kv_dtype,
            )
            self._scheduler = Scheduler(model, cache, max_batch, max_waiting)
        # Prefixes of other generations are not found, also those that running requests leave.
        self._generation = 0
        self._closed = False
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._driver: threading.Thread | None = None
        for name, folder in (adapters or {}).items():
            self.load_adapter(name, folder)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters that requests can name."""
        return dict(self._scheduler.decode.adapters.by_name)

    def load_adapter(self, name: str, folder: str | os.PathLike[str]) -> Adapter:
        """Load an adapter, or load it anew; running requests go on with what they began with.

        Raises CheckpointError for files that do not fit, ValueError where the model carries an
        adapter of its own.
        """
        self._check_open()
        decode = self._scheduler.decode
        adapter = decode.adapters.read(name, folder)
        with self._lock, torch.inference_mode():
            self._check_open()  # reading takes a while
            decode.adapters.add(adapter)
            self._scheduler.rearrange()
        return adapter

    def unload_adapter(self, name: str) -> None:
        """Let no more requests use an adapter; its memory is freed when the last one has ended.

        Raises AdapterNotFoundError.
        """
        decode = self._scheduler.decode
        with self._lock, torch.inference_mode():
            self._check_open()
            decode.adapters.remove(name)
            self._scheduler.rearrange()

    def close(self) -> None:
        """End all requests and give the model back as it was before it got adapters.

        Nothing runs afterwards: a request for an adapter would be answered by the model alone.
        """
        with self._lock:
            self._closed = True
            self._scheduler.abandon(None)
            self._scheduler.decode.adapters.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine was closed. Hint: make a new one")

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | Tensor,
        sampling: Sampling | None = None,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Any:
        """The Completion of a prompt, or of each prompt of a batch; all run together.

        prompts: text or token ids, or a list of these; an empty list is no prompt, so that nothing
        comes of it, while "" or [[]] is an empty one. The reply to text goes on with it, so that
        its first word keeps its space; that to ids is what its own ids decode to. sampling: greedy
        by default; overrides are its fields. adapter: the name of one that is loaded. Raises what
        `submit` raises; FloatingPointError for logits that are not finite.
        """
        requests = self._submit_all(prompts, replace(sampling or Sampling(), **overrides), adapter)
        self.run(requests)
        return _completions(prompts, requests)

    def stream(
        self,
        prompt: str | Sequence[int] | Tensor,
        sampling: Sampling | None = None,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Stream:
        """Like `generate` for one prompt, as an iterator over its text, also for `async for`.

        Raises ValueError when the model has no tokenizer.
        """
        if is_batch(prompt):
            raise ValueError("stream: expected the ids of one prompt, got a batch")
        sampling = replace(sampling or Sampling(), **overrides)
        tokenizer_of(self.model, "stream")
        return Stream(self, self.submit(prompt, sampling, adapter), self.model)

    async def agenerate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | Tensor,
        sampling: Sampling | None = None,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Any:
        """`generate`, awaited; cancelling the task cancels the requests."""
        requests = self._submit_all(prompts, replace(sampling or Sampling(), **overrides), adapter)
        try:
            async for _ in self.arrivals(requests):
                pass
        finally:
            for request in requests:
                request.cancelled = True
        return _completions(prompts, requests)

    def _submit_all(self, prompts: Any, sampling: Sampling, adapter: str | None) -> list[Request]:
        """A request for each prompt, or none where one is refused."""
        requests: list[Request] = []
        try:
            for prompt in prompts if is_batch(prompts, empty=True) else [prompts]:
                requests.append(self.submit(prompt, sampling, adapter))
        except BaseException:
            for request in requests:
                self._cancel(request)
            raise
        return requests

    def submit(
        self,
        prompt: str | Sequence[int] | Tensor,
        sampling: Sampling,
        adapter: str | None = None,
    ) -> Request:
        """Queue one prompt; the request is worked on when someone waits for it.

        Raises RuntimeError after `close` and for a model that is `stale`, ValueError for token ids
        that it does not have, for a least length where every id ends the reply and for a JSON
        schema that is not supported, ContextLengthError for a prompt longer than the model's
        context or the cache, AdapterNotFoundError, QueueFullError, ImportError where an extra is
        missing.
        """
        self._check_open()
        if self.stale:
            raise RuntimeError(
                "the model's weights were moved or its layers exchanged after the engine was made. "
                "Hint: engine.refresh() follows them"
            )
        ids = checked_prompt(self.model, prompt)
        context = self.model.config.max_position_embeddings
        ends = _ends(self.model, sampling)
        text = None
        if self.model.tokenizer is not None or sampling.stop:
            tokenizer = tokenizer_of(self.model, "stop strings")
            continues = isinstance(prompt, str) and bool(prompt)
            text = ReplyText(tokenizer, sampling.stop, continues)
        grammar = None
        if sampling.json_schema is not None:
            grammar = self._vocabulary.grammar(sampling.json_schema, self._scheduler.cache.device)
        reply = Reply(len(ids), ends, sampling.max_new_tokens, context, text, grammar)
        adapters = self._scheduler.decode.adapters
        chosen = None if adapter is None else adapters.acquire(adapter)
        root = (self._generation, chosen and chosen.generation)
        request = Request(ids, sampling, _seed(sampling), reply, root, chosen)
        try:
            if not request.done:
                self._scheduler.submit(request)
                self._work.set()
                return request
        except Exception:
            if chosen is not None:
                adapters.release(chosen)
            raise
        if chosen is not None:
            adapters.release(chosen)
        return request

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        tokenizer = tokenizer_of(self.model, "json_schema")
        return Vocabulary(tokenizer, self.model.config.vocab_size, eos_ids(self.model))

    def run(self, requests: Sequence[Request]) -> None:
        """Work until all these requests are done. Raises the first one's error, if any has one."""
        try:
            for request in requests:
                while self._advance(request):
                    # Where many wait, text is read from the reply at the end.
                    request.pieces.clear()
        finally:
            # After an error or Ctrl-C nobody waits for the others.
            for request in requests:
                request.cancelled = True

    def refresh(self) -> None:
        """Follow the model's weights, which have changed: forget cached prefixes, and where they
        were moved or layers exchanged, what was captured.

        Raises ValueError where the model is on another device or in another dtype than the cache.
        """
        if self.misplaced:
            raise ValueError(
                f"refresh: expected the model on {self._place[0]} in {self._place[1]}, as the "
                f"cache is, got {_place(self.model)}. Hint: make a new engine"
            )
        with self._lock:
            self._generation += 1
            self._scheduler.prefixes.clear()
            weights = _addresses(self.model)
            if weights != self._weights:
                self._scheduler.forget_captured()
                self._weights = weights

    @property
    def stale(self) -> bool:
        """Whether the model's weights lie elsewhere than `refresh` or the beginning found them."""
        return self._weights != _addresses(self.model)

    @property
    def misplaced(self) -> bool:
        """Whether the model was given another device or dtype, so that a new engine is needed."""
        return self._place != _place(self.model)

    @property
    def capacity(self) -> tuple[int, int]:
        """Sequences that run at once, and tokens that the cache holds."""
        return self._scheduler.max_batch, self._scheduler.prefixes.blocks * BLOCK

    @property
    def stats(self) -> Stats:
        scheduler = self._scheduler
        prefixes = scheduler.prefixes
        running = len(scheduler.running) + len(scheduler.prefilling)
        waiting = len(scheduler.waiting)
        return Stats(running, waiting, prefixes.held, prefixes.blocks, prefixes.hits)

    def _advance(self, request: Request) -> bool:
        """Step until the request has text to fetch; False when it is done and all is fetched."""
        while not request.pieces:
            if request.done:
                if request.error is not None:
                    raise request.error
                return False
            with self._lock:
                if not request.pieces and not request.done:
                    self._step()
        return True

    def _advance_once(self) -> None:
        """One step of whatever there is to do."""
        with self._lock:
            self._step()

    def _step(self) -> None:
        if self._closed:  # while a request was on its way in
            self._scheduler.abandon(None)
            return
        device = self._scheduler.cache.device
        try:
            # The thread's own device, which graphs and events go by, may be another, and so may the
            # dtype that its autocast computes in.
            on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            with on_device, torch.autocast(device.type, enabled=False):
                self._scheduler.step()
        except BaseException as error:
            self._scheduler.abandon(error if isinstance(error, Exception) else None)
            raise

    def _cancel(self, request: Request) -> None:
        request.cancelled = True
        with self._lock:
            self._scheduler.reap()

    async def arrivals(
        self, requests: Sequence[Request], beat: float | None = None
    ) -> AsyncGenerator[tuple[int, str | None] | None, None]:
        """The text of requests as it comes, made by a thread of the engine's own.

        Yields (place of a request, text), (place, None) when its reply has ended, and None from
        time to time where nothing comes, at least every `beat` seconds. Raises a request's error.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            # Who was told and has not looked yet will find this too.
            if not arrived.is_set():
                # A loop that was closed meanwhile has no one to tell.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(arrived.set)

        for request in requests:
            request.listener = tell
        self._drive()
        beating = beat and loop.create_task(_beat(arrived, beat))
        left = dict(enumerate(requests))
        try:
            while left:
                arrived.clear()
                nothing = True
                for item in _fetch(left):
                    nothing = False
                    yield item
                if nothing and beat:
                    yield None
                if left:
                    await arrived.wait()
        finally:
            for request in requests:
                request.listener = None
            if beating:
                beating.cancel()

    def _drive(self) -> None:
        """Have a thread of its own step the engine from now on."""
        self._work.set()
        # A forked process has none of the threads.
        if self._driver is None or not self._driver.is_alive():
            self._driver = threading.Thread(
                target=_drive, args=(weakref.ref(self),), name="halfbyte-engine", daemon=True
            )
            self._driver.start()


def _fetch(left: dict[int, Request]) -> Iterator[tuple[int, str | None]]:
    """What has come of the requests that are left; those that have ended leave."""
    for place, request in list(left.items()):
        done = request.done
        # Whoever is slower than the engine gets several pieces as one.
        if text := "".join(request.pieces.popleft() for _ in range(len(request.pieces))):
            yield place, text
        if done:
            if request.error is not None:
                raise request.error
            del left[place]
            yield place, None


async def _beat(arrived: asyncio.Event, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        arrived.set()


def _drive(reference: weakref.ref[Engine]) -> None:
    """Step while there is work; ends with the engine."""
    while (engine := reference()) is not None:
        work, scheduler = engine._work, engine._scheduler
        try:
            with engine._lock:
                if scheduler.busy:
                    engine._step()
                else:
                    work.clear()
                    if scheduler.busy:
                        work.set()
        except Exception:
            # Every request was told; the thread serves those that come.
            pass
        del engine, scheduler
        work.wait(timeout=1.0)


def _addresses(model: Decoder) -> tuple[int, ...]:
    """What a captured step depends on beside its inputs: where every weight lies."""
    return tuple(p.data_ptr() for p in model.parameters())


def _place(model: Decoder) -> tuple[torch.device, torch.dtype]:
    weight = model.model.embed_tokens.weight
    return weight.device, weight.dtype


def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(DEVICE_SHARE * (free + unused))


def _completions(prompts: Any, requests: list[Request]) -> Any:
    completions = [_completion(request) for request in requests]
    return completions if is_batch(prompts, empty=True) else completions[0]


def _completion(request: Request) -> Completion:
    reply = request.reply
    text = None if reply.text is None else reply.text.given
    return Completion(reply.tokens, text, str(reply.finish_reason), reply.usage, reply.logprobs)


def _seed(sampling: Sampling) -> int:
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling.seed or 0
    return int(torch.randint(1 << 62, (), device="cpu"))


def _ends(model: Decoder, sampling: Sampling) -> set[int]:
    """The ids that end a reply. Raises ValueError for settings that no reply can follow."""
    size = model.config.vocab_size
    for name in ("stop_ids", "logit_bias"):
        for token in getattr(sampling, name):
            if token >= size:
                raise ValueError(f"{name}: expected ids below {size}, got {token}")
    ends = eos_ids(model) | set(sampling.stop_ids)
    if sampling.min_new_tokens > 0 and len(ends) >= size:
        raise ValueError("stop_ids: expected an id that ends no reply, beside min_new_tokens")
    return ends


def eos_ids(model: Decoder) -> set[int]:
    """Every id that ends a reply: those of the generation config and those of the config."""
    generation = token_ids(model.generation_config.get("eos_token_id"))
    return {*generation, *model.config.eos_token_ids}


def tokenizer_of(model: Decoder, purpose: str) -> Any:
    if model.tokenizer is None:
        raise ValueError(
            f"{purpose}: expected a model with a tokenizer, but model.tokenizer is None"
        )
    return model.tokenizer


def checked_prompt(model: Decoder, prompt: Any) -> list[int]:
    """The ids of a prompt given as text or ids; the bos token stands for an empty one."""
    if isinstance(prompt, str):
        ids = tokenizer_of(model, "prompt").encode(prompt, add_special_tokens=True)
    else:
        ids = _ids_of(prompt)
    config = model.config
    if not ids:
        bos = config.bos_token_id
        if bos is None:
            raise ValueError("prompt: expected at least one token: the model has no bos token")
        ids = [bos]
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"prompt: expected ids in 0 to {config.vocab_size - 1}, got {token}")
    if len(ids) > config.max_position_embeddings:
        raise ContextLengthError(
            f"prompt: expected at most {config.max_position_embeddings} tokens "
            f"(max_position_embeddings), got {len(ids)}; shorten it"
        )
    return ids


def _ids_of(prompt: Any) -> list[int]:
    """Raises TypeError for what is no sequence of whole numbers."""
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise TypeError(
            f"prompt: expected text or token ids, got {type(prompt).__name__}. "
            "Hint: halfbyte.chat takes messages, model.tokenizer.chat_ids makes ids of them"
        )
    ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    for token in ids:
        if not isinstance(token, Integral):
            raise TypeError(f"prompt: expected token ids, got {token!r} among them")
    return [int(token) for token in ids]


def is_batch(prompts: Any, empty: bool = False) -> bool:
    """Whether this is a list of prompts, not one; `empty` is the answer for a list of nothing."""
    if isinstance(prompts, Tensor):
        if prompts.dim() not in (1, 2):
            raise ValueError(f"ids: expected a tensor [T] or [B, T], got {list(prompts.shape)}")
        return prompts.dim() == 2
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sized):
        return False
    return not isinstance(prompts[0], Integral) if len(prompts) else empty  # type: ignore[index]
