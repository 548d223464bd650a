"""CUDA kernels against the CPU backend: equal bytes, inside their bounds, on the right stream."""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from halfbyte import QuantState, _core
from halfbyte.ops import dequantize_4bit, gemm_4bit
from halfbyte.ops.gemm_4bit import is_dequantized
from halfbyte.ops.gemv_4bit_fused import LowRank, Product, fuses, gemv_4bit_fused
from halfbyte.ops.quant_state import Nested

pytestmark = pytest.mark.gpu

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
QUANT_TYPES = ["nf4", "fp4", "int4"]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
ODD_SIZES = [1, 2, 31, 63, 64, 65, 1000, 3300, 4095, 4096, 4097, 8193, 100_001]
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@dataclass
class Guarded:
    """A poisoned tensor between two canaries."""

    buffer: Tensor
    view: Tensor

    def intact(self) -> Tensor:
        """The view, once the canaries are found unharmed."""
        raw = self.buffer.view(torch.uint8)
        start = (self.view.data_ptr() - self.buffer.data_ptr()) // raw.element_size()
        end = start + self.view.numel() * self.view.element_size()
        assert bool((raw[:start] == POISON).all()) and bool((raw[end:] == POISON).all())
        return self.view


POISON = 0xFF  # NaN in every float dtype


