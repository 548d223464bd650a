"""Loss and gradients from hidden states, beside the matrix products that they cannot do without.

bf16, hidden size 4096. Peers: the three products over all tokens at once (two where the head is
frozen), and torch's own cross entropy of whole fp32 logits where there is memory for it. Memory is
what a call takes beside its inputs and gradients; its floor is a tenth of the fp32 logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from bench import append_row, time_row
from kernels import Contender, measure
from torch import Tensor
from torch.nn import functional as F

from halfbyte.ops import cross_entropy

WIDTH = 4096
TOKENS = [2048, 4096, 8192]
VOCABS = [32_000, 128_256]
CALLS = 4


def inputs(tokens: int, vocab: int, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, WIDTH, device="cuda", dtype=torch.bfloat16) / 64
    labels = torch.randint(vocab, (tokens,), device="cuda")
    return hidden, weight.requires_grad_(not frozen), labels


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
    def work() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return work


def products(hidden: Tensor, weight: Tensor, frozen: bool) -> Callable[[], None]:
    h, w = hidden.detach(), weight.detach()
    grad = torch.randn(len(h), len(w), device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        h @ w.t()
        grad @ w
        if not frozen:
            grad.t() @ h

    return work


def peak(work: Callable[[], None], *leaves: Tensor) -> float:
    """Bytes beside what is there before and the gradients that are there after."""
    work()
    torch.cuda.synchronize()
    kept = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    before = torch.cuda.memory_allocated() - kept
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before - kept


def queued(work: Callable[[], None]) -> Contender:
    """Several calls at a time, as in training, where the device does not wait for Python."""

    def replay() -> None:
        for _ in range(CALLS):
            work()

    return Contender(CALLS, replay)


def bench(tokens: int, vocab: int, frozen: bool, chunk: int | None, rounds: int) -> None:
    hidden, weight, labels = inputs(tokens, vocab, frozen)
    ours = step(lambda: cross_entropy(hidden, weight, labels, chunk=chunk), hidden, weight)
    contenders = {"halfbyte": queued(ours)}
    contenders["matrix products"] = queued(products(hidden, weight, frozen))
    if 14 * tokens * vocab < torch.cuda.mem_get_info()[0]:
        whole = step(lambda: F.cross_entropy((hidden @ weight.t()).float(), labels), hidden, weight)
        contenders["torch"] = queued(whole)
    memory = peak(ours, hidden, weight)
    times = measure(contenders, rounds)
    row = time_row("cross_entropy", times, dtype="bf16", M=tokens, N=vocab, K=WIDTH)
    row |= {"frozen": frozen, "peak_gb": round(memory / 1e9, 3)}
    append_row("cross_entropy", row)
    ratio = times["halfbyte"].median / times["matrix products"].median
    share = memory / (4 * tokens * vocab)
    print(
        f"cross_entropy T={tokens} V={vocab} {'frozen' if frozen else 'trained'} head: "
        f"{row['us']:9.0f} us, {ratio:.3f} of the products, "
        f"{100 * share:.1f} % of fp32 logits, {row['peers']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    for vocab in args.vocabs:
        for tokens in args.tokens:
            for frozen in (True, False):
                bench(tokens, vocab, frozen, args.chunk, args.rounds)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
