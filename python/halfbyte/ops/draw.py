"""draw: the next token of each row, by temperature, top-k, top-p and min-p."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.library import define

define(
    "draw(Tensor scores, Tensor settings, Tensor top_k, Tensor keys, Tensor running, "
    "Tensor(a!) lengths, Tensor(b!) tokens, Tensor(c!) reported) -> ()",
    _core.draw,
    lambda *_: None,
)


def draw(
    scores: Tensor,
    settings: Tensor,
    top_k: Tensor,
    keys: Tensor,
    running: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    reported: Tensor,
) -> None:
    """Give each row of scores a token, drawn from softmax(scores / temperature).

    scores: [B, V], fp32, fp16 or bf16, V at most 2^18. settings: float32 [B, 3]: temperature, 0
    takes the first of the largest scores; top_p, the fewest likeliest tokens whose probabilities
    reach it stay, all from 1 on; min_p, tokens at least this fraction as likely as the likeliest
    stay. top_k: int32 [B], so many likeliest tokens stay, before top_p looks at them. Tokens as
    likely as the last one that stays stay, too. keys: int64 [B]. running: int32 [B], 1 where the
    row takes its token, else 0.

    lengths: int32 [B], tokens of each row before; `running` is added to them. A row's key, length
    and own numbers are all that decides. tokens: int32 [B], the results; 0 where scores are NaN or
    the largest is not finite. reported: the same, but -1 there; may be in pinned memory, which is
    written with no copy behind the launch.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    halves = keys.view(torch.int32)
    torch.ops.halfbyte.draw(
        scores.contiguous(), settings, top_k, halves, running, lengths, tokens, reported
    )
