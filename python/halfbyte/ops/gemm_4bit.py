"""gemm_4bit: y = x W^T and grad_x = grad_y W through frozen 4-bit weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.ops.dequantize_4bit import values
from halfbyte.ops.library import capability, define
from halfbyte.ops.quant_state import NESTED_BLOCKSIZE, Nested, QuantState
from halfbyte.ops.quantize_4bit import FLOAT_DTYPES

# Elements of W dequantized at a time on the CPU: 8 MiB in fp32 are still cached when multiplied.
PIECE = 1 << 21
# Rows of x up to which the kernel of codes beats a dequantized W, whatever N is.
MANY_ROWS = 256
# Rows of x and of W of its largest tile.
TILE = (256, 128)


def _state(absmax, nested_absmax, nested_map, offset, quant_type, blocksize, shape) -> QuantState:
    nested = None if nested_absmax is None else Nested(nested_absmax, nested_map)
    return QuantState(absmax, nested, offset, blocksize, quant_type, shape, torch.float32)


def _check_sizes(packed: Tensor, state: QuantState) -> None:
    """What is cut into pieces must fit as a whole: the kernel sees the pieces only."""
    nblocks = -(-state.numel // state.blocksize)
    sizes = {"packed": (packed, (state.numel + 1) // 2), "absmax": (state.absmax, nblocks)}
    if state.nested is not None:
        sizes["nested_absmax"] = (state.nested.absmax, -(-nblocks // NESTED_BLOCKSIZE))
    for name, (tensor, numel) in sizes.items():
        if tensor.numel() != numel or not tensor.is_contiguous():
            raise ValueError(
                f"gemm_4bit: {name}: expected {numel} contiguous elements for W "
                f"{list(state.shape)}, got {list(tensor.shape)}"
            )


def _pieces(packed: Tensor, state: QuantState) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of W at a time in fp32, each piece in the same buffer."""
    _check_sizes(packed, state)
    n, k = state.shape
    # The first element of a piece begins a block of blocks, so that all scales can be sliced.
    span = state.blocksize * NESTED_BLOCKSIZE
    step = span // math.gcd(span, k)
    rows = step * max(1, PIECE // max(1, step * k))
    buffer = torch.empty(min(rows, n), k, dtype=torch.float32, device=packed.device)
    codes = packed.view(-1)
    absmax, nested_absmax, nested_map, offset = state.scale_args()
    for first in range(0, n, rows):
        last = min(first + rows, n)
        start, stop = first * k, last * k
        blocks = slice(start // state.blocksize, -(-stop // state.blocksize))
        nested = None if nested_absmax is None else nested_absmax[start // span : -(-stop // span)]
        piece = buffer[: last - first]
        _core.dequantize_4bit(
            codes[start // 2 : (stop + 1) // 2],
            absmax[blocks],
            nested,
            nested_map,
            offset,
            state.quant_type,
            state.blocksize,
            piece,
        )
        yield slice(first, last), piece


@functools.cache
def multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _fills_tiles(x: Tensor, n: int) -> bool:
    """Whether tiles of x W^T, each on a multiprocessor, waste less time than dequantizing W takes.

    A whole wave of tiles takes 1.12 times a bf16 product of as many elements, and W, dequantized,
    230 / M times that product, as measured on an H200. The tiles that exist for fp16 take longer.
    """
    if x.dtype != torch.bfloat16:
        return False
    most = multiprocessors(x.get_device())
    tiles = -(-len(x) // TILE[0]) * -(-n // TILE[1])
    if 2 * tiles <= most:
        most /= 2  # two share a tile
    wave = -(-tiles // most) * most * TILE[0] * TILE[1]
    return 1.12 * wave < (len(x) + 230) * n


def _code_rows(x: Tensor, n: int, nested: bool, blocksize: int) -> tuple[int, int]:
    """Rows of x up to which gemv_4bit, and from there gemm_4bit, beat a dequantized W.

    Where tensor cores multiply them, eight rows cost a GPU what one does, sixteen not much more.
    Kernels for more exist for compute capability 9.0; elsewhere a further pass over the codes has
    to do.
    """
    if not x.is_cuda:
        return 32, 0
    k, found = x.shape[1], capability(x.get_device())
    if x.dtype == torch.float32 or blocksize < 64 or found < (8, 0):
        return 8, 0
    if blocksize != 64 or k % 64 or n * k % 256:
        return 16, 0
    lines = nested and k % 256 == 0
    if found == (9, 0):
        many = len(x) if len(x) > MANY_ROWS and _fills_tiles(x, n) else MANY_ROWS
        return 16, many if lines else 0
    return (32 if found >= (9, 0) or lines else 16), 0


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a dtype faster than it converts them to fp32.

    True for bf16 with instructions for its products, then in torch twice as fast as fp32's.
    """
    return dtype == torch.bfloat16 and "avx512bf16" in _core.cpu_features()


def is_dequantized(x: Tensor, state: QuantState) -> bool:
    """Whether a GPU multiplies x [M, K] by a dequantized W, not by a kernel of codes."""
    if not x.is_cuda:
        return False
    return len(x) > max(_code_rows(x, state.shape[0], state.nested is not None, state.blocksize))


def _forward(x: Tensor, packed: Tensor, *scales_and_sizes) -> Tensor:
    *scales, quant_type, blocksize, n = scales_and_sizes
    m, k = x.shape
    few, many = _code_rows(x, n, scales[1] is not None, blocksize)
    if m <= max(few, many):
        x, out = x.contiguous(), x.new_empty(m, n)
        if m <= few:
            _core.gemv_4bit(x, packed, *scales, quant_type, blocksize, out)
        else:
            products = [(packed, *scales, out)]
            _core.gemm_4bit(x, products, quant_type, blocksize)
        return out
    state = _state(*scales, quant_type, blocksize, (n, k))
    if x.is_cuda or _multiplies(x.dtype):
        return torch.mm(x, values(packed, state, x.dtype).t())
    rows = x.float()
    out = rows.new_empty(m, n)
    for part, weight in _pieces(packed, state):
        torch.mm(rows, weight.t(), out=out[:, part])
    return out.to(x.dtype)


def _forward_fake(x: Tensor, packed: Tensor, *scales_and_sizes) -> Tensor:
    return x.new_empty(x.shape[0], scales_and_sizes[-1])


def _forward_group(
    x: Tensor, packed, absmax, nested_absmax, nested_map, offset, quant_type, blocksize, n
) -> list[Tensor]:
    weights = zip(packed, absmax, nested_absmax, nested_map, offset, n, strict=True)
    few, many = _code_rows(x, 0, True, blocksize)
    if len(x) > max(few, many):
        return [_forward(x, *weight, quant_type, blocksize, rows) for *weight, rows in weights]
    outs = [x.new_empty(len(x), rows) for rows in n]
    products = list(zip(packed, absmax, nested_absmax, nested_map, offset, outs, strict=True))
    x = x.contiguous()
    if len(x) <= few:
        _core.gemv_4bit_group(x, products, quant_type, blocksize)
    else:
        _core.gemm_4bit(x, products, quant_type, blocksize)
    return outs


def _forward_group_fake(x: Tensor, *weights_and_sizes) -> list[Tensor]:
    return [x.new_empty(x.shape[0], n) for n in weights_and_sizes[-1]]


def _backward(grad_y: Tensor, packed: Tensor, *scales_and_sizes) -> Tensor:
    *scales, quant_type, blocksize, k = scales_and_sizes
    m, n = grad_y.shape
    state = _state(*scales, quant_type, blocksize, (n, k))
    if grad_y.is_cuda or _multiplies(grad_y.dtype):
        return torch.mm(grad_y, values(packed, state, grad_y.dtype))
    rows = grad_y.float()
    out = rows.new_zeros(m, k)
    for part, weight in _pieces(packed, state):
        out.addmm_(rows[:, part], weight)
    return out.to(grad_y.dtype)


_SCALES = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, float offset, "
    "str quant_type, int blocksize"
)
_multiply = define(f"gemm_4bit(Tensor x, {_SCALES}, SymInt n) -> Tensor", _forward, _forward_fake)
_multiply_group = define(
    "gemm_4bit_group(Tensor x, Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax, "
    "Tensor[] nested_map, float[] offset, str quant_type, int blocksize, SymInt[] n) -> Tensor[]",
    _forward_group,
    _forward_group_fake,
)
_multiply_back = define(
    f"gemm_4bit_grad_x(Tensor grad_y, {_SCALES}, SymInt k) -> Tensor", _backward, _forward_fake
)


def product(x: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """x W^T of accepted x [M, K], without a gradient."""
    return _multiply(
        x, packed, *state.scale_args(), state.quant_type, state.blocksize, state.shape[0]
    )


def grad_x(grad_y: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """grad_y W of grad_y [M, N], without a gradient."""
    return _multiply_back(
        grad_y, packed, *state.scale_args(), state.quant_type, state.blocksize, state.shape[1]
    )


class _Gemm4bit(torch.autograd.Function):
    """Saves nothing of x: the weight is frozen, so grad_x needs the packed bytes alone."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, state: QuantState) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return product(x, packed, state)

    @staticmethod
    def backward(ctx, grad_y: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return grad_x(grad_y, packed, ctx.state), None, None


def accepted(x: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """x, in autocast's dtype under autocast, once it is known to fit W; raises as gemm_4bit."""
    if not isinstance(x, Tensor) or not isinstance(packed, Tensor):
        raise _not_a_tensor(x, packed)
    device = packed.device
    if x.device != device or packed.is_meta:
        raise ValueError(
            "gemm_4bit: x and packed: expected both on one cpu or cuda device, got "
            f"{x.device} and {device}"
        )
    if torch.is_autocast_enabled(device.type):
        x = x.to(torch.get_autocast_dtype(device.type))
    shape = state.shape
    # One test, as this is called 200 times a token; why it failed is found out afterwards.
    if (
        len(shape) != 2
        or not (x.dim() and 0 < x.shape[-1] == shape[1])
        or x.dtype not in FLOAT_DTYPES
    ):
        raise _misfit(x, state)
    return x


def gemm_4bit(x: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """y = x W^T with W [N, K] held as (packed, state); differentiable in x.

    x: [..., K], fp32, fp16 or bf16, any strides; under autocast it is cast to autocast's dtype.
    Returns [..., N] in the (cast) dtype of x, accumulated in fp32. Nothing 16-bit of W is kept
    between forward and backward.

    Raises TypeError when x or packed is no tensor, ValueError naming K when x does not fit W, or
    for another dtype or device.
    """
    x = accepted(x, packed, state)
    n, k = state.shape
    rows = x.reshape(-1, k)
    # Without a gradient to record, the autograd function would only add its own cost per call.
    tracked = torch.is_grad_enabled() and x.requires_grad
    y = _Gemm4bit.apply(rows, packed, state) if tracked else product(rows, packed, state)
    return y.reshape(*x.shape[:-1], n)


def gemm_4bit_group(x: Tensor, weights: Sequence[tuple[Tensor, QuantState]]) -> list[Tensor]:
    """`[gemm_4bit(x, packed, state) for packed, state in weights]`, at most four of one K.

    Up to 64 rows of x without a gradient go through all weights in one launch where a kernel takes
    them so: double quantization, one quant_type and one blocksize. Then for more than 8 rows the
    order of a sum, and with it the last bit of a result, may be another than gemm_4bit's. Raises
    what gemm_4bit raises.
    """
    states = [state for _, state in weights]
    kinds = {(state.quant_type, state.blocksize, state.nested is None) for state in states}
    tracked = torch.is_grad_enabled() and x.requires_grad
    fits = x.dtype in FLOAT_DTYPES and not torch.is_autocast_enabled(x.device.type)
    fits &= all(len(s.shape) == 2 and 0 < s.shape[1] == x.shape[-1] for s in states)
    if tracked or not fits or len(kinds) != 1 or states[0].nested is None:
        return [gemm_4bit(x, packed, state) for packed, state in weights]
    rows = x.reshape(-1, x.shape[-1])
    absmax, nested_absmax, nested_map, offset = map(
        list, zip(*(s.scale_args() for s in states), strict=True)
    )
    outs = _multiply_group(
        rows,
        [packed for packed, _ in weights],
        absmax,
        nested_absmax,
        nested_map,
        offset,
        states[0].quant_type,
        states[0].blocksize,
        [state.shape[0] for state in states],
    )
    return [out.reshape(*x.shape[:-1], out.shape[1]) for out in outs]


def _not_a_tensor(x: object, packed: object) -> TypeError:
    name, got = ("packed", packed) if isinstance(x, Tensor) else ("x", x)
    return TypeError(f"gemm_4bit: {name}: expected a torch.Tensor, got {type(got).__name__}")


def _misfit(x: Tensor, state: QuantState) -> ValueError:
    shape, got = list(state.shape), list(x.shape)
    if len(shape) != 2 or shape[1] == 0:
        return ValueError(f"gemm_4bit: W: expected [N, K] with K >= 1, got {shape}")
    if got[-1:] != shape[1:]:
        return ValueError(f"gemm_4bit: x: expected [..., {shape[1]}] for W {shape}, got {got}")
    return ValueError(f"gemm_4bit: x: expected fp32, fp16 or bf16, got {x.dtype}")
