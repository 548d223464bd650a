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
from pathlib import Path

import torch
from bench import ROOT, append_row, interleave, rate_row, show
from contenders import (
    halfbyte_decode,
    halfbyte_step,
    peft_step,
    transformers_decode,
    transformers_model,
)

import halfbyte

GGUF = ROOT.parent / "shared/models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "Once upon a time, in a small village by the sea, there lived"
LORA_R, BATCH, SEQ = 16, 4, 128


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


def measure_step(model, name: str, rounds: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (BATCH, SEQ))
    # The peer first: it shares the tensors of the model before there is an adapter in it.
    peer = peft_step(transformers_model(model), ids, LORA_R)
    contenders = {"halfbyte": halfbyte_step(model, ids, LORA_R), "bitsandbytes": peer}
    times = interleave(contenders, rounds, warmup=1)
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
    for name, dtype in DTYPES.items():
        model = halfbyte.load(args.model, dtype=dtype, device="cpu", progress=False)
        measure_decode(model, name, args.model, args.tokens, args.rounds)
        measure_step(model, name, args.rounds)


if __name__ == "__main__":
    main()
