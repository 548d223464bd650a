"""draw: the next token of each row, by temperature, top-k, top-p and min-p."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define


def _kernel(scores, settings, top_k, keys, positions) -> Tensor:
    tokens = torch.empty_like(top_k)
    _core.draw(scores, settings, top_k, keys, positions, tokens)
    return tokens


def _fake(scores, settings, top_k, keys, positions) -> Tensor:
    return torch.empty_like(top_k)


define(
    "draw(Tensor scores, Tensor settings, Tensor top_k, Tensor keys, Tensor positions) -> Tensor",
    _kernel,
    _fake,
)


def draw(
    scores: Tensor, settings: Tensor, top_k: Tensor, keys: Tensor, positions: Tensor
) -> Tensor:
    """A token, int64 [B], of each row of scores, drawn from softmax(scores / temperature).

    scores: float32 [B, V], V at most 2^18. settings: float32 [B, 3]: temperature, in place of 0 a
    tiny one; top_p, the fewest likeliest tokens whose probabilities reach it stay, all from 1 on;
    min_p, tokens at least this fraction as likely as the likeliest stay. top_k: int64 [B], so many
    likeliest tokens stay, before top_p looks at them. Tokens as likely as the last one that stays
    stay, too. keys, positions: int64 [B], whose 128 bits and the row's own numbers are all that
    decides. Rows with NaN or +Inf give some token.
    """
    tokens = torch.ops.halfbyte.draw(
        scores.contiguous(), settings.contiguous(), top_k.int(), _halves(keys), _halves(positions)
    )
    return tokens.long()


def _halves(x: Tensor) -> Tensor:
    # One element counts as contiguous with any stride, but has no view of halves.
    return torch.stack((x,)).view(torch.int32) if x.stride(0) != 1 else x.view(torch.int32)
