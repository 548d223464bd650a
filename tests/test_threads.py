"""Operations on the CPU run on torch's own threads."""

import subprocess
import sys

import pytest
import torch

from halfbyte import dequantize_4bit, quantize_4bit

THREADS = """
import os, torch
from pathlib import Path
from halfbyte import quantize_4bit

def count():
    return len(list(Path("/proc/self/task").iterdir()))

torch.set_num_threads(3)
x = torch.randn(1 << 22)
x.add(1)  # wakes torch's threads
before = count()
for _ in range(3):
    quantize_4bit(x)
print(count() - before)
"""
FORK = """
import os, torch
from halfbyte import quantize_4bit

torch.set_num_threads(2)
x = torch.randn(1 << 20)
expected, _ = quantize_4bit(x)
child = os.fork()
if child == 0:
    # Forked threads are gone: torch's own parallel operations would hang here.
    torch.set_num_threads(1)
    packed, _ = quantize_4bit(x)
    os._exit(0 if packed.numpy().tobytes() == expected.numpy().tobytes() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def printed(program: str) -> str:
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return run.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc, shares OpenMP on Linux")
def test_no_threads_beside_those_of_torch():
    assert printed(THREADS) == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="os.fork is not safe elsewhere")
def test_a_forked_process_gets_threads_of_its_own():
    assert printed(FORK) == "0"


def test_the_number_of_threads_changes_no_bit():
    x = torch.randn(700, 1001)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        packed, state = quantize_4bit(x, double_quant=True)
        results.append((packed, dequantize_4bit(packed, state)))
    torch.set_num_threads(threads)
    for packed, weight in results[1:]:
        assert torch.equal(packed, results[0][0]) and torch.equal(weight, results[0][1])
