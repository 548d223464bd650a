"""Decode and one training step of SmolLM2-135M-Instruct on the CPU, beside its peers.

Decode: greedy, one sequence, tokens/s of the whole call with a short prompt. Training step: LoRA
r = 16 on all linear layers, forward, backward and AdamW on 4 sequences of 128 tokens.
transformers + bitsandbytes (+ PEFT) use exactly halfbyte's tensors; llama.cpp its own Q4_0.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import halfbyte
import torch
from bench import ROOT, append_row, interleave, rate_row, show
from halfbyte import LoraConfig, _core, lora, optim
from peers import transformers_model
from torch import nn

GGUF = ROOT.parent / "shared/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "Once upon a time, in a small village by the sea, there lived"
LORA_R, BATCH, SEQ = 16, 4, 128


def halfbyte_decode(model, ids: list[int], tokens: int) -> Callable[[], object]:
    # Without an end-of-sequence id every call makes the same number of tokens.
    model.generation_config = {}
    model.config = replace(model.config, eos_token_ids=())
    return lambda: _exactly(tokens, model.generate(ids, temperature=0.0, max_new_tokens=tokens))


def transformers_decode(model: nn.Module, ids: list[int], tokens: int) -> Callable[[], object]:
    prompt = torch.tensor([ids], device=model.device)
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    mask = torch.ones_like(prompt)

    @torch.no_grad()
    def work() -> object:
        out = model.generate(prompt, attention_mask=mask, pad_token_id=0, **options)
        return _exactly(tokens, out[0, len(ids) :])

    return work


def llama_decode(gguf: Path, ids: list[int], tokens: int) -> Callable[[], object]:
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    llama = Llama(str(gguf), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def work() -> object:
        made: list[int] = []
        # temp=0 is greedy; generate() goes on past the end-of-sequence id.
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
            made.append(token)
            if len(made) == tokens:
                return made

    return work


def _exactly(tokens: int, made):
    if len(made) != tokens:
        raise RuntimeError(f"expected {tokens} new tokens, got {len(made)}")
    return made


def requantize(gguf: Path, folder: Path) -> Path:
    """The GGUF as Q4_0, by llama.cpp's own quantizer (from Q4_1: fine for speed, not quality)."""
    import llama_cpp

    out = folder / "model.Q4_0.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        str(gguf).encode(), str(out).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise RuntimeError(f"llama.cpp could not requantize {gguf}: {code}")
    return out


def measure_decode(model, name: str, gguf: Path, tokens: int, rounds: int) -> None:
    ids = model.tokenizer.encode(PROMPT)
    contenders = {
        "halfbyte": halfbyte_decode(model, ids, tokens),
        "bitsandbytes": transformers_decode(transformers_model(model), ids, tokens),
    }
    with tempfile.TemporaryDirectory() as folder:
        if _has_llama():
            contenders["llama.cpp Q4_0"] = llama_decode(requantize(gguf, Path(folder)), ids, tokens)
        times = interleave(contenders, rounds, warmup=1)
    for peer in list(times)[1:]:
        show(f"decode {name}, {tokens} tokens", times, peer)
    record("decode", tokens, times, dtype=name, batch=1, seq=len(ids), new_tokens=tokens)


def _has_llama() -> bool:
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        print("llama-cpp-python is not importable: no ratio to llama.cpp", file=sys.stderr)
        return False
    return True


def halfbyte_step(model, ids: torch.Tensor) -> Callable[[], object]:
    lora.inject(model, LoraConfig(r=LORA_R, lora_alpha=16))
    optimizer = optim.AdamW(lora.adapter_parameters(model.train()))
    return lambda: _step(model(ids, labels=ids).loss, optimizer)


def peft_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    import peft

    config = peft.LoraConfig(r=LORA_R, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    return lambda: _step(model(input_ids=ids, labels=ids, use_cache=False).loss, optimizer)


def _step(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_step(model, name: str, rounds: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (BATCH, SEQ))
    peer = peft_step(transformers_model(model), ids)
    times = interleave({"halfbyte": halfbyte_step(model, ids), "bitsandbytes": peer}, rounds, 1)
    show(f"train_step {name}, {BATCH}x{SEQ}", times)
    record("train_step", ids.numel(), times, dtype=name, batch=BATCH, seq=SEQ, r=LORA_R)


def record(bench: str, tokens: int, times, **sizes) -> None:
    fields = {"model": "SmolLM2-135M-Instruct", "threads": torch.get_num_threads(), **sizes}
    append_row("cpu_decode", rate_row(bench, tokens, times, **fields))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=GGUF, help="a GGUF file")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    _core.set_num_threads(torch.get_num_threads())
    for name, dtype in DTYPES.items():
        model = halfbyte.load(args.model, dtype=dtype, device="cpu", progress=False)
        measure_decode(model, name, args.model, args.tokens, args.rounds)
        measure_step(model, name, args.rounds)


if __name__ == "__main__":
    main()
