"""halfbyte and its peers, which work on exactly the same tensors, doing the same jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from halfbyte import Linear4bit, LoraConfig, QuantState, lora, optim
from halfbyte.models import Decoder
from halfbyte.train import MicroSteps

LEARNING_RATE = 2e-4


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
    # PEFT asks this to choose its 4-bit adapter.
    peer.is_loaded_in_4bit = True
    return peer.to(embedding.device).eval()


def _set(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def halfbyte_decode(model: Decoder, ids: list[int], tokens: int) -> Callable[[], object]:
    """Greedy decode of exactly `tokens` new tokens."""
    # Without an end-of-sequence id every call makes the same number of tokens.
    model.generation_config = {}
    model.config = replace(model.config, eos_token_ids=())
    return lambda: _exactly(tokens, model.generate(ids, temperature=0.0, max_new_tokens=tokens))


def transformers_decode(model: nn.Module, ids: list[int], tokens: int) -> Callable[[], object]:
    """As halfbyte_decode, by transformers' own generate."""
    prompt = torch.tensor([ids], device=model.device)
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    mask = torch.ones_like(prompt)

    @torch.no_grad()
    def work() -> object:
        out = model.generate(prompt, attention_mask=mask, pad_token_id=0, **options)
        return _exactly(tokens, out[0, len(ids) :])

    return work


def _exactly(tokens: int, made):
    if len(made) != tokens:
        raise RuntimeError(f"expected {tokens} new tokens, got {len(made)}")
    return made


def halfbyte_step(
    model: Decoder, ids: Tensor, r: int, checkpointing: bool = False
) -> Callable[[], object]:
    """Forward, backward and AdamW on an adapter over all linear layers."""
    lora.inject(model, LoraConfig(r=r, lora_alpha=16))
    model.gradient_checkpointing = checkpointing
    optimizer = optim.AdamW(lora.adapter_parameters(model.train()), lr=LEARNING_RATE)
    micro_steps = MicroSteps(model, optimizer)

    def step() -> None:
        micro_steps(ids, ids, ids[:, 1:].numel())
        optimizer.step()
        optimizer.zero_grad()

    return step


def launched_step(model: Decoder, ids: Tensor) -> Callable[[], object]:
    """As halfbyte_step on the adapter that is there, with every launch queued by Python."""
    optimizer = optim.AdamW(lora.adapter_parameters(model.train()), lr=LEARNING_RATE)
    return lambda: _step(model(ids, labels=ids).loss, optimizer)


def peft_step(
    model: nn.Module, ids: Tensor, r: int, checkpointing: bool = False
) -> Callable[[], object]:
    """As halfbyte_step, by PEFT and torch's AdamW."""
    import peft

    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = peft.LoraConfig(r=r, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    return lambda: _step(model(input_ids=ids, labels=ids, use_cache=False).loss, optimizer)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
