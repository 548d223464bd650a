"""8-bit blockwise quantization against the published figures and a brute-force reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.ops import dequantize_blockwise, dynamic_map, quantize_blockwise


def wave() -> torch.Tensor:
    i = torch.arange(1000, dtype=torch.float64)
    return (torch.sin(0.37 * i) * torch.exp(-i / 300)).float()


def test_figures_of_the_formats_reference(device):
    codes, absmax = quantize_blockwise(wave().to(device))
    # bitsandbytes' grid gives 131 for the first; the nearest code of an exact 0 is 127.
    expected = [127, 209, 232, 248, 255, 252, 240, 220, 196, 57, 34, 15]
    assert codes[:12].tolist() == expected
    published = [0.98269057, 0.42172635, 0.17910093, 0.07638831]
    assert np.allclose(absmax.cpu(), published, rtol=1e-6)
    codes, _ = quantize_blockwise(wave().abs().to(device), signed=False)
    assert codes[:12].tolist() == [0, 164, 209, 241, 255, 249, 225, 186, 138, 139, 186, 224]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "n, blocksize", [(1, 256), (255, 256), (257, 256), (5000, 64), (4097, 4096)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nearest_code(device, signed, n, blocksize, dtype):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    x = x if signed else x.abs()
    codes, absmax = quantize_blockwise(x.to(device), signed, blocksize)
    levels = dynamic_map(signed).double()
    scale = absmax.cpu().double().repeat_interleave(blocksize)[:n]
    target = x.double() / scale
    best = (target[:, None] - levels).abs().min(dim=1).values
    chosen = (target - levels[codes.cpu().long()]).abs()
    assert torch.all(chosen <= best + 1e-7)
    back = dequantize_blockwise(codes, absmax, signed, blocksize).cpu()
    assert torch.equal(back, (levels.float()[codes.cpu().long()] * scale.float()))


def test_zeros_are_exact(device):
    codes, absmax = quantize_blockwise(torch.zeros(300, device=device))
    assert dequantize_blockwise(codes, absmax).abs().max() == 0


def test_bad_block_size():
    with pytest.raises(ValueError, match="blocksize: expected"):
        quantize_blockwise(torch.ones(8), blocksize=100)
