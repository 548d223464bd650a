"""The whole way at Llama-7B's shape with random weights: quantize, decode, train, decode again.

Weights are drawn and quantized layer by layer on the device, so no 16-bit model ever exists.
"""

from __future__ import annotations

import argparse

import torch
from bench import append_row, interleave, rate_row
from contenders import (
    halfbyte_decode,
    halfbyte_step,
    launched_step,
    peft_step,
    transformers_decode,
    transformers_model,
)
from torch import Tensor, nn

from halfbyte import Linear4bit
from halfbyte.checkpoint import default_device
from halfbyte.models import Decoder, DecoderConfig

# hidden, intermediate, layers, heads, key heads, vocabulary
SHAPES = {
    "1b": (2048, 5632, 22, 32, 32, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "33b": (6656, 17920, 60, 52, 52, 32000),
    "65b": (8192, 22016, 80, 64, 64, 32000),
    "70b": (8192, 28672, 80, 64, 8, 128256),
    "tiny": (256, 688, 4, 4, 2, 2048),
}
PROMPT_TOKENS = 16
PEER = "transformers + bitsandbytes"


def config(shape: str) -> DecoderConfig:
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    return DecoderConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 8192,
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
            weight = (
                random_weight(value, device)
                if value.dim() == 2
                else torch.ones_like(value, device=device, dtype=torch.bfloat16)
            )
            setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    return model.eval()


def random_weight(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)


class Journey:
    """One model, and its peer over the same tensors if there is to be one."""

    def __init__(self, model: Decoder, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.peer = transformers_model(model) if args.peers else None

    def decode(self, r: int) -> None:
        tokens, prompt = self.args.tokens, list(range(1, PROMPT_TOKENS + 1))
        works = {"halfbyte": halfbyte_decode(self.model.eval(), prompt, tokens)}
        if self.peer is not None:
            works[PEER] = transformers_decode(self.peer.eval(), prompt, tokens)
        self.measure("decode", tokens, works, r=r, batch=1, seq=len(prompt), new_tokens=tokens)

    def train(self) -> None:
        shape, r = (self.args.batch, self.args.seq), self.args.r
        device = self.model.lm_head.weight.device
        ids = torch.randint(0, self.model.config.vocab_size, shape, device=device)
        works = {"halfbyte": halfbyte_step(self.model, ids, r, checkpointing=True)}
        works["halfbyte without graphs"] = launched_step(self.model, ids)
        if self.peer is not None:
            works[PEER] = peft_step(self.peer, ids, r, checkpointing=True)
        self.measure("train_step", ids.numel(), works, r=r, batch=shape[0], seq=shape[1])

    def measure(self, bench: str, tokens: int, works: dict, **sizes) -> None:
        """halfbyte alone first, so that the peak is its own."""
        reset_peak()
        times = interleave({"halfbyte": works.pop("halfbyte")}, self.args.rounds, warmup=2)
        peak = peak_gb()
        times |= interleave(works, self.args.rounds, warmup=1)
        fields = {"dtype": "bf16", "model": f"llama-{self.args.shape}", **sizes}
        row = rate_row(bench, tokens, times, peak, **fields)
        print(row, flush=True)
        append_row("journey", row)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a decode")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peers", action="store_true", help="also transformers + bitsandbytes")
    args = parser.parse_args()
    torch.manual_seed(0)
    journey = Journey(random_model(args.shape, default_device()), args)
    journey.decode(r=0)
    journey.train()
    journey.decode(r=args.r)


if __name__ == "__main__":
    main()
