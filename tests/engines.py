"""What the tests of the engine, its scheduler and its adapters share."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from test_generate import tiny

from halfbyte import Engine, Linear4bit, LoraConfig, Sampling, lora
from halfbyte.kv_cache import block_bytes


def budget(model, blocks: int) -> int:
    return blocks * block_bytes(model.config, model.model.embed_tokens.weight.dtype)


def requests_of(rng: random.Random, count: int) -> list[tuple[list[int], Sampling]]:
    """Prompts and settings of every sort."""
    made = []
    for _ in range(count):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 2, 15, 16, 17, 33, 60]))]
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            seed=rng.randrange(1000),
            max_new_tokens=rng.choice([1, 2, 7, 20]),
            stop=rng.choice([(), (), "a", ("\n", "é")]),
            logit_bias=rng.choice([{}, {}, {65: 3.0}]),
            logprobs=rng.choice([None, None, 2]),
        )
        made.append((prompt, sampling))
    return made


@contextmanager
def slowed(engine: Engine, seconds: float) -> Iterator[None]:
    """Every step takes so long at least, that there is time to look, to click and to leave."""
    scheduler = engine._scheduler
    step = scheduler.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    scheduler.step = slow
    try:
        yield
    finally:
        del scheduler.step


def fully_free(engine: Engine) -> bool:
    scheduler = engine._scheduler
    prefixes = scheduler.prefixes
    return not scheduler.busy and prefixes.available == prefixes.blocks == len(
        set(prefixes._free) | set(prefixes._unheld)
    )


def base_model(tokenizer):
    made = tiny(max_position_embeddings=256)
    made.tokenizer = tokenizer
    return made


def four_bit_model(tokenizer, device="cuda", **changes):
    """bf16 over 4-bit layers of sizes that the fast kernels take."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    made = tiny(**sizes, max_position_embeddings=1024, **changes)
    made.bfloat16()
    for name, linear in list(made.named_modules()):
        if type(linear) is torch.nn.Linear and name != "lm_head":
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False)
            layer.quantize_(linear.weight.detach().to(device), name=name)
            parent, _, child = name.rpartition(".")
            setattr(made.get_submodule(parent), child, layer)
    made.tokenizer = tokenizer
    return made.to(device).eval()


def gpu_work() -> list[tuple[list[int], Sampling]]:
    """Also prompts of several chunks."""
    work = requests_of(random.Random(6), 24)
    long = [n % 256 for n in range(900)]
    return [(long[i * 9 :] if i % 5 == 0 else prompt, s) for i, (prompt, s) in enumerate(work)]


def all_at_once(engine: Engine, work) -> list[list[int]]:
    requests = [engine.submit(prompt, sampling) for prompt, sampling in work]
    engine.run(requests)
    return [request.reply.tokens for request in requests]


ADAPTERS = {
    "one": LoraConfig(r=4, lora_alpha=8),
    "two": LoraConfig(r=9, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    "head": LoraConfig(r=2, lora_alpha=16, use_rslora=True, target_modules=["lm_head", "v_proj"]),
}


def write_adapters(folder, tokenizer, make=base_model) -> tuple[dict, dict]:
    """Folders of ADAPTERS for the models that `make` makes, and a model that carries each."""
    carriers = {}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        rng = torch.Generator().manual_seed(seed)
        made = lora.inject(make(tokenizer), config, rng)
        for parameter in lora.adapter_parameters(made):
            values = torch.empty(parameter.shape).normal_(0, 0.3, generator=rng)
            parameter.data.copy_(values)
        lora.save_adapter(made, folder / name)
        carriers[name] = made
    return {name: folder / name for name in ADAPTERS}, carriers
