"""The decoder: one forward for training, prefill and decode."""

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfbyte.kv_cache import CacheStep
from halfbyte.linear import (
    Launch,
    Summed,
    Unnormed,
    is_watched,
    onto,
    project,
    project_gated,
)
from halfbyte.models.attention import Attention, Step, spans
from halfbyte.models.config import DecoderConfig
from halfbyte.models.norm import RMSNorm, add_norm
from halfbyte.models.recompute import recomputed
from halfbyte.models.rope import RotaryEmbedding
from halfbyte.offload import ActivationOffload
from halfbyte.ops import cross_entropy, gemv

IGNORE = -100
HEAD_CHUNK = 256
HEAD_ROWS = 32


class Output(NamedTuple):
    """loss: fp32 scalar, given labels; logits: [B, T or 1, vocab_size], without labels."""

    loss: Tensor | None
    logits: Tensor | None


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)

    def forward(
        self,
        x: Tensor | Unnormed,
        unread: bool = False,
        first: Launch | None = None,
        last: Launch | None = None,
    ) -> Tensor | Summed:
        """x [..., hidden_size] -> the same shape; if `unread`, of any values.

        first, last: of the first two projections, of the last one.
        """
        gated = project_gated(x, self.gate_proj, self.up_proj, first)
        return project(gated, self.down_proj, unread=unread, launch=last)[0]


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, unread: bool = False) -> Tensor:
        """x [B, T, hidden_size] -> the same shape; if `unread`, of any values."""
        x, added = self.split(x, None, step, unread)
        return added.total if isinstance(added, Summed) else x + added

    def split(
        self,
        x: Tensor,
        added: Tensor | Summed | None,
        step: Step,
        unread: bool = False,
        following: "DecoderLayer | None" = None,
        only: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | Summed]:
        """From the stream x + added to the one behind the layer, as two terms again.

        The norm that comes next adds them in one pass over both; where a launch of few tokens has
        done so, the sum stands for both. following: the layer of that norm. only: takes the tokens
        that are wanted behind the layer.
        """
        attention, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
        # Seen on an H200: where heads share keys the norm's own launch is the faster way.
        waits = not attention.is_grouped
        if added is None:
            normed = self.input_layernorm(x)
        else:
            normed, x = add_norm(self.input_layernorm, added, x, waits)
        launch = partial(step.launch, attention.layer)
        before_mlp = launch(1, mlp.gate_proj, mlp.up_proj, gated=True, norm=norm)
        if only is None and not (is_watched(attention) or is_watched(mlp)):
            before_mlp = onto(x, before_mlp)
        attended = attention(normed, step, before_mlp)
        if only is not None:
            attended, x = only(attended), only(x)
        normed, x = add_norm(norm, attended, x, waits)
        before_down = launch(2, mlp.down_proj)
        inputs, norm, watched = (), None, is_watched(mlp)
        if following is not None:
            inputs, norm = following.self_attn.inputs, following.input_layernorm
            watched |= is_watched(following.self_attn)
        before_next = launch(3, *inputs, norm=norm)
        if not watched:
            before_next = onto(x, before_next)
        return x, mlp(normed, unread, before_down, before_next)


class Backbone(nn.Module):
    """Token ids to the hidden states that the head reads.

    `offload`, if set, keeps the activations of checkpointed layers in host memory.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim)
        self.windows = config.sliding_windows
        self.offload: ActivationOffload | None = None

    def forward(
        self, ids: Tensor, cache: CacheStep | None, checkpointed: bool, last_only: bool = False
    ) -> Tensor:
        """Of each token [B, T, hidden_size], or of each row's last one [B, 1, hidden_size]."""
        last = None if cache is None else cache.last
        only = partial(_last, last=last) if last_only and ids.shape[1] > 1 else None
        x = self.embed_tokens(ids)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        step = self._step(ids, cache, dtype)
        if not torch.is_grad_enabled() and not any(map(is_watched, self.layers)):
            added = None
            for layer, following in zip_longest(self.layers, self.layers[1:]):
                wanted = only if following is None else None
                x, added = layer.split(x, added, step, following=following, only=wanted)
            return self.norm(x) if added is None else add_norm(self.norm, added, x)[0]
        if checkpointed and not x.requires_grad:
            x.requires_grad_()
        layers = [partial(recomputed, layer) if checkpointed else layer for layer in self.layers]
        if checkpointed and self.offload is not None:
            x = self.offload.run(layers, x, step)
        else:
            for layer in layers:
                x = layer(x, step)
        return self.norm(x if only is None else only(x))

    def _step(self, ids: Tensor, cache: CacheStep | None, dtype: torch.dtype) -> Step:
        if cache is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            cache.check(ids)
            positions = cache.positions
        if cache is not None and cache.angles is not None:
            return Step(*cache.angles, {}, cache)
        cos, sin = self.rotary_emb(positions, dtype)
        if cache is not None and cache.decodes:
            return Step(cos, sin, {}, cache)
        cached = 0 if cache is None else cache.cached
        return Step(cos, sin, spans(self.windows, positions, cached), cache)


