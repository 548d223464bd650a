"""The whole way at Llama-7B's shape with random weights: quantize, decode, train, decode again.

Weights are drawn and quantized layer by layer on the device, so no 16-bit model ever exists.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from bench import append_row, machine, summary
from torch import Tensor, nn

import halfbyte
from halfbyte import Linear4bit, LoraConfig, lora, optim
from halfbyte.models import Decoder, DecoderConfig

# hidden, intermediate, layers, heads, vocabulary
SHAPES = {"7b": (4096, 11008, 32, 32, 32000), "tiny": (256, 688, 4, 4, 2048)}
PROMPT_TOKENS = 16


def config(shape: str) -> DecoderConfig:
    hidden, intermediate, layers, heads, vocab = SHAPES[shape]
    return DecoderConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
        }
    )


@torch.no_grad()
def random_model(shape: str, device: torch.device) -> Decoder:
    """A decoder with NF4 + double-quantized linear layers and a bf16 embedding, head and norms."""
    with torch.device("meta"):
        model = Decoder(config(shape))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            layer = Linear4bit(module.in_features, module.out_features, bias=False)
            layer.quantize_(random_weight(module.weight, device), name=name)
            setattr(model.get_submodule(parent), leaf, layer)
            continue
        for leaf, value in module.named_parameters(recurse=False):
            weight = random_weight(value, device) if value.dim() == 2 else torch.ones_like(
                value, device=device, dtype=torch.bfloat16
            )
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    return model.eval()


def random_weight(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)


def timed(work: Callable[[], object], rounds: int, device: torch.device) -> list[float]:
    """Seconds of each call, the device's work included, after one call to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def measure(
    bench: str, work: Callable[[], object], tokens: int, rounds: int, device: torch.device, **sizes
) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    own = summary(timed(work, rounds, device))
    row = {"bench": bench, **machine(), "dtype": "bf16", **sizes}
    row |= {"tokens_per_s": round(tokens / own.median, 2), "spread": round(own.spread, 3)}
    if device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    print(row, flush=True)
    append_row("journey", {**row, "peers": {}})


def decode(model: Decoder, tokens: int) -> Callable[[], object]:
    prompt = list(range(1, PROMPT_TOKENS + 1))
    return lambda: model.generate(prompt, temperature=0.0, max_new_tokens=tokens)


def train_step(model: Decoder, r: int, ids: Tensor) -> Callable[[], object]:
    """Forward, backward and AdamW on an adapter over all linear layers, with checkpointing."""
    lora.inject(model, LoraConfig(r=r))
    model.gradient_checkpointing = True
    optimizer = optim.AdamW(lora.adapter_parameters(model), max_grad_norm=0.3)

    def work() -> None:
        model.train()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a decode")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = halfbyte.checkpoint.default_device()
    model = random_model(args.shape, device)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.seq), device=device)
    sizes = {"model": f"llama-{args.shape}"}

    def run_decode(r: int) -> None:
        work = decode(model.eval(), args.tokens)
        decode_sizes = {"r": r, "batch": 1, "seq": PROMPT_TOKENS, "new_tokens": args.tokens}
        measure("decode", work, args.tokens, args.rounds, device, **sizes, **decode_sizes)

    run_decode(0)
    step = train_step(model, args.r, ids)
    train_sizes = {"r": args.r, "batch": args.batch, "seq": args.seq}
    measure("train_step", step, ids.numel(), args.rounds, device, **sizes, **train_sizes)
    run_decode(args.r)


if __name__ == "__main__":
    main()
