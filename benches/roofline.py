"""Draw the newest rows of gemv_4bit and gemm_4bit as a roofline: results/kernels.svg.

Arithmetic over bytes goes to the right, arithmetic a second upwards. Under the slope the memory
bounds, under the flat part the tensor cores, both as measured on an H200.
"""

from __future__ import annotations

import json

from bench import RESULTS
from kernels import SHAPES

COPY_RATE = 4.3e12
MULTIPLY_RATE = 790e12
STORED = 0.5 + 1 / 64 + 4 / (64 * 256)


def newest(rows: list[dict]) -> dict[tuple[int, int, int], dict]:
    products = [row for row in rows if row["bench"] in ("gemv_4bit", "gemm_4bit")]
    return {(row["N"], row["K"], row["M"]): row for row in products if "H200" in row["gpu"]}


def main() -> None:
    from matplotlib import pyplot as plt

    lines = (RESULTS / "kernels.jsonl").read_text().splitlines()
    rows = newest([json.loads(line) for line in lines])
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for i, (n, k) in enumerate(sorted(SHAPES)):
        own, peer = [], []
        for m in sorted(key[2] for key in rows if key[:2] == (n, k)):
            row, flops = rows[n, k, m], 2 * m * n * k
            intensity = flops / (n * k * STORED + 2 * m * (n + k))
            own.append((intensity, flops / row["us"] * 1e-6))
            peer.append((intensity, flops / row["peers"]["torch bf16"] * 1e-6))
        color = f"C{i}"
        axes.plot(*zip(*own, strict=True), "o-", color=color, ms=3, lw=1, label=f"{n} x {k}")
        axes.plot(*zip(*peer, strict=True), ":", color=color, lw=1)
    edges = [2, MULTIPLY_RATE / COPY_RATE, 1500]
    roof = [min(x * COPY_RATE, MULTIPLY_RATE) * 1e-12 for x in edges]
    axes.plot(edges, roof, color="black", lw=1, label="the device")
    axes.plot([], [], ":", color="gray", lw=1, label="torch bf16, the same products")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (4-bit)", ylabel="TFLOP/s")
    axes.set_title("x Wᵀ with W in NF4, 1 to 256 rows of x, one H200", fontsize=10)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    figure.savefig(RESULTS / "kernels.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