def guarded(n: int, dtype: torch.dtype, device: torch.device, shift: int = 0) -> Guarded:
    """n elements that start ``shift`` elements past a 256-byte boundary."""
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.full(((n + shift) * size + 512,), POISON, dtype=torch.uint8, device=device)
    buffer = raw[: raw.numel() // size * size].view(dtype)
    first = 256 // size + shift
    return Guarded(buffer, buffer[first : first + n])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(n: int, dtype: torch.dtype, blocksize: int, seed: int = 0) -> Tensor:
    """Gaussian and coarse values; some blocks of zeros, of denormals and of huge values."""
    rng = generator(seed + n)
    x = torch.randn(n, generator=rng)
    coarse = torch.randint(-100, 101, (n,), generator=rng) / 100
    kind = torch.randint(0, 6, (-(-n // blocksize),), generator=rng).repeat_interleave(blocksize)
    kind = kind[:n]
    x = torch.where(kind < 3, x, coarse)
    scale = torch.tensor([1.0, 1.0, 3e3, 1.0, 0.0, 1e-39])[kind]
    return (x * scale).to(dtype)


def at(x: Tensor, device: torch.device, shift: int = 0) -> Tensor:
    """A copy on the device that starts ``shift`` elements past an aligned address."""
    home = torch.empty(x.numel() + shift, dtype=x.dtype, device=device)
    return home[shift:].copy_(x)


def quantize(x: Tensor, quant_type: str, blocksize: int, shift: int = 0) -> tuple[Tensor, Tensor]:
    n = x.numel()
    packed = guarded((n + 1) // 2, torch.uint8, x.device, shift)
    absmax = guarded(-(-n // blocksize), torch.float32, x.device, shift)
    _core.quantize_4bit(x, packed.view, absmax.view, quant_type, blocksize)
    return packed.intact(), absmax.intact()


def same(ours: Tensor, expected: Tensor) -> None:
    """Equal bytes, except that one NaN is as good as another."""
    ours, expected = ours.cpu(), expected.cpu()
    if expected.is_floating_point():
        assert torch.equal(ours.isnan(), expected.isnan())
        number = ~expected.isnan()
        ours, expected = ours[number], expected[number]
    wrong = (ours.view(torch.uint8) != expected.view(torch.uint8)).sum()
    assert wrong == 0, f"{int(wrong)} of {expected.nbytes} bytes differ"


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_4bit(dtype, quant_type, blocksize):
    for n in ODD_SIZES:
        x = weights(n, dtype, blocksize)
        for ours, expected in zip(
            quantize(at(x, CUDA), quant_type, blocksize),
            quantize(x, quant_type, blocksize),
            strict=True,
        ):
            same(ours, expected)


@pytest.mark.parametrize("blocksize", [32, 64, 1024, 4096])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_4bit_of_several_tiles_a_cta(dtype, quant_type, blocksize):
    x = weights(5_000_011, dtype, blocksize)
    packed, absmax = quantize(at(x, CUDA), quant_type, blocksize)
    expected, expected_absmax = quantize(x, quant_type, blocksize)
    same(packed, expected)
    same(absmax, expected_absmax)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_4bit_at_every_threshold(dtype):
    table = sorted(_core.codebook("nf4"))
    middle = torch.tensor([(a + b) / 2 for a, b in zip(table, table[1:], strict=False)])
    near = torch.cat([middle.nextafter(torch.tensor(s)) for s in (-2.0, 2.0)] + [middle])
    for scale in (1.0, 0.37, 2.5e-3):
        x = torch.full((64 * 64,), 1.0)
        x[1::2] = near[torch.randint(0, near.numel(), (64 * 32,), generator=generator(1))]
        x = (x * scale).to(dtype)
        same(quantize(at(x, CUDA), "nf4", 64)[0], quantize(x, "nf4", 64)[0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_4bit_is_that_of_bitsandbytes(dtype):
    """But for codes beside a threshold: it divides approximately."""
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(1 << 24, generator=generator(0)).to(CUDA, dtype)
    packed, absmax = quantize(x, "nf4", 64)
    theirs, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    same(absmax, state.absmax)
    assert (packed != theirs.view(-1)).sum() <= 1e-5 * x.numel()


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_4bit_unaligned(dtype, shift):
    x = weights(10_001, dtype, 64)
    packed, absmax = quantize(at(x, CUDA, shift), "nf4", 64, shift)
    same(packed, quantize(x, "nf4", 64)[0])
    same(absmax, quantize(x, "nf4", 64)[1])


@pytest.mark.parametrize("blocksize", [32, 64, 1024, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_block_with_nan_or_inf_says_so(dtype, blocksize):
    x = weights(5 * blocksize + 3, dtype, 32)
    x[blocksize + 5], x[3 * blocksize - 1] = float("nan"), float("-inf")
    x[4 * blocksize], x[4 * blocksize + 1] = float("inf"), float("nan")
    absmax = quantize(at(x, CUDA), "nf4", blocksize)[1]
    same(absmax, quantize(x, "nf4", blocksize)[1])
    assert absmax.isnan().cpu().tolist() == [False, True, False, False, True, False]
    assert absmax.isinf().cpu().tolist() == [False, False, True, False, False, False]


NBLOCKS = [0, 1, 255, 256, 257, 2049, 65535, 65536, 65537, 65836, 131072, 5 * 65536 + 1]
NBLOCKS += [23 * 65536 + 77]  # of which every warp has several turns


def double_quantize(absmax: Tensor, shift: int = 0) -> list[Tensor]:
    nblocks, device = absmax.numel(), absmax.device
    codes = guarded(nblocks, torch.uint8, device, shift)
    nested = guarded(-(-nblocks // 256), torch.float32, device, shift)
    offset = guarded(1, torch.float32, device, shift)
    lanes = guarded(2048 * -(-nblocks // 65536), torch.uint8, device)
    _core.double_quantize(absmax, codes.view, nested.view, offset.view, lanes.view)
    lanes.intact()
    return [codes.intact(), nested.intact(), offset.intact()]


@pytest.mark.parametrize("nblocks", NBLOCKS)
@pytest.mark.parametrize("shift", [0, 1])
def test_double_quantize(nblocks, shift):
    absmax = torch.rand(nblocks, generator=generator(nblocks)) ** 3
    absmax[: nblocks // 3] = 0.25
    for ours, expected in zip(
        double_quantize(at(absmax, CUDA, shift), shift), double_quantize(absmax), strict=True
    ):
        same(ours, expected)


def scales(nblocks: int, nested: bool, device: torch.device, shift: int = 0) -> tuple:
    """The four scale arguments of a reader."""
    rng = generator(nblocks)
    if not nested:
        return at(torch.rand(nblocks, generator=rng), device, shift), None, None, 0.0
    codes = torch.randint(0, 256, (nblocks,), generator=rng, dtype=torch.uint8)
    absmax = torch.rand(-(-nblocks // 256), generator=rng)
    table = torch.tensor(_core.dynamic_map(True))
    return at(codes, device, shift), at(absmax, device, shift), at(table, device, shift), 1.0625


def codes(n: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 256, ((n + 1) // 2,), generator=generator(seed + n), dtype=torch.uint8)


def dequantize(packed, scale, quant_type, blocksize, n, dtype, shift=0) -> Tensor:
    out = guarded(n, dtype, packed.device, shift)
    _core.dequantize_4bit(packed, *scale, quant_type, blocksize, out.view)
    return out.intact()


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_4bit(dtype, quant_type, blocksize):
    for n in ODD_SIZES:
        packed, nblocks = codes(n), -(-n // blocksize)
        for nested in (False, True):
            args = (quant_type, blocksize, n, dtype)
            ours = dequantize(at(packed, CUDA), scales(nblocks, nested, CUDA), *args)
            same(ours, dequantize(packed, scales(nblocks, nested, CPU), *args))


@pytest.mark.parametrize("shift", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_4bit_unaligned(dtype, shift):
    n, packed = 20_001, codes(20_001)
    expected = dequantize(packed, scales(313, True, CPU), "nf4", 64, n, dtype)
    for read_shift, write_shift in ((shift, 0), (0, shift), (shift, shift)):
        scale = scales(313, True, CUDA, read_shift)
        ours = dequantize(at(packed, CUDA, read_shift), scale, "nf4", 64, n, dtype, write_shift)
        same(ours, expected)


def quantize_blockwise(x: Tensor, signed: bool, blocksize: int, shift: int = 0) -> list[Tensor]:
    codes = guarded(x.numel(), torch.uint8, x.device, shift)
    absmax = guarded(-(-x.numel() // blocksize), torch.float32, x.device, shift)
    _core.quantize_blockwise(x, codes.view, absmax.view, signed, blocksize)
    out = guarded(x.numel(), x.dtype, x.device, shift)
    _core.dequantize_blockwise(codes.view, absmax.view, signed, blocksize, out.view)
    return [codes.intact(), absmax.intact(), out.intact()]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("blocksize", [64, 256, 1024, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_blockwise(dtype, blocksize, signed):
    for n in ODD_SIZES:
        x = weights(n, dtype, blocksize)
        for shift in (0, 3):
            ours = quantize_blockwise(at(x, CUDA, shift), signed, blocksize, shift)
            for got, expected in zip(ours, quantize_blockwise(x, signed, blocksize), strict=True):
                same(got, expected)


def table_gain(quant_type: str, dtype: torch.dtype) -> float:
    """Of the tables of values: what makes rounding them to dtype cost least."""
    nf4 = 1.3662 if dtype == torch.float16 else 1.43675
    return {"nf4": nf4, "fp4": 12.0, "int4": 7.0}[quant_type]


@dataclass
class Linear:
    """A random W [N, K] in 4 bits on the GPU."""

    N: int
    K: int
    blocksize: int = 64
    quant_type: str = "nf4"
    nested: bool = True

    def __post_init__(self):
        n, nblocks = self.N * self.K, -(-self.N * self.K // self.blocksize)
        self.packed, self.scale = at(codes(n), CUDA), scales(nblocks, self.nested, CUDA)

    def weight(self) -> Tensor:
        """W in fp64 on the CPU, by the CPU backend."""
        scale = [t.cpu() if isinstance(t, Tensor) else t for t in self.scale]
        args = (self.quant_type, self.blocksize, self.N * self.K, torch.float32)
        return dequantize(self.packed.cpu(), scale, *args).double().view(self.N, self.K)

    def table_weight(self, dtype: torch.dtype) -> Tensor:
        """W in fp64 as tensor cores see it: the codebook rounded to `dtype`, the scales exact."""
        gain = table_gain(self.quant_type, dtype)
        table = (torch.tensor(_core.codebook(self.quant_type)) * gain).to(dtype).double() / gain
        scales = self.scales().double().repeat_interleave(self.blocksize)
        n = self.N * self.K
        return (self.values(table)[:n] * scales[:n]).view(self.N, self.K)

    def gemv_weight(self, dtype: torch.dtype) -> Tensor:
        """W in fp64 as gemv_4bit sees it where codes are aligned."""
        device = torch.cuda.get_device_properties(0)
        # A table, sums and a row of x.
        fits = (80 << 10) + 2 * (self.K + 320) <= device.shared_memory_per_block_optin
        new = torch.cuda.get_device_capability() >= (8, 0) and fits
        tables = new and self.blocksize >= 64 and dtype != torch.float32
        return self.table_weight(dtype) if tables else self.weight()

    def rounded_weight(self) -> Tensor:
        """W in fp64 as tensor cores see it where scales enter the weights: rounded to bf16."""
        gain = torch.tensor(table_gain(self.quant_type, torch.float16))
        table = (torch.tensor(_core.codebook(self.quant_type)) * gain).half().float()
        scale = self.scales() * (1 / gain)
        weight = self.values(table).view(-1, self.blocksize) * scale[:, None]
        return weight.bfloat16().double().view(self.N, self.K)

    def seen(self, x: Tensor) -> list[Tensor]:
        """W as it may multiply x: scales enter the sums, or, of many rows in bf16, the weights."""
        by_scales = len(x) > 64 and x.dtype == torch.bfloat16
        return [self.table_weight(x.dtype), *([self.rounded_weight()] if by_scales else [])]

    def state(self, dtype: torch.dtype) -> QuantState:
        """Of nested scales."""
        absmax, nested_absmax, nested_map, offset = self.scale
        nested, shape = Nested(nested_absmax, nested_map), (self.N, self.K)
        return QuantState(absmax, nested, offset, self.blocksize, self.quant_type, shape, dtype)

    def repeated(self, N: int) -> Linear:
        """These rows over and over, N in all; they are whole blocks of nested scales."""
        assert self.nested and self.blocksize == 64 and self.N * self.K % (64 * 256) == 0

        def over(x: Tensor, weights: int) -> Tensor:
            size = -(-N * self.K // weights)
            return x.repeat(-(-size // x.numel()))[:size]

        many = copy.copy(self)
        absmax, nested_absmax, *rest = self.scale
        many.N, many.packed = N, over(self.packed, 2)
        many.scale = (over(absmax, 64), over(nested_absmax, 64 * 256), *rest)
        return many

    def values(self, table: Tensor) -> Tensor:
        packed = self.packed.cpu().long()
        return table[torch.stack([packed >> 4, packed & 15], 1).flatten()]

    def scales(self) -> Tensor:
        absmax, nested_absmax, nested_map, offset = self.scale
        if not self.nested:
            return absmax.cpu()
        nested_absmax = nested_absmax.cpu().repeat_interleave(256)[: absmax.numel()]
        return nested_map.cpu()[absmax.cpu().long()] * nested_absmax + offset

    def __call__(self, x: Tensor, shift: int = 0) -> Tensor:
        out = guarded(x.shape[0] * self.N, x.dtype, x.device, shift)
        args = (self.packed, *self.scale, self.quant_type, self.blocksize)
        _core.gemv_4bit(x, *args, out.view.view(x.shape[0], self.N))
        return out.intact().view(x.shape[0], self.N)


def rows(M: int, K: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    x = torch.randn(M * K, generator=generator(K)).to(dtype)
    return at(x, CUDA, shift).view(M, K)


def close(out: Tensor, x: Tensor, *weights: Tensor) -> None:
    """Near what one of the weights gives."""
    assert min(excess(out, x, weight) for weight in weights) <= 0


def excess(out: Tensor, x: Tensor, weight: Tensor) -> float:
    """By how much an error exceeds the rounding of the result once, and of an fp32 sum.

    Where out has more columns than the weight has rows, these come over and over.
    """
    x, weight = x.double(), weight.to(x.device)
    times = -(-out.shape[1] // len(weight))
    products = x @ weight.T, x.abs() @ weight.abs().T
    exact, size = (product.repeat(1, times)[:, : out.shape[1]] for product in products)
    rounding = torch.finfo(out.dtype).eps
    allowed = rounding * exact.abs() + 2e-6 * size + 1e-7
    return ((out.double() - exact).abs() - allowed).max().item()


SHAPES = [(1, 1), (5, 33), (17, 31), (9, 100), (1, 32), (3, 96), (40, 64), (33, 576), (1000, 1024)]
SHAPES += [(1032, 2880), (64, 4096), (24, 11008), (8, 14336), (1001, 1056), (72, 960), (40, 4032)]


@pytest.mark.parametrize("N, K", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gemv_4bit(dtype, N, K):
    for number, M in enumerate([1, 2, 3, 7, 8, 9, 17, 33]):
        blocksize = BLOCKSIZES[(N + number) % 8]
        linear = Linear(N, K, blocksize, QUANT_TYPES[number % 3], nested=number % 2 == 0)
        for shift in (0, 1):
            x = rows(M, K, dtype, shift)
            close(linear(x, shift), x, linear.gemv_weight(dtype))


@pytest.mark.parametrize("N, K", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gemv_4bit_of_codes_that_are_not_aligned(dtype, N, K):
    for number, M in enumerate([1, 3, 8, 9]):
        linear = Linear(N, K, BLOCKSIZES[(N + number) % 8], nested=number % 2 == 0)
        linear.packed = at(linear.packed.cpu(), CUDA, 1)
        x = rows(M, K, dtype)
        close(linear(x), x, linear.weight())


# Rows that begin anywhere in a block, and go through shared memory at once or some at a time.
ANY_SHAPES = [(3, 63), (65, 65), (200, 95), (1000, 333), (2050, 1023), (1031, 4095), (130, 4094)]
ANY_SHAPES += [(70, 11_007), (9, 20_001), (40_003, 33)]


@pytest.mark.parametrize("N, K", ANY_SHAPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_4bit_of_rows_that_begin_anywhere(dtype, nested, N, K):
    for number, M in enumerate([1, 2, 5, 8, 9, 17]):
        linear = Linear(N, K, BLOCKSIZES[1 + number], QUANT_TYPES[number % 3], nested)
        x = rows(M, K, dtype, shift=number % 2)
        y = linear(x)
        close(y, x, linear.gemv_weight(dtype))
        same(y[:1], linear(x[:1]))
        assert all(torch.equal(linear(x), y) for _ in range(5))


def test_gemv_4bit_keeps_rows_apart_that_begin_anywhere():
    linear, x = Linear(300, 1023, nested=False), rows(8, 1023, torch.bfloat16)
    clean = linear(x)
    x[3, 5], x[5, 1022], x[7, 0] = float("nan"), float("inf"), -float("inf")
    y = linear(x)
    kept = [0, 1, 2, 4, 6]
    same(y[kept], clean[kept])
    assert y[3].isnan().all() and not y[5].isfinite().any() and not y[7].isfinite().any()
    # The block in which row 100 ends and row 101 begins.
    linear.scale[0][101 * 1023 // 64] = torch.nan
    marred = linear(x[kept]).isnan().all(0).nonzero().flatten().tolist()
    assert marred == [100, 101] and linear(x[kept]).isnan().sum() == 2 * len(kept)


MMA_SHAPES = [(1, 256), (8, 512), (17, 2816), (40, 4096), (1000, 1024), (1032, 8192)]
MMA_SHAPES += [(4099, 256), (2305, 5120), (24, 11008), (33, 14336), (9, 28672)]


@pytest.mark.parametrize("N, K", MMA_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_4bit_on_tensor_cores(dtype, N, K):
    for number, M in enumerate([1, 2, 3, 7, 8, 9, 16, 33]):
        linear = Linear(N, K, quant_type=QUANT_TYPES[number % 3])
        x = rows(M, K, dtype)
        for shift in (0, 1):
            close(linear(x, shift), x, linear.table_weight(dtype))


# Rows of any number of blocks: their scales begin anywhere.
BLOCK_SHAPES = [(4, 64), (40, 576), (1004, 896), (2052, 960), (1032, 2880), (68, 4160), (36, 8256)]


@pytest.mark.parametrize("N, K", [*MMA_SHAPES, *BLOCK_SHAPES])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_4bit_of_any_number_of_blocks(dtype, nested, N, K):
    for number, M in enumerate([1, 2, 7, 8, 9, 16, 33]):
        linear = Linear(N, K, quant_type=QUANT_TYPES[number % 3], nested=nested)
        x = rows(M, K, dtype)
        close(linear(x), x, linear.gemv_weight(dtype))


@pytest.mark.parametrize("N, K", [(40_004, 64), (36_004, 576), (40_002, 896), (36_001, 1024)])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_4bit_of_many_short_rows(dtype, nested, N, K):
    """Panels go side by side, the last of them without some of their rows."""
    linear = Linear(N, K, nested=nested)
    weight = linear.gemv_weight(dtype)
    for M in (1, 5, 8, 9, 16, 33):
        x = rows(M, K, dtype)
        y = linear(x)
        close(y, x, weight)
        same(y[:1], linear(x[:1]))
        assert all(torch.equal(linear(x), y) for _ in range(20))


@pytest.mark.parametrize("N", [528, 36_012])
@pytest.mark.parametrize("M", [1, 16])
def test_gemv_4bit_ignores_what_lies_beside_a_row(M, N):
    """A slice that is not whole leaves places in shared memory that hold what was there before."""
    linear = Linear(N, 320, nested=False)
    linear.scale[0].view(N, 5)[::3] = torch.nan
    out = linear(rows(M, 320, torch.bfloat16)).view(M, N // 3, 3)
    assert out[:, :, 0].isnan().all()
    assert out[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemv_4bit_reads_every_weight_in_every_place(dtype):
    linear = Linear(16, 512)
    linear.packed.copy_(torch.arange(4096).to(torch.uint8))
    x = torch.eye(512, device=CUDA, dtype=dtype)
    close(linear(x), x, linear.table_weight(dtype))


@pytest.mark.parametrize("M", [1, 5, 8, 16, 17, 33, 64, 65, 128, 256, 512])
@pytest.mark.parametrize("K", [2048, 2047])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_no_less_accurate_than_bitsandbytes(dtype, K, M):
    """Than its dequantized weight, whose bits are ours, multiplied as exactly as fp32 can."""
    linear, x = Linear(4096, K), rows(M, K, dtype)
    state = linear.state(dtype)
    exact = (x.double() @ linear.weight().to(CUDA).T).cpu()
    peer = dequantize_4bit(linear.packed, state)
    y = gemm_4bit(x, linear.packed, state)
    if is_dequantized(x, state):
        return same(y, x @ peer.T)
    theirs = (x.float() @ peer.float().T).to(dtype)
    # Of many rows in bf16 a table of fp16 is rounded before its scaled values are: 0.1 % more.
    bound = 1.002 if dtype == torch.bfloat16 and M > 64 else 1
    assert error(y, exact) <= bound * error(theirs, exact)


@pytest.mark.parametrize("M", [3, 13])
def test_gemv_4bit_of_more_panels_than_go_together(M):
    """Each multiprocessor gets more than sixteen panels, and K has more than one slice."""
    linear, x = Linear(36_000, 4352), rows(M, 4352, torch.bfloat16)
    close(linear(x), x, linear.table_weight(torch.bfloat16))


def gemm(linear: Linear, x: Tensor) -> Tensor:
    return gemm_group([linear], x)[0]


def gemm_group(linears: list[Linear], x: Tensor) -> list[Tensor]:
    """Products of one x by weights of one quant_type and blocksize."""
    outs = [guarded(len(x) * linear.N, x.dtype, CUDA) for linear in linears]
    views = [out.view.view(len(x), linear.N) for linear, out in zip(linears, outs, strict=True)]
    products = [(w.packed, *w.scale, view) for w, view in zip(linears, views, strict=True)]
    _core.gemm_4bit(x, products, linears[0].quant_type, linears[0].blocksize)
    return [out.intact().view_as(view) for out, view in zip(outs, views, strict=True)]


@pytest.mark.parametrize("M", [1, 9, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1023])
@pytest.mark.parametrize("N, K", [(1, 256), (40, 512), (129, 1024), (1000, 2816), (4104, 4096)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemm_4bit(dtype, N, K, M):
    linear, x = Linear(N, K, quant_type=QUANT_TYPES[M % 3]), rows(M, K, dtype)
    y = gemm(linear, x)
    close(y, x, *linear.seen(x))
    same(gemm(linear, x), y)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_4bit_of_what_its_kernel_does_not_take(dtype):
    cases = [(33, 100, 64, True), (40, 512, 128, True), (9, 256, 64, False)]
    cases += [(33, 960, 64, True), (17, 4032, 64, True)]
    for N, K, blocksize, nested in cases:
        linear, x = Linear(N, K, blocksize, nested=nested), rows(33, K, dtype)
        close(gemm(linear, x), x, linear.gemv_weight(dtype))


@pytest.mark.parametrize("M", [9, 32, 64, 65, 200])
@pytest.mark.parametrize("K", [256, 768, 1024, 2816])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gemm_4bit_of_several_weights(dtype, K, M):
    """In one launch up to 64 rows of x, then the order of their sums follows from all weights."""
    linears, x = [Linear(N, K) for N in (40, 1000, 1, 3585)], rows(M, K, dtype)
    for linear in linears[1:]:
        linear.scale = (*linear.scale[:2], linears[0].scale[2], linear.scale[3])
    for count in range(1, 5):
        for y, linear in zip(gemm_group(linears[:count], x), linears, strict=False):
            if M > 64:
                same(y, gemm(linear, x))
            else:
                close(y, x, linear.table_weight(dtype))


def multiplied(linear: Linear, x: Tensor) -> Tensor:
    """By the kernels that the operations take for so many rows."""
    return linear(x) if len(x) <= 16 else gemm(linear, x)


@pytest.mark.parametrize("M", [1, 9, 17, 64, 128])
@pytest.mark.parametrize(
    "N, K, period", [(151_936, 896, 128), (151_936, 1024, 64), (131_104, 256, 2048)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_vocabulary_of_rows(dtype, N, K, period, M):
    part, x = Linear(period, K), rows(M, K, dtype)
    weights = [part.gemv_weight(x.dtype)] if K % 256 else part.seen(x)
    close(multiplied(part.repeated(N), x), x, *weights)


@pytest.mark.parametrize("M", [1, 9, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_with_extreme_scales_and_bytes(dtype, M):
    """Four rows share a nested scale; each has the lowest, highest or least code, or all."""
    linear, x = Linear(28, 4096), rows(M, 4096, dtype) * 2**-13
    absmax, nested_absmax, nested_map, _ = linear.scale
    for row, code in enumerate([0, 255, 127]):
        absmax.view(28, 64)[row::4] = code
    extremes = [1.0, float("nan"), 65504.0, 1e-39, 0.0, 3e-5, 1.0]
    nested_absmax.copy_(torch.tensor(extremes))
    linear.scale = (absmax, nested_absmax, nested_map, 0.0)
    linear.packed.view(28, -1)[24:26], linear.packed.view(28, -1)[26:] = 0, 255
    y = multiplied(linear, x)
    kept = [row for row in range(28) if row // 4 != 1]
    assert y[:, 4:8].isnan().all() and (y[:, 16:20] == 0).all()
    close(y[:, kept], x, *(weight[kept] for weight in linear.seen(x)))


def test_gemm_4bit_keeps_rows_apart():
    linear, x = Linear(300, 1024), rows(70, 1024, torch.bfloat16)
    clean = gemm(linear, x)
    x[3, 5], x[40, 1000], x[69, 0] = float("nan"), float("inf"), -float("inf")
    y = gemm(linear, x)
    kept = [m for m in range(70) if m not in (3, 40, 69)]
    same(y[kept], clean[kept])
    assert y[3].isnan().all() and not y[40].isfinite().any() and not y[69].isfinite().any()


@pytest.mark.parametrize("M", [1, 3, 8, 9, 17])
@pytest.mark.parametrize("K", [256, 1000, 5120])
@pytest.mark.parametrize("dtype", FLOATS)
def test_gemv_4bit_group_is_its_parts(dtype, K, M):
    x = rows(M, K, dtype)
    linears = [Linear(N, K) for N in (5, 1000, 16, 2049)]
    for count in range(1, 5):
        for shared in (True, False):
            if shared:
                for linear in linears:
                    linear.scale = (*linear.scale[:2], linears[0].scale[2], linear.scale[3])
            outs = [guarded(M * linear.N, dtype, CUDA) for linear in linears[:count]]
            products = [
                (linear.packed, *linear.scale, out.view.view(M, linear.N))
                for linear, out in zip(linears, outs, strict=False)
            ]
            _core.gemv_4bit_group(x, products, "nf4", 64)
            for linear, out in zip(linears, outs, strict=False):
                same(out.intact().view(M, linear.N), linear(x))


def error(y: Tensor, exact: Tensor) -> float:
    return (y.cpu().double() - exact).norm().item()


def test_gemv_4bit_sees_what_the_kernel_before_it_wrote():
    """It may start before that kernel has ended, so its weights, scales and x are all at risk."""
    linear, x = Linear(4096, 4096), rows(4, 4096, torch.bfloat16)
    fresh = [Linear(4096, 4096, quant_type=name) for name in ("fp4", "int4")]
    for other in fresh:
        other.quant_type = "nf4"
        other.packed.bitwise_xor_(0x5A)
        expected = other(x + 1)
        for _ in range(50):
            linear.packed.zero_(), linear.scale[0].zero_()
            linear(x)
            linear.scale[0].copy_(other.scale[0])
            linear(x)
            y = x + 1
            linear.packed.copy_(other.packed)
            got = linear(y)
            same(got, expected)
        # As a chain, each reading what the one before it has just made.
        chain, alone = x, x
        for _ in range(20):
            chain = linear(chain.clone()) * 0.01
        for _ in range(20):
            torch.cuda.synchronize()
            alone = linear(alone.clone()) * 0.01
        same(chain, alone)


@pytest.mark.parametrize("M", [33, 128])
def test_gemm_4bit_sees_what_the_kernel_before_it_wrote(M):
    linear, other = Linear(4096, 4096), Linear(4096, 4096, quant_type="fp4")
    x, out = rows(M, 4096, torch.bfloat16), torch.empty(M, 4096, dtype=torch.bfloat16, device=CUDA)
    other.quant_type = "nf4"
    other.packed.bitwise_xor_(0x5A)
    expected = gemm(other, x + 1)

    def multiply(x: Tensor) -> None:
        _core.gemm_4bit(x, [(linear.packed, *linear.scale, out)], "nf4", 64)

    for _ in range(50):
        linear.packed.zero_(), linear.scale[0].zero_()
        multiply(x)
        linear.scale[0].copy_(other.scale[0])
        multiply(x)
        y = x + 1
        linear.packed.copy_(other.packed)
        multiply(y)
        same(out, expected)
        y.copy_(x)
        multiply(y.add_(1))
        same(out, expected)


@pytest.mark.parametrize("K", [100, 1024, 4096, 11008])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_does_not_depend_on_the_others(dtype, K):
    linear, x = Linear(72, K), rows(19, K, dtype)
    alone = torch.cat([linear(x[i : i + 1].clone()) for i in range(19)])
    for M in (2, 3, 4, 5, 8, 9, 16, 19):
        same(linear(x[:M].clone()), alone[:M])


@pytest.mark.parametrize("K", [100, 1056, 4096])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_inf_stay_in_their_row(dtype, K):
    linear, x = Linear(40, K), rows(3, K, dtype)
    clean = linear(x)
    x[1, K - 1], x[2, K // 2] = float("nan"), float("inf")
    out = linear(x)
    same(out[0], clean[0])
    assert bool(out[1].isnan().all())
    expected = (linear.weight()[:, K // 2] * float("inf")).to(dtype)
    same(out[2], expected)


def test_one_hot_reads_every_weight():
    linear = Linear(16, 256)
    out = linear(torch.eye(256, device=CUDA))
    assert torch.equal(out.cpu().double().T, linear.weight())


def test_sums_beyond_fp16_hold():
    linear = Linear(16, 4096, nested=False)
    for halves in (linear.packed.view(16, 2, -1), linear.scale[0].view(16, 2, -1)):
        halves[:, 1] = halves[:, 0]
    x = torch.full((1, 4096), 6e4, dtype=torch.float16, device=CUDA)
    x[:, 2048:] = -6e4
    x[:, :8] = 5e4
    out = linear(x)
    assert bool(out.isfinite().all())
    close(out, x, linear.gemv_weight(torch.float16))


def test_empty_tensors():
    empty = torch.empty(0, dtype=torch.bfloat16, device=CUDA)
    assert quantize(empty, "nf4", 64)[0].numel() == 0
    nothing = torch.empty(0, dtype=torch.uint8, device=CUDA)
    assert dequantize(nothing, scales(0, False, CUDA), "nf4", 64, 0, torch.float32).numel() == 0
    assert Linear(8, 64)(torch.empty(0, 64, device=CUDA)).shape == (0, 8)
    assert quantize_blockwise(empty, True, 256)[0].numel() == 0


def test_tensors_of_two_devices_are_refused():
    x = torch.ones(64, device=CUDA)
    with pytest.raises(ValueError, match="cuda:0"):
        _core.quantize_4bit(x, torch.empty(32, dtype=torch.uint8), torch.empty(1), "nf4", 64)


def test_work_is_queued_on_the_current_stream():
    x, side = torch.zeros(1 << 20, device=CUDA), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.copy_(torch.linspace(-1, 1, 1 << 20, device=CUDA))
        packed, absmax = quantize(x, "nf4", 64)
    side.synchronize()
    expected = quantize(torch.linspace(-1, 1, 1 << 20, device=CUDA), "nf4", 64)
    same(packed, expected[0])
    same(absmax, expected[1])


def test_two_streams_at_once():
    linears = [Linear(512, 4096), Linear(512, 4096, blocksize=128)]
    x = rows(4, 4096, torch.bfloat16)
    expected = [linear(x) for linear in linears]
    streams = [torch.cuda.Stream() for _ in linears]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(50):
        for linear, stream, out in zip(linears, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(torch.empty(4, 512, dtype=x.dtype, device=CUDA))
                args = (linear.packed, *linear.scale, "nf4", linear.blocksize, out[-1])
                _core.gemv_4bit(x, *args)
    torch.cuda.synchronize()
    for out, want in zip(outs, expected, strict=True):
        assert all(torch.equal(got, want) for got in out)


def test_a_hundred_runs_are_equal():
    linear, x = Linear(4096, 4096), rows(3, 4096, torch.bfloat16)
    weight = weights(1 << 22, torch.bfloat16, 64).to(CUDA)
    absmax = torch.rand(300_000, device=CUDA)
    many = [rows(M, 4096, torch.bfloat16) for M in (33, 128, 300)]

    def run() -> list[Tensor]:
        products = [linear(x), *(gemm(linear, x) for x in many)]
        return [*products, *quantize(weight, "nf4", 64), *double_quantize(absmax)]

    first = run()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("M", [33, 128, 300])
def test_gemm_4bit_gives_equal_bits_beside_other_work(M):
    linear, x = Linear(4096, 4096), rows(M, 4096, torch.bfloat16)
    first = gemm(linear, x)
    other, side = torch.randn(2048, 2048, device=CUDA), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(side):
            other = (other @ other).clamp(-1, 1)
        assert torch.equal(gemm(linear, x), first)


def test_graph_capture():
    linear, x = Linear(512, 4096), rows(2, 4096, torch.bfloat16)
    scale, n = linear.scale, 512 * 4096
    out = torch.empty(2, 512, dtype=torch.bfloat16, device=CUDA)
    weight = torch.empty(n, dtype=torch.bfloat16, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _core.dequantize_4bit(linear.packed, *scale, "nf4", 64, weight)
        _core.gemv_4bit(x, linear.packed, *scale, "nf4", 64, out)
    for seed in range(3):
        fresh = torch.randint(0, 256, (n // 2,), generator=generator(seed), dtype=torch.uint8)
        linear.packed.copy_(fresh)
        x.normal_()
        graph.replay()
        same(weight, dequantize(linear.packed, scale, "nf4", 64, n, torch.bfloat16))
        same(out, linear(x))


FIRST_CALL_IN_CAPTURE = """
import torch
from halfbyte import _core
x = torch.randn(4096, device="cuda")
packed = torch.empty(2048, dtype=torch.uint8, device="cuda")
absmax = torch.empty(64, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    _core.quantize_4bit(x, packed, absmax, "nf4", 64)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(absmax, x.view(64, 64).abs().amax(1))
"""


def test_the_first_call_may_be_captured():
    run = subprocess.run(
        [sys.executable, "-c", FIRST_CALL_IN_CAPTURE], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_current_device_stays():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda:1")
    same(quantize(at(torch.ones(64), other), "nf4", 64)[0], quantize(torch.ones(64), "nf4", 64)[0])
    assert torch.cuda.current_device() == 0 and torch.empty(1, device="cuda").get_device() == 0


@pytest.mark.parametrize("index", [0, 1])
def test_a_new_thread_is_left_on_device_0(index):
    """torch's products warn where a thread has no context, and take device 0 for its device."""
    if torch.cuda.device_count() <= index:
        pytest.skip("needs two GPUs")
    x = at(torch.randn(4096), torch.device("cuda", index))
    packed = torch.empty(2048, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(64, device=x.device)

    def work() -> tuple[int | None, int]:
        _core.quantize_4bit(x, packed, absmax, "nf4", 64)
        context = ctypes.c_void_p()
        assert ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) == 0
        return context.value, torch.cuda.current_device()

    with ThreadPoolExecutor(1) as thread:
        context, device = thread.submit(work).result()
    assert (context is None) == (index == 1) and device == 0
    same(absmax, x.view(64, 64).abs().amax(1))


def test_more_than_two_to_the_31_elements():
    period, repeats = 1 << 20, 2049
    n = period * repeats + 3
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = weights(period, torch.bfloat16, 64)
    many = torch.cat([x.to(CUDA).repeat(repeats), x[:3].to(CUDA)])
    packed, absmax = quantize(many, "nf4", 64)
    expected = quantize(x, "nf4", 64)
    for ours, want in zip((packed, absmax), expected, strict=True):
        body = ours[: want.numel() * repeats].view(repeats, -1)
        assert bool((body == want.to(CUDA)).all())
    tail = quantize(x[:3], "nf4", 64)
    same(packed[-2:], tail[0])
    same(absmax[-1:], tail[1])

    out = dequantize(packed, (absmax, None, None, 0.0), "nf4", 64, n, torch.bfloat16)
    want = dequantize(
        expected[0], (expected[1], None, None, 0.0), "nf4", 64, period, torch.bfloat16
    )
    assert bool((out[:-3].view(repeats, period) == want.to(CUDA)).all())
    del many, out

    K = 4096
    v = rows(1, K, torch.bfloat16)
    y = torch.empty(1, period * repeats // K, dtype=torch.bfloat16, device=CUDA)
    whole = (packed[:-2], absmax[:-1], None, None, 0.0, "nf4", 64)
    _core.gemv_4bit(v, *whole, y)
    small = torch.empty(1, period // K, dtype=torch.bfloat16, device=CUDA)
    first = (packed[: period // 2], absmax[: period // 64], None, None, 0.0, "nf4", 64)
    _core.gemv_4bit(v, *first, small)
    assert bool((y.view(repeats, -1) == small).all())


def test_more_than_two_to_the_31_weights_with_nested_scales():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    part, times = Linear(1024, 4096), 513
    whole, dtype = part.repeated(1024 * times), torch.bfloat16
    for M in (1, 9):
        x = rows(M, 4096, dtype)
        same(whole(x), part(x).repeat(1, times))
    for M in (17, 128):
        x = rows(M, 4096, dtype)
        close(gemm(whole, x), x, *part.seen(x))
    x, a, b = (
        torch.randn(n, k, device=CUDA).to(dtype) for n, k in [(3, 4096), (8, 4096), (1024, 8)]
    )
    adapters = [LowRank(a, b, None, 0.5), LowRank(a, b.repeat(times, 1), None, 0.5)]
    linears = zip((part, whole), adapters, strict=True)
    products = [Product(w.packed, w.state(dtype), None, adapter) for w, adapter in linears]
    if fuses(x, products):
        ours, large = (gemv_4bit_fused(x, [product])[0] for product in products)
        same(large, ours.repeat(1, times))


def test_more_than_two_to_the_31_results():
    M, N = 65_600, 32_768
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    linear, x = Linear(N, 256), rows(M, 256, torch.bfloat16)
    y = linear(x)
    same(y[-100:], linear(x[-100:]))
    del y
    y = gemm(linear, x)
    for part in (slice(0, 100), slice(M - 100, M)):
        close(y[part], x[part], *linear.seen(x))
