"""paged_attention alone, over a cache that is colder than the L2, beside the memory's floor."""

from __future__ import annotations

import argparse

import torch
from bench import Timing, append_row, replays, time_row

from halfbyte.kv_cache import BLOCK, blocks_for
from halfbyte.ops.paged_attention import Cached, encode, paged_attention

BANDWIDTH = 4.3e12
HEADS = {"7b": (32, 32, 128), "8b": (32, 8, 128), "70b": (64, 8, 128), "qwen2.5-7b": (28, 4, 128)}
COLD_BYTES = 300 << 20


def token_bytes(kv_heads: int, head_dim: int, codes: bool) -> int:
    """Of a token's keys and values."""
    return 2 * kv_heads * (head_dim + 4 if codes else 2 * head_dim)


def timing(heads: tuple[int, int, int], batch: int, context: int, codes: bool) -> Timing:
    """Per launch, of replays of a graph of launches that each read another cache."""
    query_heads, kv_heads, head_dim = heads
    each = blocks_for(context)
    shape = (batch * each, BLOCK, kv_heads, head_dim)
    nbytes = batch * each * BLOCK * token_bytes(kv_heads, head_dim, codes)
    count = max(8, min(64, -(-COLD_BYTES // nbytes)))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device="cuda")

    def cached() -> Cached:
        if not codes:
            return Cached(random(*shape), random(*shape))
        both = [encode(random(*shape)) for _ in range(2)]
        scales = [scales.transpose(1, 2).contiguous() for _, scales in both]
        return Cached(*(codes for codes, _ in both), *scales)

    caches = [cached() for _ in range(count)]
    q = random(batch, query_heads, head_dim)
    k, v = random(batch, kv_heads, head_dim), random(batch, kv_heads, head_dim)
    cos, sin = random(batch, head_dim), random(batch, head_dim)
    tables = torch.randperm(batch * each, device="cuda").int().view(batch, each)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    arrived = torch.zeros(batch, query_heads, dtype=torch.int32, device="cuda")

    def work() -> None:
        for cache in caches:
            paged_attention(q, k, v, cos, sin, cache, tables, lengths, None, arrived)

    return replays(work, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[1, 64, 256, 1024, 4096])
    parser.add_argument("--codes", action="store_true", help="a cache of 8 bits")
    args = parser.parse_args()
    for name in args.shapes:
        for batch in args.batch:
            for context in args.context:
                took = timing(HEADS[name], batch, context, args.codes)
                _, kv_heads, head_dim = HEADS[name]
                nbytes = batch * context * token_bytes(kv_heads, head_dim, args.codes)
                floor = nbytes / BANDWIDTH * 1e6
                fields = {
                    "model": name,
                    "dtype": "int8" if args.codes else "bf16",
                    "batch": batch,
                    "seq": context,
                }
                row = time_row("paged_attention", {"halfbyte": took}, floor, **fields)
                append_row("attention", row)
                print(
                    f"{name:10} batch {batch:2} context {context:5}: {row['us']:7.2f} us, floor",
                    end=" ",
                )
                print(f"{floor:.2f}", flush=True)


if __name__ == "__main__":
    main()
