"""Grouped-query attention over a forward's own keys or over cached ones."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte.kv_cache import CacheStep
from halfbyte.linear import Launch, Summed, Unnormed, project
from halfbyte.models.config import DecoderConfig
from halfbyte.models.norm import RMSNorm
from halfbyte.ops import rope

# Tokens from which torch's gradient of attention in 16 bits is as fast on a CPU as that in fp32: it
# takes larger blocks then.
SHORT = 192


class Span(NamedTuple):
    """Which keys the queries of a forward see, the same for all layers of one window.

    cached: cached tokens to attend over; None for the forward's own keys.
    mask: bool [B or 1, 1, T, S], True where a query sees a key; None for all keys, or for those at
    or before the query if is_causal.
    """

    cached: int | None
    mask: Tensor | None
    is_causal: bool


class Step(NamedTuple):
    """What every layer of one forward shares, computed once."""

    cos: Tensor
    sin: Tensor
    spans: dict[int | None, Span]
    cache: CacheStep | None

    def launch(
        self,
        layer: int,
        which: int,
        *following: nn.Module,
        gated: bool = False,
        norm: nn.Module | None = None,
    ) -> Launch | None:
        """What `project` takes where an engine reads few tokens, given the layers that come next.

        which: of the layer's launches.
        """
        if self.cache is None or self.cache.words is None:
            return None
        return Launch(self.cache.words[layer, which : which + 1], following, gated, norm)


def spans(windows: Iterable[int | None], positions: Tensor, cached: int) -> dict[int | None, Span]:
    """The Span of each distinct window for queries at `positions` [B or 1, T].

    cached: the most tokens of a row that are in a cache, the new ones included; 0 without a cache
    and where it holds the new ones only.
    """
    if cached == 0:
        return {window: _own_span(window, positions) for window in set(windows)}
    keys = torch.arange(cached, device=positions.device)
    return {
        window: Span(cached, _mask(window, positions, keys), is_causal=False)
        for window in set(windows)
    }


def _own_span(window: int | None, positions: Tensor) -> Span:
    tokens = positions.shape[1]
    if window is None or tokens <= window:
        return Span(None, None, is_causal=True)
    return Span(None, _mask(window, positions[:1], positions[0]), is_causal=False)


def _mask(window: int | None, positions: Tensor, keys: Tensor) -> Tensor:
    """bool [B or 1, 1, T, S]: key at or before the query, fewer than `window` tokens back."""
    behind = positions[:, None, :, None] - keys
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def attend(q: Tensor, k: Tensor, v: Tensor, span: Span, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v for q [B, T, heads, D], k and v [B, S, kv_heads, D]."""
    if q.is_cpu and q.dtype in (torch.float16, torch.bfloat16):
        if q.shape[1] < SHORT or not torch.is_grad_enabled():
            # torch's kernel for fp32 is the faster one there.
            return attend(q.float(), k.float(), v.float(), span, dropout_p).to(q.dtype)
    groups = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if groups > 1 and span.mask is not None:
        # CUDA's memory-efficient kernel takes a mask, but no grouped heads.
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, span.mask, dropout_p, span.is_causal, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of one layer; `layer` is its place in the cache."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = (
            heads * head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(hidden, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=config.o_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.layer = layer
        self.head_dim = head_dim
        self.is_grouped = kv_size < q_size
        self.window = config.sliding_windows[layer]
        self.attention_dropout = config.attention_dropout

    @property
    def inputs(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The layers that read the attention's input."""
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, x: Tensor | Unnormed, step: Step, last: Launch | None = None
    ) -> Tensor | Summed:
        """x [B, T, hidden_size] -> the same shape; last: of the last projection."""
        projected = project(x, *self.inputs, launch=step.launch(self.layer, 0, self.o_proj))
        q, k, v = (part.reshape(*part.shape[:2], -1, self.head_dim) for part in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if step.cache is not None and step.cache.decodes:
            out = step.cache.attend(self.layer, q, k, v, step.cos, step.sin, self.window)
        else:
            q, k = rope(q, k, step.cos, step.sin)
            span = step.spans[self.window]
            if step.cache is not None:
                k, v = step.cache.write(self.layer, k, v)
                if span.cached is not None:
                    k, v = step.cache.read(self.layer, span.cached, q.dtype)
            out = attend(q, k, v, span, self.attention_dropout if self.training else 0.0)
        return project(out.reshape(*out.shape[:2], -1), self.o_proj, launch=last)[0]
