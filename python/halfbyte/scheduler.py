"""Continuous batching: who waits, whose prompt is read, who gets the next token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from typing import NamedTuple

import torch

from halfbyte.adapters import Adapter
from halfbyte.capture import Pool
from halfbyte.decode import DecodeStep, Results
from halfbyte.errors import ContextLengthError, QueueFullError
from halfbyte.kv_cache import KVCache, blocks_for
from halfbyte.models import Decoder
from halfbyte.prefill import CHUNK, Prefill
from halfbyte.prefix_cache import PrefixCache
from halfbyte.reply import Reply, TokenLogprobs
from halfbyte.sampling import NOT_FINITE, Kind, Sampled, Sampling


class Request:
    """A prompt on its way to its reply.

    pieces: text that became certain and was not fetched yet. done: whether the reply has ended and
    its last text is among the pieces. root: what its cached prefix depends on beside its tokens.
    error: why the reply ended with "error". listener: called, on the thread that steps, after
    pieces came or the reply ended. cancelled: set it from any thread; the next step ends the reply.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int,
        reply: Reply,
        root: Hashable = None,
        adapter: Adapter | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.sampling, self.kind = sampling, sampling.kind
        self.seed = seed
        self.reply = reply
        self.root = root
        self.adapter = adapter
        self.pieces: deque[str] = deque()
        self.done = reply.finish_reason is not None
        self.error: Exception | None = None
        self.listener: Callable[[], object] | None = None
        self.cancelled = False
        self.cached_tokens = 0
        # The scheduler's: blocks held, prompt tokens in the cache, tokens sampled so far.
        self.blocks: list[int] = []
        self.prefilled = 0
        self.sampled = 0

    @property
    def most_blocks(self) -> int:
        """What it may need: its last token is never fed."""
        return blocks_for(len(self.prompt) + self.reply.most_tokens)


class Pending(NamedTuple):
    """A launched step that was not read yet: whose token is in which place of its results."""

    results: Results
    places: list[tuple[int, Request]]


