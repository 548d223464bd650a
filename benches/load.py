"""Load and quantize a bf16 folder of Llama's shape, random, in shards, from the page cache."""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from bench import append_row, summary, time_row
from journey import PEER, SHAPES, config, random_weight
from safetensors.torch import save_file

import halfbyte
from halfbyte.checkpoint import default_device
from halfbyte.models import Decoder

SHARD_BYTES = 5 << 30


def write_folder(folder: Path, shape: str, device: torch.device) -> int:
    """Returns how many bytes its weights have."""
    with torch.device("meta"):
        model = Decoder(config(shape))
    (folder / "config.json").write_text(json.dumps(model.config.raw))
    shards, size = [{}], 0
    for name, parameter in model.named_parameters():
        nbytes = parameter.numel() * 2
        if size // SHARD_BYTES != (size + nbytes) // SHARD_BYTES:
            shards.append({})
        size += nbytes
        shards[-1][name] = random_weight(parameter, device).cpu()
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with ThreadPoolExecutor() as writers:
        list(writers.map(save_file, shards, [folder / file for file in files]))
    return size


def load(folder: Path, device: torch.device) -> object:
    return halfbyte.load(folder, device=device, progress=False)


def load_by_transformers(folder: Path, device: torch.device) -> object:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {"dtype": torch.bfloat16, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, **options)


def seconds(load: Callable[[Path, torch.device], object], folder: Path, device) -> float:
    start = time.perf_counter()
    load(folder, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--folder", help="where there is room for it; default: the system's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", action="store_true", help="also transformers + bitsandbytes")
    parser.add_argument("--profile", action="store_true", help="where Python's time goes")
    args = parser.parse_args()
    device = default_device()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        size = write_folder(Path(name), args.shape, device)
        first = seconds(load, Path(name), device)
        took = summary([seconds(load, Path(name), device) for _ in range(args.rounds)])
        times = {"halfbyte": took}
        if args.peers:
            peer = partial(seconds, load_by_transformers, Path(name), device)
            times[PEER] = summary([peer() for _ in range(args.rounds + 1)][1:])
        fields = {"dtype": "bf16", "model": f"llama-{args.shape}", "gb": round(size / 1e9, 2)}
        row = time_row("load", times, first_us=round(first * 1e6), **fields)
        rate = size / took.median / 1e9
        print(f"load {fields}: {took.median:.3f} s, {rate:.2f} GB/s, the first {first:.3f} s")
        print({name: f"{time.median:.3f} s" for name, time in times.items()})
        append_row("load", row)
        if args.profile:
            with cProfile.Profile() as profile:
                seconds(load, Path(name), device)
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
