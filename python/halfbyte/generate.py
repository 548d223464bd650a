"""Text from a model: prefill, decode, stops and the stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ContextLengthError
from halfbyte.kv_cache import KVCache
from halfbyte.models import Decoder
from halfbyte.models.config import token_ids
from halfbyte.sampling import Sampling, TokenCounts, sample
from halfbyte.tokenizer import Detokenizer

__all__ = ["Sampling", "StopStrings", "Stream", "generate", "stream"]


class StopStrings:
    """Cuts a text that arrives in pieces at the first stop string to be complete in it.

    Text that may yet turn out to begin a stop string is held back, so what is given out never has
    to be taken back, and the cut does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.cut: int | None = None
        self._held = ""
        self._given = 0

    def push(self, text: str) -> str:
        """Take the next piece, give out what is certain; nothing after the cut."""
        if self.cut is not None:
            return ""
        self._held += text
        ends = [(at + len(s), at) for s in self.stops if (at := self._held.find(s)) >= 0]
        if ends:
            start = min(ends)[1]
            self.cut = self._given + start
        else:
            start = len(self._held) - self._undecided()
        return self._give(start)

    def flush(self) -> str:
        """Give out what was held back, at the end of the text."""
        return "" if self.cut is not None else self._give(len(self._held))

    def _give(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self._given += length
        return piece

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), max(map(len, self.stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self.stops):
                return length
        return 0


class _Text:
    """A row's text: tokens in, certain text out, and which tokens lie before the cut."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.stops = StopStrings(stops)
        self.ends = [0]

    def push(self, token: int) -> str:
        text = self.detokenizer.push(token)
        self.ends.append(self.ends[-1] + len(text))
        return self.stops.push(text)

    def flush(self) -> str:
        return self.stops.push(self.detokenizer.flush()) + self.stops.flush()

    def tokens_before(self, cut: int) -> int:
        """How many tokens it takes to write the text that ends at or before `cut` characters."""
        return self.ends.index(max(end for end in self.ends if end <= cut))


class _Row:
    """One prompt and its reply."""

    def __init__(self, prompt: list[int], sampling: Sampling, eos: set[int], context: int) -> None:
        self.prompt = prompt
        self.limit = sampling.max_new_tokens
        self.eos = eos
        self.context = context
        self.seed = _seed(sampling)
        self.tokens: list[int] = []
        self.text: _Text | None = None
        self.finish_reason = "context" if len(prompt) == context else None

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def accept(self, token: int) -> str:
        """Take a sampled token; return the text that became certain by it."""
        if token in self.eos:
            return self._finish("stop")
        self.tokens.append(token)
        piece = self.text.push(token) if self.text else ""
        if self.text and self.text.stops.cut is not None:
            return piece + self._finish("stop")
        if len(self.tokens) == self.limit:
            return piece + self._finish("length")
        if self.position == self.context:
            return piece + self._finish("context")
        return piece

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        if self.text is None:
            return ""
        piece = self.text.flush()
        if self.text.stops.cut is not None:
            self.finish_reason = "stop"
            del self.tokens[self.text.tokens_before(self.text.stops.cut) :]
        return piece


class _Batch:
    """The rows of one request, their cache and their token counts; one step, one token each."""

    def __init__(self, model: Decoder, prompts: Sequence[Any], sampling: Sampling) -> None:
        self.model = model
        self.sampling = sampling
        self.rows = [self._row(prompt) for prompt in prompts]
        self.active = [row for row in self.rows if row.finish_reason is None]
        self.cache: KVCache | None = None
        self.counts: TokenCounts | None = None

    def _row(self, prompt: Any) -> _Row:
        config = self.model.config
        prompt = _checked_prompt(self.model, prompt)
        row = _Row(prompt, self.sampling, eos_ids(self.model), config.max_position_embeddings)
        if self.sampling.stop:
            row.text = _Text(_tokenizer(self.model, "stop strings"), self.sampling.stop)
        return row

    @torch.inference_mode()
    def step(self) -> list[str]:
        """Give each active row its next token; return the text each row gained."""
        rows = self.active
        if self.cache is None:
            self.cache = self._prepare()
            ids = [row.prompt for row in rows]
        else:
            ids = [row.tokens[-1:] for row in rows]
        logits = self._forward(self.cache, ids)
        tokens = sample(
            logits[:, -1],
            self.sampling,
            self.counts,
            [row.seed for row in rows],
            [row.position for row in rows],
        )
        if self.counts is not None:
            self.counts.add(tokens)
        pieces = [row.accept(token) for row, token in zip(rows, tokens, strict=True)]
        self._drop_finished()
        return pieces

    def _prepare(self) -> KVCache:
        """A cache with room for every row, and token counts if they are needed."""
        prompts = [row.prompt for row in self.active]
        longest, config = max(map(len, prompts)), self.model.config
        embedding = self.model.model.embed_tokens.weight
        if self.sampling.penalizes:
            self.counts = TokenCounts(prompts, config.vocab_size, embedding.device)
        room = min(config.max_position_embeddings, longest + self.sampling.max_new_tokens)
        return KVCache(config, len(prompts), room, embedding.dtype, embedding.device)

    def _forward(self, cache: KVCache, ids: list[list[int]]) -> Tensor:
        lengths = [len(row) for row in ids]
        if min(lengths) < max(lengths):
            cache.expect(lengths)
        padded = [row + [0] * (max(lengths) - len(row)) for row in ids]
        batch = torch.tensor(padded, device=cache.keys[0].device)
        with _evaluating(self.model):
            return self.model(batch, cache=cache, last_only=True).logits

    def _drop_finished(self) -> None:
        kept = [i for i, row in enumerate(self.active) if row.finish_reason is None]
        if self.cache is not None and 0 < len(kept) < len(self.active):
            self.cache.select(kept)
            if self.counts is not None:
                self.counts.select(kept)
        self.active = [self.active[i] for i in kept]


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """Dropout off for one forward, each module's mode as it was afterwards."""
    training = [m for m in model.modules() if m.training] if model.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _seed(sampling: Sampling) -> int:
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling.seed or 0
    return int(torch.randint(1 << 62, ()))


def eos_ids(model: Decoder) -> set[int]:
    """Every id that ends a reply: those of the generation config and those of the config."""
    generation = token_ids(model.generation_config.get("eos_token_id"))
    return {*generation, *model.config.eos_token_ids}


def _tokenizer(model: Decoder, purpose: str) -> Any:
    if model.tokenizer is None:
        raise ValueError(
            f"{purpose}: expected a model with a tokenizer, but model.tokenizer is None"
        )
    return model.tokenizer


def _checked_prompt(model: Decoder, prompt: Any) -> list[int]:
    ids = [int(token) for token in prompt]
    config = model.config
    if not ids:
        bos = config.bos_token_id
        if bos is None:
            raise ValueError("prompt: expected at least one token: the model has no bos token")
        ids = [bos]
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"prompt: expected ids below {config.vocab_size}, got {token}")
    if len(ids) > config.max_position_embeddings:
        raise ContextLengthError(
            f"prompt: expected at most {config.max_position_embeddings} tokens "
            f"(max_position_embeddings), got {len(ids)}; shorten it"
        )
    return ids


