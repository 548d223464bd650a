"""gemv: values against fp64, rows that do not depend on each other, errors."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops import gemv

BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 49152, 576), (1, 1, 1), (2, 7, 15), (3, 300, 33), (4, 129, 64), (5, 64, 100),
          (8, 40, 257), (9, 50, 128), (40, 30, 96), (0, 5, 8), (2, 0, 8), (2, 5, 0)]  # fmt: skip


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", BOUND)
def test_against_fp64(m, n, k, dtype):
    torch.manual_seed(m + n + k)
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    y, exact = gemv(x, weight), x.double() @ weight.double().t()
    assert y.dtype == dtype and y.shape == (m, n)
    assert (y.double() - exact).norm() <= BOUND[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", BOUND)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(8, 203).to(dtype), torch.randn(1000, 203).to(dtype)
    together = gemv(x, weight)
    threads = torch.get_num_threads()
    for rows in range(1, 8):
        torch.set_num_threads(1 + rows % 3)
        assert torch.equal(gemv(x[:rows], weight), together[:rows])
    torch.set_num_threads(threads)
    x[3, 5] = float("nan")
    assert gemv(x, weight).isnan().any(1).tolist() == [row == 3 for row in range(8)]


def test_rows_of_any_stride():
    x, weight = torch.randn(64, 3).t(), torch.randn(20, 64)
    assert torch.equal(gemv(x, weight), gemv(x.contiguous(), weight))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"gemv: x: expected \[M, K\] for weight \[4, 8\], got"):
        gemv(torch.ones(1, 7), torch.ones(4, 8))
    with pytest.raises(ValueError, match="gemv: x must have dtype float32, got bfloat16"):
        gemv(torch.ones(1, 8).bfloat16(), torch.ones(4, 8))
    with pytest.raises(ValueError, match="gemv: weight must be contiguous"):
        gemv(torch.ones(1, 8), torch.ones(8, 4).t())
