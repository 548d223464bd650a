"""What choosing a batch's next tokens costs, from logits on: greedy, drawn, and with filters."""

from __future__ import annotations

import argparse

import torch
from bench import Timing, append_row, replays, time_row

from halfbyte.sampling import Sampling, SamplingRows

BANDWIDTH = 4.3e12
LAUNCHES = 8
SETTINGS = {
    "greedy": Sampling(),
    "plain": Sampling(temperature=0.8),
    "top_k": Sampling(temperature=0.8, top_k=50),
    "top_p": Sampling(temperature=0.8, top_p=0.95),
    "all": Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02),
}


def timing(sampling: Sampling, batch: int, vocab: int) -> Timing:
    """Per step, of replays of a graph of a few."""
    rows = SamplingRows(batch, vocab, "cuda")
    for row in range(batch):
        rows.set(row, sampling, row, [1], [], [2])
    logits = (torch.randn(batch, vocab, device="cuda") * 3).bfloat16()

    def work() -> None:
        for _ in range(LAUNCHES):
            rows.sample(logits, 0, sampling.kind)

    return replays(work, LAUNCHES)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    args = parser.parse_args()
    for vocab in args.vocab:
        for batch in args.batch:
            for name, sampling in SETTINGS.items():
                took = timing(sampling, batch, vocab)
                floor = 2 * batch * vocab / BANDWIDTH * 1e6
                fields = {"settings": name, "batch": batch, "N": vocab}
                row = time_row("sampling", {"halfbyte": took}, floor, **fields)
                append_row("sampling", row)
                print(f"vocabulary {vocab:6} batch {batch:2} {name:6}: {row['us']:7.2f} us")


if __name__ == "__main__":
    main()
