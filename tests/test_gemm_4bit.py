"""gemm_4bit and Linear4bit: values against fp64, gradients, shapes, dtypes, compile, autocast."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import halfbyte
from halfbyte.linear import Linear4bit
from halfbyte.ops import QuantState, gemm_4bit, gemm_4bit_group, quantize_4bit
from halfbyte.ops.gemm_4bit import is_dequantized

# Relative Frobenius error against fp64: one rounding of the inputs' products and of the output.
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(BOUND)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def case(m, n, k, dtype, device, **quant):
    generator = torch.Generator().manual_seed(m * 31 + n * 7 + k)
    weight = torch.randn(n, k, generator=generator).to(device)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    packed, state = halfbyte.quantize_4bit(weight, **quant)
    exact = halfbyte.dequantize_4bit(packed, state, torch.float32).double()
    return x, packed, state, exact


SHAPES = [(1, 64, 64), (1, 576, 1536), (3, 40, 80), (8, 1000, 192), (9, 33, 100), (17, 1, 65),
          (2, 5, 13), (33, 128, 256), (1, 8, 2880), (129, 96, 64),
          (40, 2801, 768), (40, 21001, 101)]  # fmt: skip


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_forward_against_fp64(device, m, n, k, dtype, double_quant):
    x, packed, state, exact = case(m, n, k, dtype, device, double_quant=double_quant)
    y = gemm_4bit(x, packed, state)
    assert y.dtype == dtype and y.shape == (m, n)
    assert relative_error(y, x.double() @ exact.t()) < BOUND[dtype]


@pytest.mark.parametrize("quant", [{"quant_type": "fp4"}, {"quant_type": "int4"}, {"blocksize": 32},
                                   {"blocksize": 128}, {"blocksize": 4096}])  # fmt: skip
@pytest.mark.parametrize("m", [1, 16])
def test_other_formats(device, quant, m):
    x, packed, state, exact = case(m, 48, 320, torch.float32, device, **quant)
    assert relative_error(gemm_4bit(x, packed, state), x.double() @ exact.t()) < 1e-6


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_against_fp64(device, m, n, k, dtype):
    x, packed, state, exact = case(m, n, k, dtype, device, double_quant=True)
    x.requires_grad_()
    grad = torch.randn(m, n, device=device).to(dtype)
    gemm_4bit(x, packed, state).backward(grad)
    assert relative_error(x.grad, grad.double() @ exact) < BOUND[dtype]


@pytest.mark.parametrize(
    "rows, n, fills",
    [
        (512, 4096, True),  # 1.21 times the product in bf16, by a dequantized W 1.51
        (512, 8192, True),  # 1.12 and 1.47
        (1024, 8192, True),  # 1.14 and 1.23
        (1024, 14336, False),  # 1.44 and 1.24: the last wave of tiles is a third full
        (2048, 8192, False),  # 1.15 and 1.12
        (300, 4096, False),
    ],
)
def test_tiles_are_taken_where_they_were_faster_on_an_h200(monkeypatch, rows, n, fills):
    module = sys.modules["halfbyte.ops.gemm_4bit"]
    monkeypatch.setattr(module, "multiprocessors", lambda index: 132)
    x = torch.empty(rows, 64, dtype=torch.bfloat16)
    assert module._fills_tiles(x, n) == fills
    assert not module._fills_tiles(x.half(), n)


@pytest.mark.parametrize(
    "found, rows, few, many",
    [
        ((7, 5), 100, 8, 0),
        ((8, 0), 100, 32, 0),
        ((8, 6), 100, 32, 0),
        ((9, 0), 100, 16, 256),
        ((9, 0), 512, 16, 512),
        ((9, 0), 4096, 16, 256),
        ((10, 0), 100, 32, 0),
        ((12, 0), 100, 32, 0),
    ],
)
def test_rows_of_kernels_follow_the_capability(monkeypatch, found, rows, few, many):
    module = sys.modules["halfbyte.ops.gemm_4bit"]
    monkeypatch.setattr(module, "capability", lambda index: found)
    monkeypatch.setattr(module, "multiprocessors", lambda index: 132)

    def taken(k=512, dtype=torch.bfloat16, nested=True, blocksize=64):
        x = torch.empty(rows, k, dtype=dtype, device="cuda")
        return module._code_rows(x, 4096, nested, blocksize)

    with FakeTensorMode():
        assert taken() == (few, many)
        # Of fp16 no tile is worth its time beyond that.
        assert taken(dtype=torch.float16) == (few, min(many, 256))
        for other in [{"dtype": torch.float32}, {"blocksize": 32}]:
            assert taken(**other) == (8, 0)
        passes = 16 if found >= (8, 0) else 8
        for other in [{"k": 96}, {"k": 500}, {"blocksize": 128}]:
            assert taken(**other) == (passes, 0)
        for other in [{"k": 320}, {"nested": False}]:
            assert taken(**other) == ((few if found >= (9, 0) else passes), 0)


@pytest.mark.gpu
def test_hundreds_of_rows_are_multiplied_from_codes_where_tiles_are_full():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("kernels for hundreds of rows exist for compute capability 9.0 alone")
    n = 128 * (torch.cuda.get_device_properties(0).multi_processor_count // 2)
    device = torch.device("cuda")
    for rows, dtype, dequantized in [
        (512, torch.bfloat16, False),
        (300, torch.bfloat16, True),
        (512, torch.float16, True),
        (4096, torch.bfloat16, True),
    ]:
        x, packed, state, exact = case(rows, n, 512, dtype, device, double_quant=True)
        assert is_dequantized(x, state) == dequantized
        y = gemm_4bit(x, packed, state)
        assert relative_error(y, x.double() @ exact.t()) < BOUND[dtype]
        assert torch.equal(y, gemm_4bit(x, packed, state))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 4), (0,), (2, 0)])
def test_leading_shapes_and_empty(device, lead):
    _, packed, state, exact = case(1, 24, 64, torch.float32, device)
    x = torch.randn(*lead, 64, device=device, requires_grad=True)
    y = gemm_4bit(x, packed, state)
    assert y.shape == (*lead, 24)
    torch.testing.assert_close(y, (x.double() @ exact.t()).float(), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, k", [(6, 64), (6, 256), (40, 256)])
def test_non_contiguous_input(device, dtype, rows, k):
    _, packed, state, _ = case(1, 24, k, dtype, device, double_quant=k == 256)
    wide = torch.randn(rows, 2 * k, device=device, dtype=dtype)
    for x in (wide[:, ::2], wide[:, k:], wide[:, :k], wide[:1, :k].expand(rows, k),
              torch.randn(k, rows, device=device, dtype=dtype).t()):  # fmt: skip
        # Another stride may take another library kernel, so equal to rounding, not to the bit.
        torch.testing.assert_close(
            gemm_4bit(x, packed, state), gemm_4bit(x.contiguous(), packed, state)
        )


def test_nan_stays_in_its_row(device):
    for m in (4, 16):
        x, packed, state, _ = case(m, 40, 128, torch.float32, device)
        x[1, 3], x[2, 5] = float("nan"), float("inf")
        y = gemm_4bit(x, packed, state)
        assert torch.isnan(y[1]).all() and not torch.isfinite(y[2]).any()
        assert torch.isfinite(y[[0, 3]]).all()


def test_a_row_does_not_depend_on_its_batch(device):
    x, packed, state, _ = case(8, 72, 256, torch.float32, device)
    together = gemm_4bit(x, packed, state)
    for row in range(8):
        assert torch.equal(gemm_4bit(x[row : row + 1], packed, state)[0], together[row])
    assert torch.equal(together, gemm_4bit(x, packed, state))


def test_bad_shapes_and_dtypes():
    x, packed, state, _ = case(2, 24, 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"x: expected \[..., 64\].*got \[2, 63\]"):
        gemm_4bit(x[:, 1:], packed, state)
    with pytest.raises(ValueError, match="got torch.float64"):
        gemm_4bit(x.double(), packed, state)


def test_what_is_no_tensor_is_a_type_error():
    x, packed, state, _ = case(2, 24, 64, torch.float32, "cpu")
    for wrong in (x.tolist(), x.numpy(), None):
        with pytest.raises(
            TypeError, match=f"x: expected a torch.Tensor, got {type(wrong).__name__}"
        ):
            gemm_4bit(wrong, packed, state)
    with pytest.raises(TypeError, match="packed: expected a torch.Tensor, got ndarray"):
        gemm_4bit(x, packed.numpy(), state)


def test_shapes_that_are_no_product_are_named():
    x, packed, state, _ = case(2, 24, 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"x: expected \[..., 64\] for W \[24, 64\], got \[\]"):
        gemm_4bit(torch.tensor(1.0), packed, state)
    with pytest.raises(ValueError, match=r"W: expected \[N, K\] with K >= 1, got \[64\]"):
        gemm_4bit(x, *halfbyte.quantize_4bit(torch.ones(64)))
    with pytest.raises(ValueError, match=r"W: expected \[N, K\] with K >= 1, got \[5, 0\]"):
        gemm_4bit(torch.empty(2, 0), *halfbyte.quantize_4bit(torch.empty(5, 0)))


def test_meta_tensors_are_refused():
    x, packed, state, _ = case(2, 24, 64, torch.float32, "cpu")
    for pair in ((x.to("meta"), packed), (x, packed.to("meta")), (x.to("meta"), packed.to("meta"))):
        with pytest.raises(ValueError, match="x and packed: expected both on one cpu or cuda dev"):
            gemm_4bit(*pair, state)


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("extra", [-1, 1])
def test_weights_of_another_size_are_named(m, extra):
    x, packed, state, _ = case(m, 24, 64, torch.float32, "cpu", double_quant=True)

    def resized(tensor):
        return torch.cat([tensor, tensor])[: len(tensor) + extra]

    nested = dataclasses.replace(state.nested, absmax=resized(state.nested.absmax))
    with pytest.raises(ValueError, match="packed"):
        gemm_4bit(x, resized(packed), state)
    for change in ({"absmax": resized(state.absmax)}, {"nested": nested}):
        with pytest.raises(ValueError, match="absmax"):
            gemm_4bit(x, packed, dataclasses.replace(state, **change))


def test_operators_are_well_formed(device):
    x, packed, state, _ = case(4, 24, 64, torch.float32, device, double_quant=True)
    arguments = (packed, *state.scale_args(), "nf4", 64)
    torch.library.opcheck(torch.ops.halfbyte.gemm_4bit, (x, *arguments, 24))
    grad = torch.randn(4, 24, device=device)
    torch.library.opcheck(torch.ops.halfbyte.gemm_4bit_grad_x, (grad, *arguments, 64))
    torch.library.opcheck(
        torch.ops.halfbyte.dequantize_4bit, (*arguments, [24, 64], torch.bfloat16)
    )
    torch.library.opcheck(torch.ops.halfbyte.quantize_4bit, (torch.randn(10, 7), "nf4", 64))


def layer(device="cpu", bias=True, n=24, k=64) -> Linear4bit:
    result = Linear4bit(k, n, bias=bias, device=device)
    return result.quantize_(torch.randn(n, k, device=device))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_its_dequantized_twin(device, bias):
    linear = layer(device, bias)
    if bias:
        torch.nn.init.normal_(linear.bias)
    x = torch.randn(3, 5, 64, device=device)
    expected = F.linear(x, linear.dequantize(torch.float32), linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-5)
    assert not linear.weight.requires_grad and isinstance(linear, torch.nn.Linear)


def test_linear_keeps_nothing_wide_between_forward_and_backward():
    linear, saved = layer(bias=False), []
    x = torch.randn(16, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x)
    assert sum(t.numel() * t.element_size() for t in saved) <= linear.weight.numel()


def test_linear_moves_and_casts_without_touching_its_scales():
    linear = layer()
    before = linear.dequantize(torch.float32)
    linear.to(torch.bfloat16)
    assert linear.quant_state.nested.absmax.dtype == torch.float32
    assert torch.equal(linear.dequantize(torch.float32), before)
    assert linear.bias.dtype == torch.bfloat16


def test_linear_state_dict_round_trip():
    source, target = layer(), Linear4bit(64, 24)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.dequantize(), target.dequantize())
    assert set(source.state_dict()) == {
        "weight", "bias", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
        "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    }  # fmt: skip
    broken = dict(source.state_dict())
    del broken["weight.absmax"]
    with pytest.raises(RuntimeError, match="weight.absmax"):
        Linear4bit(64, 24).load_state_dict(broken)


def test_a_layer_on_meta_is_filled_whole():
    source, target = layer(), Linear4bit(64, 24, device="meta", dtype=torch.bfloat16)
    torch.nn.init.normal_(source.bias)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.bias, source.bias.bfloat16())
    assert target.bias.data_ptr() != source.bias.data_ptr() and target.bias.requires_grad
    target(torch.ones(1, 64))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(1,), (25,), (1, 24), ()])
def test_a_bias_of_another_shape_is_named(device, shape):
    state = layer().state_dict() | {"bias": torch.ones(shape)}
    target = torch.nn.Sequential(Linear4bit(64, 24, device=device))
    with pytest.raises(
        RuntimeError, match=rf"0.bias: expected \[24\], got \[{str(list(shape))[1:-1]}"
    ):
        target.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})


def test_a_weight_of_another_shape_is_named():
    with pytest.raises(RuntimeError, match=r"weight: .*shape: expected \[24, 32\], got \[24, 64\]"):
        Linear4bit(32, 24).load_state_dict(layer().state_dict())
    broken = layer().state_dict()
    broken["weight"] = broken["weight"][:-1]
    with pytest.raises(
        RuntimeError, match=r"weight: .*packed: expected uint8 \[768, 1\], got .*767"
    ):
        Linear4bit(64, 24).load_state_dict(broken)


def test_linear_without_weight_and_with_the_wrong_one():
    with pytest.raises(RuntimeError, match="holds no weight"):
        Linear4bit(64, 24)(torch.ones(1, 64))
    with pytest.raises(ValueError, match=r"q_proj: expected \[24, 64\], got \[64, 24\]"):
        Linear4bit(64, 24).quantize_(torch.ones(64, 24), "q_proj")


# torch's tracer makes an instance of every autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("rows", [1, 32])
def test_compile_has_no_graph_break(device, rows):
    linear = layer(device)
    x = torch.randn(rows, 64, device=device, requires_grad=True)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, linear(x))
    y.sum().backward()
    assert x.grad is not None


def test_autocast_computes_in_its_dtype(device):
    linear = layer(device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_capture_in_a_cuda_graph_and_a_side_stream(rows):
    x, packed, state, _ = case(rows, 512, 1024, torch.bfloat16, "cuda", double_quant=True)
    expected = gemm_4bit(x, packed, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gemm_4bit(x, packed, state)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        again = gemm_4bit(x, packed, state)
    stream.synchronize()
    assert torch.equal(again, expected)


@pytest.mark.parametrize("nested", [True, False])
def test_group_is_its_parts(device, nested):
    """Also where they cannot go together: unlike blocks, a gradient, no double quantization."""
    K = 512
    weights = [
        quantize_4bit(torch.randn(n, K).to(device), "nf4", blocksize, nested)
        for n, blocksize in ((40, 64), (7, 64), (130, 64), (16, 128))
    ]
    for rows in (0, 1, 8, 9, 40):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(2, rows, K).to(device, dtype)
            for chosen in (weights[:3], weights, weights[2:3]):
                for tracked in (False, True):
                    x.requires_grad_(tracked)
                    outs = gemm_4bit_group(x, chosen)
                    for y, (packed, state) in zip(outs, chosen, strict=True):
                        assert y.requires_grad == tracked
                        expected = gemm_4bit(x, packed, state)
                        if device.type == "cuda" and len(x) * rows > 8:
                            # The order of a sum may follow from all that go together.
                            step = torch.finfo(dtype).eps
                            torch.testing.assert_close(y, expected, rtol=step, atol=16 * step)
                        else:
                            assert torch.equal(y, expected)


def test_maps_are_shared_but_saved_apart(device):
    weights = [quantize_4bit(torch.randn(64, 64).to(device), double_quant=True) for _ in "ab"]
    (_, a), (_, b) = weights
    assert a.nested.map.data_ptr() == b.nested.map.data_ptr()
    saved = [state.as_tensors("w")["w.nested_quant_map"] for state in (a, b)]
    assert saved[0].data_ptr() != saved[1].data_ptr()
    read = [QuantState.from_tensors("w", state.as_tensors("w")) for state in (a, b)]
    assert read[0].nested.map.data_ptr() == a.nested.map.data_ptr()


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_of_a_model_shares_its_map_among_its_layers(device, duplicate):
    layers = [Linear4bit(64, 64).quantize_(torch.randn(64, 64, device=device)) for _ in range(3)]
    copied = duplicate(torch.nn.Sequential(*layers))
    maps = [layer.quant_state.nested.map for layer in copied]
    assert len({map.data_ptr() for map in maps}) == 1
    assert torch.equal(maps[0], layers[0].quant_state.nested.map)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("k", [576, 768])
def test_weights_are_moved_ahead_where_the_kernel_takes_them(k, double_quant):
    module = sys.modules["halfbyte.ops.gemv_4bit_fused"]
    weights = [quantize_4bit(torch.randn(n, k), double_quant=double_quant) for n in (64, 128)]
    norm = torch.ones(k, dtype=torch.bfloat16)
    after = module._next(module.Following(weights, norm=norm), weights[0][1])
    taken = double_quant and k % 256 == 0
    assert [weight.n for weight in after.weights] == ([64, 128] if taken else [])
    assert after.norm is (norm if taken else None)