def _is_batch(ids: Any) -> bool:
    if isinstance(ids, Tensor):
        if ids.dim() not in (1, 2):
            raise ValueError(f"ids: expected a tensor [T] or [B, T], got {list(ids.shape)}")
        return ids.dim() == 2
    return len(ids) > 0 and not isinstance(ids[0], Integral)


def generate(
    model: Decoder,
    ids: list[int] | list[list[int]] | Tensor,
    sampling: Sampling | None = None,
    **overrides: Any,
) -> list[int] | list[list[int]]:
    """The tokens that follow a prompt, or each prompt of a batch (of any lengths, unpadded).

    sampling: greedy by default; overrides are its fields, e.g. `temperature=0.7, seed=1`. A reply
    ends at an eos id (which is not part of it), a stop string (with the last token before it),
    max_new_tokens or the model's context.

    Raises ValueError for bad sampling fields or token ids, ContextLengthError for a prompt longer
    than config.max_position_embeddings, FloatingPointError for logits that are not finite.
    """
    sampling = replace(sampling or Sampling(), **overrides)
    if isinstance(ids, Tensor):
        batched, ids = _is_batch(ids), ids.tolist()
    else:
        batched = _is_batch(ids)
    batch = _Batch(model, ids if batched else [ids], sampling)
    while batch.active:
        batch.step()
    replies = [row.tokens for row in batch.rows]
    return replies if batched else replies[0]


class Stream:
    """Iterator over the text of one reply, always valid UTF-8, never part of a stop string.

    Afterwards (and so far, meanwhile): finish_reason, "stop" (eos or stop string), "length",
    "context" or, after close(), "cancelled"; token_ids; usage, token counts named as in OpenAI's
    API.
    """

    def __init__(self, model: Decoder, ids: Sequence[int] | Tensor, sampling: Sampling) -> None:
        if _is_batch(ids):
            raise ValueError("stream: expected the ids of one prompt, got a batch")
        self._batch = _Batch(model, [ids], sampling)
        self._row = self._batch.rows[0]
        self._row.text = self._row.text or _Text(_tokenizer(model, "stream"), ())

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        while self._batch.active:
            (piece,) = self._batch.step()
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop here; the tokens that are out stay."""
        if self._row.finish_reason is None:
            self._row.finish_reason = "cancelled"
        self._batch.active = []

    @property
    def finish_reason(self) -> str | None:
        return self._row.finish_reason

    @property
    def token_ids(self) -> list[int]:
        return self._row.tokens

    @property
    def usage(self) -> dict[str, int]:
        prompt, reply = len(self._row.prompt), len(self._row.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
        }


def stream(
    model: Decoder,
    ids: Sequence[int] | Tensor,
    sampling: Sampling | None = None,
    **overrides: Any,
) -> Stream:
    """Like `generate` for one prompt, as an iterator over the decoded text.

    The pieces joined are the text of all tokens, cut at the stop string. Raises what `generate`
    raises, and ValueError when the model has no tokenizer; prompts are checked before the first
    piece is asked for.
    """
    return Stream(model, ids, replace(sampling or Sampling(), **overrides))
