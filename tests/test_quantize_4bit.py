"""quantize_4bit and dequantize_4bit: golden bytes, edges, bad input, on every device."""

from __future__ import annotations

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

import halfbyte
from halfbyte import _core
from halfbyte.ops import Nested, QuantState, dynamic_map

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def golden_input(dtype: torch.dtype) -> torch.Tensor:
    """All in fp32: i * 7919 passes 2^24 and rounds, which integer arithmetic would not."""
    i = np.arange(3300, dtype=np.float32)
    x = (np.fmod(i * np.float32(7919), np.float32(1009)) - np.float32(504)) / np.float32(300)
    return torch.from_numpy(x).reshape(33, 100).to(dtype)


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "golden/quant4_golden.json").read_text())


CASES = list(itertools.product(DTYPES, ("nf4", "fp4"), (False, True)))


@pytest.mark.parametrize("dtype, quant_type, double_quant", CASES)
def test_golden_bytes(golden, device, dtype, quant_type, double_quant):
    expected = golden["cases"][f"{dtype}/{quant_type}/dq={double_quant}"]
    x = golden_input(DTYPES[dtype]).to(device)
    packed, state = halfbyte.quantize_4bit(x, quant_type, 64, double_quant)
    assert packed.flatten()[:16].tolist() == expected["q_first16"]
    assert sha256(packed) == expected["sha_q"]
    assert sha256(state.absmax) == expected["sha_absmax"]
    blob = json.loads(expected["blob"])
    if double_quant:
        # bitsandbytes' mean depends on a summation order: one ulp apart in the fp32 case, which
        # moves the nested absmax by as much and no code.
        offset, ulp = (
            np.float32(blob["nested_offset"]),
            np.spacing(np.float32(blob["nested_offset"])),
        )
        assert abs(np.float32(state.offset) - offset) <= (ulp if dtype == "float32" else 0)
        nested = torch.tensor(expected["nested_absmax"], device=device)
        assert (state.nested.absmax - nested).abs().max() <= (ulp if dtype == "float32" else 0)
        state = QuantState(
            state.absmax, Nested(nested, state.nested.map), float(offset), 64, quant_type,
            state.shape, state.dtype,
        )  # fmt: skip
    assert sha256(halfbyte.dequantize_4bit(packed, state)) == expected["sha_deq"]
    written = state.as_tensors("w")[f"w.quant_state.bitsandbytes__{quant_type}"]
    assert bytes(written.tolist()).decode() == expected["blob"]


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_the_golden_ones(shared, signed):
    name = "dynmap_signed.f32" if signed else "dynmap_unsigned.f32"
    expected = np.fromfile(shared / "golden" / name, dtype="<f4")
    assert dynamic_map(signed).numpy().tobytes() == expected.tobytes()


# Levels and packing written from the published tables, not taken from the package.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
LEVELS = {
    "nf4": NF4,
    "fp4": [*FP4, 0.0, *(-v for v in FP4[1:])],
    "int4": [(code - 7) / 7 for code in range(15)],
}


