"""The whole table of kernels: products, formats, norms, gates, AdamW, attention, sampling, loss.

Runs the benches of the GPU's kernels one after the other, each with all that it measures.
"""

from __future__ import annotations

import argparse
import sys

import attention
import cross_entropy
import elementwise
import kernels
import sampling

BENCHES = (kernels, elementwise, attention, sampling, cross_entropy)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for bench in BENCHES:
        print(f"== {bench.__name__}", flush=True)
        # Each reads its options, of which there are none.
        sys.argv = [bench.__name__]
        bench.main()


if __name__ == "__main__":
    main()