class Head(nn.Linear):
    """From the last hidden states to logits; a few rows wait for nothing but the matrix."""

    def forward(self, x: Tensor) -> Tensor:
        tracked = torch.is_grad_enabled() or x.dtype != self.weight.dtype
        return super().forward(x) if tracked or x.dim() != 2 else gemv(x, self.weight)


class Decoder(nn.Module):
    """A causal language model of the Llama, Mistral, Qwen2 or Qwen3 family.

    Parameters have the names of transformers' checkpoints. `gradient_checkpointing = True` makes a
    training forward keep one activation per layer and recompute the rest in the backward, which
    then has to be `loss.backward()`: torch finds no way to the layers' parameters where it is given
    `inputs`, nor does torch.autograd.grad.
    """

    generate: Callable[..., Any]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.tokenizer: Any = None
        self.source = ""
        self.generation_config: dict[str, Any] = {}
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the embedding with the head if the config ties them; needed after assignment."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def has_plain_head(self) -> bool:
        """Whether the head is a matrix to be read, neither adapted nor quantized."""
        return type(self.lm_head) in (Head, nn.Linear) and self.lm_head.bias is None

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        cache: CacheStep | None = None,
        num_items: Tensor | int | None = None,
        last_only: bool = False,
    ) -> Output:
        """Logits of every token, or the language-model loss where labels are given.

        ids: int64 [B, T]. labels: int64 [B, T], the ids themselves (they are shifted here), -100
        where a token is not to be learned; rows padded on the right need no mask, as no token sees
        a later one. num_items: divisor of the summed loss (default: labels that count). cache:
        where a KVCache holds the earlier tokens of each row, and these afterwards. last_only:
        logits of each row's last token, [B, 1, vocab_size].

        Raises ValueError for shapes or arguments that do not fit.
        """
        self._check(ids, labels, cache, last_only)
        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        hidden = self.model(ids, cache, checkpointed, last_only)
        if labels is not None:
            return Output(self._loss(hidden, labels, num_items), None)
        if last_only:
            return Output(None, self._head_of_rows(hidden[:, 0])[:, None])
        return Output(None, self.lm_head(hidden))

    def _head_of_rows(self, hidden: Tensor) -> Tensor:
        """Logits of hidden [B, d], whose bits depend on nothing but their own row.

        On a GPU the order of a sum is that of the kernel which torch chooses for a shape, so all
        batches of a decode step are given the same shape; the head's bytes decide the time.
        """
        rows = len(hidden)
        if hidden.is_cuda and rows < HEAD_ROWS:
            # What the other rows hold matters to nobody.
            padded = hidden.new_empty(HEAD_ROWS, hidden.shape[1])
            padded[:rows] = hidden
            hidden = padded
        return self.lm_head(hidden)[:rows]

    def _check(
        self, ids: Tensor, labels: Tensor | None, cache: CacheStep | None, last_only: bool
    ) -> None:
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"ids: expected [B, T], both at least 1, got {list(ids.shape)}")
        if labels is None:
            return
        if labels.shape != ids.shape:
            raise ValueError(
                f"labels: expected the shape of ids {list(ids.shape)}, got {list(labels.shape)}"
            )
        if cache is not None or last_only:
            raise ValueError("labels: expected neither cache nor last_only beside them")

    def _loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()
        hidden = hidden.flatten(0, 1)
        if self.has_plain_head:
            return cross_entropy(hidden, self.lm_head.weight, labels, num_items)
        if num_items is None:
            num_items = (labels != IGNORE).sum().clamp(min=1)
        return self._replaced_head_loss(hidden, labels) / num_items

    def _replaced_head_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed loss under a quantized or adapted head, whose matrix is not there to be read."""

        def chunk_loss(rows: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(
                self.lm_head(rows).float(), targets, ignore_index=IGNORE, reduction="sum"
            )

        loss = hidden.new_zeros((), dtype=torch.float32)
        for rows, targets in zip(hidden.split(HEAD_CHUNK), labels.split(HEAD_CHUNK), strict=True):
            loss = loss + checkpoint(chunk_loss, rows, targets, use_reentrant=False)
        return loss


def _last(hidden: Tensor, last: Tensor | None) -> Tensor:
    """hidden [B, T, d] -> [B, 1, d], each row's last token that is not padding."""
    if last is None:
        return hidden[:, -1:].contiguous()
    return hidden[torch.arange(len(last), device=hidden.device), last][:, None]
