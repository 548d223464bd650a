"""Text from a model without keeping an engine: what `Decoder.generate` is."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from halfbyte.engine import MAX_BATCH, Engine, Stream, checked_prompt, is_batch, tokenizer_of
from halfbyte.kv_cache import block_bytes, blocks_for
from halfbyte.models import Decoder
from halfbyte.ops.paged_attention import BLOCK
from halfbyte.reply import StopStrings
from halfbyte.sampling import Sampling

__all__ = ["Sampling", "StopStrings", "Stream", "generate", "stream"]

# The last engine of each model, as large as its requests were, for the next ones to use again.
_engines: weakref.WeakKeyDictionary[Decoder, Engine] = weakref.WeakKeyDictionary()


def _engine(model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Engine:
    """An engine in which all these prompts run together, as far as its batch is."""
    context = model.config.max_position_embeddings
    blocks = sorted(
        blocks_for(min(len(prompt) + sampling.max_new_tokens, context)) for prompt in prompts
    )
    batch, needed = min(len(prompts), MAX_BATCH), sum(blocks[-MAX_BATCH:])
    engine = _engines.get(model)
    if engine is not None and not engine.misplaced:
        rows, tokens = engine.capacity
        if batch <= rows and needed * BLOCK <= tokens:
            # Its weights may have been trained since.
            engine.refresh()
            return engine
    _engines.pop(model, None)
    budget = needed * block_bytes(model.config, model.model.embed_tokens.weight.dtype)
    # By proxy, so that the table's value does not keep its key.
    proxy = cast(Decoder, weakref.proxy(model))
    engine = Engine(proxy, max_batch=batch, kv_budget=budget)
    _engines[model] = engine
    return engine


def _read(model: Decoder, prompt: Any) -> tuple[str | list[int], list[int]]:
    """What an engine is given of a prompt, and its ids: a reply goes on with a text as it is."""
    ids = checked_prompt(model, prompt)
    return prompt if isinstance(prompt, str) else ids, ids


def generate(
    model: Decoder,
    ids: str | list[int] | list[str] | list[list[int]] | Tensor,
    sampling: Sampling | None = None,
    **overrides: Any,
) -> list[int] | list[list[int]]:
    """The tokens that follow a prompt, or each prompt of a batch (of any lengths, unpadded).

    ids: token ids, or text. The bos token stands for an empty prompt, which an empty list is here.

    sampling: greedy by default; overrides are its fields, e.g. `temperature=0.7, seed=1`. A reply
    ends at an eos id (which is not part of it), a stop string (with the last token before it),
    max_new_tokens or the model's context.

    Raises ValueError for bad sampling fields or token ids, ContextLengthError for a prompt longer
    than config.max_position_embeddings, FloatingPointError for logits that are not finite.
    """
    sampling = replace(sampling or Sampling(), **overrides)
    batched = is_batch(ids)
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    prompts = [_read(model, prompt) for prompt in (ids if batched else [ids])]
    engine = _engine(model, [checked for _, checked in prompts], sampling)
    requests = [engine.submit(prompt, sampling) for prompt, _ in prompts]
    engine.run(requests)
    replies = [request.reply.tokens for request in requests]
    return replies if batched else replies[0]


def stream(
    model: Decoder,
    ids: str | Sequence[int] | Tensor,
    sampling: Sampling | None = None,
    **overrides: Any,
) -> Stream:
    """Like `generate` for one prompt, as an iterator over the decoded text.

    The pieces joined are the text of all tokens, cut at the stop string. Raises what `generate`
    raises, and ValueError when the model has no tokenizer; prompts are checked before the first
    piece is asked for.
    """
    if is_batch(ids):
        raise ValueError("stream: expected the ids of one prompt, got a batch")
    tokenizer_of(model, "stream")
    sampling = replace(sampling or Sampling(), **overrides)
    prompt, checked = _read(model, ids)
    engine = _engine(model, [checked], sampling)
    return Stream(engine, engine.submit(prompt, sampling), model)