def reference(x: torch.Tensor, quant_type: str, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """(values of the nearest level in fp64, absmax), by brute force over every level."""
    flat = x.float().cpu().numpy().ravel()
    levels = np.float32(LEVELS[quant_type]).astype(np.float64)
    values = np.empty(flat.size)
    absmax = []
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        scale = max(np.abs(block).max(), np.float32(1e-38))
        absmax.append(np.abs(block).max())
        scaled = (block / scale).astype(np.float64)
        nearest = np.abs(scaled[:, None] - levels[None]).argmin(axis=1)
        values[start : start + blocksize] = levels[nearest] * np.float64(scale)
    return values, np.float32(absmax)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("shape", [(1,), (63,), (65,), (5, 13), (37, 129), (3, 4097)])
def test_every_block_size_and_odd_shape(device, quant_type, blocksize, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(blocksize)).to(device)
    packed, state = halfbyte.quantize_4bit(x, quant_type, blocksize)
    assert packed.shape == ((x.numel() + 1) // 2, 1) and packed.dtype == torch.uint8
    values, absmax = reference(x, quant_type, blocksize)
    assert np.array_equal(state.absmax.cpu().numpy(), absmax)
    back = halfbyte.dequantize_4bit(packed, state).cpu().numpy().ravel()
    # A value within rounding of a threshold may take either neighbour.
    close = np.isclose(back, values, rtol=1e-6, atol=1e-7)
    tie = np.abs(np.abs(back - x.cpu().numpy().ravel()) - np.abs(values - x.cpu().numpy().ravel()))
    assert np.all(close | (tie < 1e-5))
    assert close.mean() > 0.99


def nf4_codes(scaled: np.ndarray) -> np.ndarray:
    """By the fp32 midpoints of the levels; what lies on one takes the lower code."""
    levels = np.float32(NF4)
    return np.searchsorted((levels[1:] + levels[:-1]) * np.float32(0.5), scaled, side="left")


def at_thresholds() -> tuple[np.float32, np.ndarray]:
    """(absmax, values) whose codes differ between x / absmax and x * (1 / absmax), in fp32."""
    levels = np.float32(NF4)
    for absmax in np.random.default_rng(0).uniform(0.5, 2, 1000).astype(np.float32):
        near = (levels[1:] + levels[:-1]) * np.float32(0.5) * absmax
        x = np.concatenate([near, np.nextafter(near, 9, dtype=np.float32)])
        differ = nf4_codes(x / absmax) != nf4_codes(x * (np.float32(1) / absmax))
        if differ.sum() >= 3:
            return absmax, x[differ]
    raise AssertionError("no such values")


def unpacked(packed: torch.Tensor) -> np.ndarray:
    flat = packed.cpu().flatten().numpy()
    return np.stack([flat >> 4, flat & 15], 1).ravel()


def test_whole_blocks_multiply_and_the_short_last_one_divides(device):
    absmax, values = at_thresholds()
    block = np.zeros(64, np.float32)
    block[0], block[1 : 1 + len(values)] = absmax, values
    short = block[:-1]
    packed, _ = halfbyte.quantize_4bit(torch.from_numpy(np.concatenate([block, short])).to(device))
    codes = unpacked(packed)
    assert np.array_equal(codes[:64], nf4_codes(block * (np.float32(1) / absmax)))
    assert np.array_equal(codes[64:127], nf4_codes(short / absmax))
    assert not np.array_equal(codes[:63], codes[64:127])


@pytest.mark.parametrize("double_quant", [False, True])
def test_empty(device, double_quant):
    packed, state = halfbyte.quantize_4bit(
        torch.empty(0, 7, device=device), double_quant=double_quant
    )
    assert packed.numel() == 0 and state.absmax.numel() == 0
    assert halfbyte.dequantize_4bit(packed, state).shape == (0, 7)


def test_zero_blocks_odd_tail_and_ties(device):
    packed, state = halfbyte.quantize_4bit(torch.zeros(128, device=device))
    assert set(packed.flatten().tolist()) == {0x77}
    assert halfbyte.dequantize_4bit(packed, state).abs().max() == 0
    packed, _ = halfbyte.quantize_4bit(torch.ones(5, 13, device=device))
    assert packed[-1].item() == 0xF7
    packed, _ = halfbyte.quantize_4bit(torch.zeros(64, device=device), "fp4")
    assert set(packed.flatten().tolist()) == {0}
    ramp = torch.arange(64, dtype=torch.float32, device=device) / 63
    packed, _ = halfbyte.quantize_4bit(ramp)
    assert packed.flatten()[:5].tolist() == [119, 120, 136, 136, packed[4].item()]
    assert packed[-1].item() == 255
    # Exactly between codes 7 (0.0) and 8: ties go down.
    tie = torch.zeros(64, device=device)
    tie[0], tie[1] = 1.0, NF4[8] / 2
    packed, _ = halfbyte.quantize_4bit(tie)
    assert packed[0].item() == 0xF7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 31, 64, 129, 199])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_non_finite_weight_is_refused_by_name(device, value, index, dtype):
    x = torch.ones(200, device=device, dtype=dtype)
    x[index] = value
    with pytest.raises(ValueError, match=r"layers\.3\.weight.*NaN or Inf"):
        halfbyte.quantize_4bit(x, name="layers.3.weight")


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"quant_type": "nf3"}, "quant_type: expected .*got 'nf3'"),
        ({"blocksize": 48}, "blocksize: expected .*got 48"),
        ({"blocksize": 8192}, "blocksize"),
        ({"blocksize": 64.0}, "blocksize: expected .*got 64.0"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        halfbyte.quantize_4bit(torch.ones(64), **kwargs)


@pytest.mark.parametrize("x", [[1.0, 2.0], np.ones(64, np.float32), None])
def test_what_is_no_tensor_is_a_type_error(x):
    with pytest.raises(TypeError, match=f"w: expected a torch.Tensor, got {type(x).__name__}"):
        halfbyte.quantize_4bit(x, name="w")


def test_meta_tensors_have_nothing_to_quantize():
    with pytest.raises(ValueError, match="w: expected values on cpu or cuda, got a meta tensor"):
        halfbyte.quantize_4bit(torch.ones(64, device="meta"), name="w")


def test_bad_dtypes_and_short_buffers():
    with pytest.raises(ValueError, match="expected fp32, fp16 or bf16, got torch.int64"):
        halfbyte.quantize_4bit(torch.arange(64))
    packed, state = halfbyte.quantize_4bit(torch.randn(64, 64))
    with pytest.raises(ValueError, match="packed"):
        halfbyte.dequantize_4bit(packed[:-1], state)
    with pytest.raises(ValueError, match="absmax"):
        _core.dequantize_4bit(
            packed, state.absmax[:-1], None, None, 0.0, "nf4", 64, torch.empty(64, 64)
        )
    with pytest.raises(ValueError):
        halfbyte.dequantize_4bit(packed, state, torch.float64)


def test_non_contiguous_input_equals_its_copy(device):
    x = torch.randn(96, 80, device=device).t()
    packed, state = halfbyte.quantize_4bit(x)
    packed_copy, state_copy = halfbyte.quantize_4bit(x.contiguous())
    assert torch.equal(packed, packed_copy) and torch.equal(state.absmax, state_copy.absmax)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_gpu_bytes_equal_cpu_bytes(dtype, quant_type):
    x = (torch.randn(1021, 773) * torch.logspace(-6, 3, 773)).to(dtype)
    for blocksize in (32, 64, 4096):
        packed, state = halfbyte.quantize_4bit(x, quant_type, blocksize, True)
        packed_gpu, state_gpu = halfbyte.quantize_4bit(x.cuda(), quant_type, blocksize, True)
        assert torch.equal(packed, packed_gpu.cpu())
        assert torch.equal(state.absmax, state_gpu.absmax.cpu())
        assert torch.equal(state.nested.absmax, state_gpu.nested.absmax.cpu())
        assert state.offset == state_gpu.offset
        back = halfbyte.dequantize_4bit(packed, state)
        assert sha256(back) == sha256(halfbyte.dequantize_4bit(packed_gpu, state_gpu))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    n = 2**31 + 4096 + 5
    x = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    packed, state = halfbyte.quantize_4bit(x)
    tail = slice(2**31 - 64, n)
    expected, _ = halfbyte.quantize_4bit(x[tail])
    assert torch.equal(packed[(2**31 - 64) // 2 :], expected)
    back = halfbyte.dequantize_4bit(packed, state)
    assert (back[tail] - x[tail]).abs().max() < 0.2 * x[tail].abs().max()


def test_double_quantization_follows_its_formula(device):
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0)).to(device) + 0.5
    codes, nested, offset = torch.ops.halfbyte.double_quantize(absmax)
    mean = np.float32(absmax.double().mean().item())
    assert abs(offset.item() - mean) <= np.spacing(mean)
    centred = absmax - offset
    assert torch.equal(nested, torch.stack([b.abs().max() for b in centred.split(256)]))
    scale = nested.repeat_interleave(256)[:1000]
    error = (dynamic_map(True, device)[codes.long()] * scale - centred).abs() / scale
    assert error.max() < 0.0125  # half the widest gap of the dynamic map


def test_state_round_trip_and_damage():
    from halfbyte.errors import CheckpointError

    packed, state = halfbyte.quantize_4bit(torch.randn(20, 96).bfloat16(), double_quant=True)
    tensors = state.as_tensors("w")
    again = QuantState.from_tensors("w", tensors)
    assert isinstance(again.nested, Nested)
    assert torch.equal(
        halfbyte.dequantize_4bit(packed, again), halfbyte.dequantize_4bit(packed, state)
    )
    for key in tensors:
        if key.endswith("nested_absmax"):
            continue
        damaged = {k: v for k, v in tensors.items() if k != key}
        with pytest.raises(CheckpointError, match="w"):
            QuantState.from_tensors("w", damaged)
    _, int4 = halfbyte.quantize_4bit(torch.randn(64), "int4")
    with pytest.raises(CheckpointError, match="int4"):
        int4.as_tensors("w")


def test_codes_that_cannot_be_dequantized_are_named():
    packed, state = halfbyte.quantize_4bit(torch.randn(64))
    with pytest.raises(TypeError, match="packed: expected a torch.Tensor, got list"):
        halfbyte.dequantize_4bit([1, 2], state)
    with pytest.raises(ValueError, match="expected both on one cpu or cuda device, got meta"):
        halfbyte.dequantize_4bit(packed.to("meta"), state)
    with pytest.raises(ValueError, match="got cpu and meta"):
        halfbyte.dequantize_4bit(packed, state.to("meta"))