class Scheduler:
    """Runs requests over one model and cache, up to `max_batch` at a time, first come first served.

    Each `step` reads at most one chunk of a prompt and gives every running sequence one token.
    Chunks go in turn to the oldest prompt and to the one that has least left: a short one does not
    wait for a long one, nor a long one for all short ones, and equal ones are read one after the
    other. A request starts when the blocks that it may ever need are free, so none is ever put
    back. On CUDA a step is launched before the one before it is read. Where a request follows a
    grammar, the draw of tokens waits for the next `step`: the host makes masks while the forward
    runs.

    Raises ContextLengthError for a request that no empty cache could hold, QueueFullError when
    `max_waiting` requests wait already.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        max_batch: int,
        max_waiting: int | None = None,
    ) -> None:
        self.cache = cache
        self.prefixes = PrefixCache(cache.blocks)
        # One block more than a sequence can have, so that a table never ends in a block of its own.
        width = min(blocks_for(model.config.max_position_embeddings), self.prefixes.blocks) + 1
        pool = Pool(cache.device)
        self.decode = DecodeStep(model, cache, max_batch, width, pool)
        self.prefill = Prefill(model, cache, width, pool)
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.lookahead = 1 if cache.device.type == "cuda" else 0
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        # Whose turn it is.
        self.oldest = True
        self.running: list[Request] = []
        self.pending: deque[Pending] = deque()

    def submit(self, request: Request) -> None:
        """Queue a request, from any thread."""
        if request.most_blocks > self.prefixes.blocks:
            raise ContextLengthError(
                f"a prompt of {len(request.prompt)} tokens and up to {request.reply.most_tokens} "
                f"new ones do not fit the cache of {self.prefixes.blocks * 16} tokens; shorten the "
                "prompt, ask for fewer new tokens or raise the cache's budget"
            )
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests wait already; try again later")
        self.waiting.append(request)

    def reap(self) -> None:
        """End what was cancelled; tokens so far stay."""
        for request in [*self.waiting, *self.prefilling, *self.running]:
            if request.cancelled:
                self._end(request, "cancelled")

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.prefilling or self.running or self.pending)

    @property
    def undrawn(self) -> bool:
        """Whether a forward was launched whose tokens wait for what grammars allow."""
        return self.decode.logits is not None

    @torch.inference_mode()
    def step(self) -> None:
        """Launch one step of everything that can go on, then read the one before it."""
        self.reap()
        if self.undrawn:
            self._draw()
        self._admit()
        if self.prefilling:
            oldest, shortest = self.prefilling[0], min(self.prefilling, key=_left)
            self._prefill(oldest if self.oldest else shortest)
            self.oldest = not self.oldest
        # Without lookahead a first token is read before anyone gets another.
        launched = self._decode() if self.lookahead or not self.pending else False
        # What grammars allow next depends on all tokens so far, which are read meanwhile.
        ahead = self.lookahead if launched and not self.undrawn else 0
        while len(self.pending) > ahead:
            self._read(self.pending.popleft())

    @torch.inference_mode()
    def abandon(self, error: Exception | None) -> None:
        """End every request, cancelled if there is no error, and forget what is cached.

        After a step that was not finished no one knows what the cache holds.
        """
        requests = [*self.waiting, *self.prefilling, *self.running]
        self.decode.logits = None
        # Whoever waits for a launch that never came would trust what it finds there later.
        for words in (self.decode.words, self.decode.arrived, self.prefill.words):
            words.zero_()
        for row in range(self.max_batch):
            self.decode.remove(row)
        for queue in (self.pending, self.waiting, self.prefilling, self.running):
            queue.clear()
        for request in requests:
            request.error = error
            self._end(request, "cancelled" if error is None else "error")
        self.prefixes.clear()

    def forget_captured(self) -> None:
        """Capture the forwards anew, because the model's weights lie elsewhere."""
        self.decode.forwards.clear()
        self.prefill.forwards.clear()

    def rearrange(self) -> None:
        """Follow adapters that came or went."""
        self.decode.rearrange()
        self.prefill.rearrange()

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.prefilling) < self.max_batch:
            request = self.waiting[0]
            shared = self.prefixes.match(request.root, request.prompt)
            own = self.prefixes.take(request.most_blocks - len(shared))
            if own is None:
                self.prefixes.release(shared)
                return
            request.blocks = shared + own
            request.prefilled = request.cached_tokens = len(shared) * 16
            self.prefilling.append(self.waiting.popleft())

    def _prefill(self, request: Request) -> None:
        """Read the next chunk of a prompt; after the last one the request runs."""
        ids = request.prompt[request.prefilled : request.prefilled + CHUNK]
        adapted = request.adapter is not None
        with self.decode.adapters.only(request.adapter):
            logits = self.prefill.read(ids, request.blocks, request.prefilled, adapted)
        request.prefilled += len(ids)
        if request.prefilled < len(request.prompt):
            return
        self._start(request, logits)

    def _start(self, request: Request, logits: torch.Tensor) -> None:
        """Sample the first token and let the request run in the first free row."""
        row = len(self.running)
        try:
            self._occupy(row, request)
        except Exception as error:
            # It concerns no other: nothing but the settings of a free row was touched.
            self.decode.remove(row)
            request.error = error
            self._end(request, "error")
            return
        results = self.decode.sample(logits, row, request.kind)
        self.prefilling.remove(request)
        self.running.append(request)
        request.sampled = 1
        self.pending.append(Pending(results, [(0, request)]))

    def _occupy(self, row: int, request: Request) -> None:
        rows, ends = self.decode.sampling, sorted(request.reply.ends)
        rows.set(row, request.sampling, request.seed, request.prompt, (), ends)
        if request.reply.grammar is not None:
            rows.allow(row, request.reply.grammar.mask)
        self.decode.place(row, request.blocks, request.adapter)

    def _decode(self) -> bool:
        """Launch a step if some sequence can take a token more than it has been given."""
        if all(request.sampled >= request.reply.most_tokens for request in self.running):
            return False
        for request in self.running:
            request.sampled += 1
        adapted = any(request.adapter is not None for request in self.running)
        self.decode.forward(len(self.running), adapted)
        if not any(request.kind.masked for request in self.running):
            self._launch_draw()
        return True

    def _draw(self) -> None:
        """Launch the draw that has waited, now that all tokens before are known."""
        for request in list(self.running):
            try:
                if request.reply.grammar is not None:
                    request.reply.grammar.fill()
            except ValueError as error:
                request.error = error
                self._end(request, "error")
        if not self.running:
            self.decode.logits = None
            return
        for row, request in enumerate(self.running):
            if request.reply.grammar is not None:
                self.decode.sampling.allow(row, request.reply.grammar.mask)
        self._launch_draw()

    def _launch_draw(self) -> None:
        kind = reduce(Kind.__or__, {request.kind for request in self.running})
        results = self.decode.draw(len(self.running), kind)
        self.pending.append(Pending(results, list(enumerate(self.running))))

    def _read(self, pending: Pending) -> None:
        """Wait for a step's tokens and hand them out; a sequence that has ended drops its own."""
        sampled = pending.results.read()
        tokens = sampled.tokens.tolist()
        for place, request in pending.places:
            if request.done:
                continue
            token = tokens[place]
            if token == NOT_FINITE:
                request.error = _not_finite(request)
                self._end(request, "error")
                continue
            piece = request.reply.accept(token, _logprobs(sampled, place, token, request))
            if request.reply.finish_reason is not None:
                self._leave(request)
            _tell(request, piece)

    def _end(self, request: Request, reason: str) -> None:
        piece = request.reply.finish(reason)
        self._leave(request)
        _tell(request, piece)

    @torch.inference_mode()
    def _leave(self, request: Request) -> None:
        """Give back what a request holds."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.prefilling:
            self.prefilling.remove(request)
        elif request in self.running:
            self._vacate(self.running.index(request))
        # The newest token of a sequence was not fed yet.
        fed = request.prompt[: request.prefilled]
        if request.prefilled == len(request.prompt):
            fed = fed + request.reply.tokens[:-1]
        self.prefixes.keep(request.root, fed, request.blocks)
        self.prefixes.release(request.blocks)
        request.blocks = []
        if request.adapter is not None and self.decode.adapters.release(request.adapter):
            self.rearrange()

    def _vacate(self, row: int) -> None:
        """Running sequences lie in the first rows: the last one moves to the row that is left."""
        last = len(self.running) - 1
        if row == last:
            self.decode.remove(row)
        else:
            self.decode.move(last, row)
            self.running[row] = self.running[last]
        self.running.pop()


def _left(request: Request) -> int:
    """Tokens of a prompt that are yet to be read."""
    return len(request.prompt) - request.prefilled


def _tell(request: Request, piece: str) -> None:
    if piece:
        request.pieces.append(piece)
    request.done = request.reply.finish_reason is not None
    listener = request.listener
    if listener is not None and (piece or request.done):
        listener()


def _not_finite(request: Request) -> FloatingPointError:
    position = len(request.prompt) + len(request.reply.tokens)
    return FloatingPointError(
        f"logits at position {position}: expected finite numbers, got NaN or infinite ones; do the "
        "weights or the adapter hold NaN, or did float16 overflow?"
    )


def _logprobs(sampled: Sampled, place: int, token: int, request: Request) -> TokenLogprobs | None:
    count = request.sampling.logprobs
    if count is None or sampled.logprobs is None or sampled.alternatives is None:
        return None
    own, *top = sampled.logprobs[place, : count + 1].tolist()
    ids = sampled.alternatives[place, :count].tolist()
    return TokenLogprobs(token, own, list(zip(ids, top, strict=True)))
