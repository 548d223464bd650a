"""Decode of a few rows with adapters: one launch between two attentions, where kernels take it so.

Without adapters, launches that overlap are quicker than CTAs that wait for each other: 569 tokens/s
beside 526 on an H200 at the 7B shape; with one of rank 16 it is 182 beside 287.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halfbyte.linear import is_plain, is_watched
from halfbyte.models.attention import Step
from halfbyte.models.norm import RMSNorm
from halfbyte.ops.gemv_4bit_chain import (
    MAX_ROWS,
    LowRank,
    Phase,
    Product,
    gemv_4bit_chain,
    has_chains,
    takes_chained,
)

if TYPE_CHECKING:
    from halfbyte.models.decoder import DecoderLayer


def takes(layers: Sequence[DecoderLayer], x: Tensor, step: Step) -> bool:
    """Whether `decode` gives what the layers give, one after the other."""
    return (
        step.cache is not None
        and step.cache.decodes
        and x.is_cuda
        and x.shape[0] <= MAX_ROWS
        and x.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not layers[0].training
        and not torch.is_autocast_enabled("cuda")
        and has_chains(x.device)
        and any(_low_rank(m, len(x)) is not None for layer in layers for m in _projections(layer))
        and _fit(layers, x.dtype)
    )


def _low_rank(layer: nn.Module, rows: int) -> LowRank | None:
    return layer.low_rank(rows) if hasattr(layer, "low_rank") else None


def _fit(layers: Sequence[DecoderLayer], dtype: torch.dtype) -> bool:
    modules = [module for layer in layers for module in layer.modules()]
    projections = [m for layer in layers for m in _projections(layer)]
    bases = [getattr(m, "base_layer", m) for m in projections]
    return (
        all(map(is_plain, projections, bases))
        and not any(map(is_watched, modules))
        and all(takes_chained(m.weight, m._state(), bases[0]._state()) for m in bases)
        and all(m.weight.dtype == dtype for m in modules if isinstance(m, RMSNorm))
    )


def _projections(layer: DecoderLayer) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


def decode(layers: Sequence[DecoderLayer], x: Tensor, step: Step) -> Tensor:
    """The residual stream [B, 1, d] behind all layers."""
    assert step.cache is not None
    head = _projections(layers[0])[0]
    quant_type = getattr(head, "base_layer", head).quant_type
    launch = partial(gemv_4bit_chain, quant_type=quant_type, arrived=step.cache.cache.counters)
    rows = x[:, 0]
    first, projected = _into_attention(layers[0], rows)
    launch([first])
    for layer, following in zip_longest(layers, layers[1:]):
        attended = layer.self_attn.mix([y[:, None] for y in projected], step)[:, 0]
        phases, rows = _behind_attention(layer, attended, rows)
        if following is not None:
            phase, projected = _into_attention(following, rows)
            phases.append(phase)
        launch(phases)
    return rows[:, None]


def _into_attention(layer: DecoderLayer, rows: Tensor) -> tuple[Phase, list[Tensor]]:
    attention = layer.self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    return _phase(rows, layers, norm=layer.input_layernorm)


def _behind_attention(
    layer: DecoderLayer, attended: Tensor, rows: Tensor
) -> tuple[list[Phase], Tensor]:
    mlp = layer.mlp
    out, (rows,) = _phase(attended, [layer.self_attn.o_proj], residual=rows)
    norm = layer.post_attention_layernorm
    inner, (gated,) = _phase(rows, [mlp.gate_proj, mlp.up_proj], norm=norm, gated=True)
    down, (rows,) = _phase(gated, [mlp.down_proj], residual=rows)
    return [out, inner, down], rows


def _phase(
    x: Tensor,
    layers: Sequence[nn.Module],
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> tuple[Phase, list[Tensor]]:
    """A phase and what it will have written."""
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    widths = [base.out_features for base in bases]
    outs = [x.new_empty(len(x), width) for width in (widths[:1] if gated else widths)]
    adapters = [_low_rank(layer, len(x)) for layer in layers]
    ranks = sum(len(adapter.a) for adapter in adapters if adapter is not None)
    products = [
        Product(
            base.weight,
            *base._state().scale_args(),
            None if base.bias is None else base.bias.to(x.dtype),
            adapter,
            outs[0] if gated else outs[index],
        )
        for index, (base, adapter) in enumerate(zip(bases, adapters, strict=True))
    ]
    phase = Phase(
        x.contiguous(),
        products,
        gated,
        None if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        residual,
        x.new_empty(len(x), ranks) if ranks else None,
    )
    return phase, outs
