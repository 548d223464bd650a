"""bitsandbytes and transformers over exactly the tensors that halfbyte uses."""

from __future__ import annotations

import torch
from halfbyte import Linear4bit, QuantState
from halfbyte.models import Decoder
from torch import Tensor, nn


def bnb_state(state: QuantState):
    """The same scales as a bitsandbytes QuantState."""
    from bitsandbytes.functional import QuantState as BnbState

    tensors = state.as_tensors("weight")
    stats = {name.removeprefix("weight."): value for name, value in tensors.items()}
    return BnbState.from_dict(stats, device=state.absmax.device)


def bnb_linear(packed: Tensor, state: QuantState, compute_dtype: torch.dtype) -> nn.Module:
    """A bitsandbytes Linear4bit without bias over the same codes."""
    from bitsandbytes.nn import Linear4bit as BnbLinear
    from bitsandbytes.nn import Params4bit

    n, k = state.shape
    layer = BnbLinear(k, n, bias=False, compute_dtype=compute_dtype, device="meta")
    weight = Params4bit(
        packed,
        quant_state=bnb_state(state),
        quant_type=state.quant_type,
        module=layer,
        bnb_quantized=True,
    )
    layer.weight = weight
    layer.quant_state = weight.quant_state
    return layer


@torch.no_grad()
def transformers_model(model: Decoder) -> nn.Module:
    """transformers' own decoder with bitsandbytes layers, sharing every tensor of `model`."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    embedding = model.model.embed_tokens.weight
    raw = dict(model.config.raw)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with init_empty_weights(include_buffers=False):
        peer = AutoModelForCausalLM.from_config(config, dtype=embedding.dtype)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            _set(peer, name, bnb_linear(module.weight.data, module.quant_state, embedding.dtype))
            continue
        for leaf, value in module.named_parameters(recurse=False):
            _set(peer, f"{name}.{leaf}", nn.Parameter(value.data, requires_grad=False))
    peer.tie_weights()
    return peer.to(embedding.device).eval()


def _set(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)
