"""Draw decode and training of Llama-7B's shape beside peers: results/speed.svg.

halfbyte's bars are the newest rows; the peers' were measured on an H200, too, in runs of their own.
"""

from __future__ import annotations

import json

from bench import RESULTS

# tokens/s at batch 1, random weights of the shape, short context.
DECODE_PEERS = {
    "transformers 5.17 +\nbitsandbytes 0.50": 10,
    "Unsloth 2026.10": 26,
    "gpt-fast, int4": 326,
    "llama.cpp, Q4_0": 364,
}
# tokens/s at 1 x 512 tokens, rank 64 on all linear layers, gradient checkpointing.
TRAINING_PEERS = {
    "transformers 5.17 + PEFT +\nbitsandbytes 0.50": 704,
    "Unsloth 2026.10": 2015,
}


def newest(name: str, **wanted: object) -> dict:
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "H200" in row["gpu"]]
    return [row for row in rows if row.items() >= wanted.items()][-1]


def draw(axes, title: str, bars: dict[str, float], floor: float | None = None) -> None:
    colors = ["C0" if name.startswith("halfbyte") else "0.7" for name in bars]
    drawn = axes.barh(list(bars), list(bars.values()), color=colors)
    axes.bar_label(drawn, fmt="{:.0f}", padding=3, fontsize=8)
    axes.set_xlim(0, 1.2 * max(*bars.values(), floor or 0))
    if floor is not None:
        axes.axvline(floor, color="black", lw=0.8)
        axes.text(floor, -0.4, "memory ", ha="right", va="top", fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.invert_yaxis()


def main() -> None:
    from matplotlib import pyplot as plt

    shape = {"model": "llama-7b", "batch": 1}
    plain = newest("decode", bench="decode", r=0, seq=256, **shape)
    adapted = newest("decode", bench="decode", r=16, seq=256, **shape)
    step = newest("journey", bench="train_step", r=64, seq=512, **shape)
    decode = DECODE_PEERS | {
        "halfbyte, rank-16 adapter": adapted["tokens_per_s"],
        "halfbyte": plain["tokens_per_s"],
    }
    training = TRAINING_PEERS | {"halfbyte": step["tokens_per_s"]}
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.4), width_ratios=(1.2, 1))
    draw(left, "decode, batch 1, tokens/s", decode, plain["floor_tokens_per_s"])
    draw(right, "LoRA training, 1 x 512 tokens, tokens/s", training)
    figure.tight_layout()
    figure.savefig(RESULTS / "speed.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
