"""The compiled part of halfbyte: number formats and kernels on torch tensors.

Every function takes contiguous tensors of one device (cpu or cuda) and writes into outputs that the
caller allocated; CUDA work is queued on torch's current stream and not waited for. No output may
share memory with another argument. All functions raise

- ``TypeError`` if an argument is not a tensor,
- ``ValueError`` for a wrong dtype, number of elements, device, layout or option; the message names
  the operation, the argument, what was expected and what came,
- ``CudaError`` if the CUDA driver is missing, or a driver call or a kernel failed.

Letters: n elements, M rows of x, N out_features, K in_features. "float" is float32, float16 or
bfloat16. A block is ``blocksize`` consecutive elements of the flat tensor; the last may be short.
"""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

__version__: str

class CudaError(RuntimeError):
    """The CUDA driver is missing, or one of its calls or a kernel failed."""

class Recording:
    """Calls of these functions on CPU tensors, which it keeps alive."""

    def replay(self) -> None:
        """Make the calls again, on the same memory and in the same order."""

    def __len__(self) -> int: ...

def record(on: bool) -> Recording:
    """What this thread called on CPU tensors since it records; whether it records from now on."""

class HostMemoryError(MemoryError):
    """Host memory for optimizer state could not be reserved or pinned."""

class Pager:
    """The moments of parameters laid end to end in pages of 131072 elements, each updated in place.

    numels: elements of each parameter. moments: "fp32" or "8bit" (blocks of 256). A page holds the
    parts whose offsets ``page_layout`` gives. A frame is up to 32 MiB of pages, the unit that
    moves: with ``reserve`` every frame has a slot in pinned host memory (at most ``limit`` bytes
    in all), else each needs memory by ``lend``. table: uint8 [table_bytes(numels, moments)] on
    the CUDA device of the parameters, None on a CPU.

    A fresh pager's memory holds no moments yet: the caller writes them, then calls ``rewritten``.
    All work is queued on streams of the pager, ordered with torch's current stream by events.
    Frames are named by their number; a wrong one is a ValueError. Raises HostMemoryError where
    host memory is short.
    """

    def __init__(
        self,
        numels: list[int],
        moments: str,
        reserve: bool,
        limit: int | None,
        table: Tensor | None,
    ) -> None: ...
    @staticmethod
    def table_bytes(numels: list[int], moments: str) -> int:
        """Bytes of device memory for the table of a CUDA pager."""

    @staticmethod
    def host_budget() -> int | None:
        """Bytes of host memory that may be reserved now; None where the system does not say."""

    def reserve(self, bytes: int) -> int:
        """Address of more host memory, pinned until the pager goes; it counts in ``limit``."""

    def is_near(self) -> bool:
        """Whether the host memory is that of the NUMA node nearest to a CUDA device."""

    def frames(self) -> list[tuple[int, int, int, int, bool]]:
        """(first page, pages, bytes, address of its slot or 0, whether it is on the device)."""

    def starts(self) -> list[int]:
        """The first block of 256 elements of each parameter, then the number of all blocks."""

    def page_layout(self) -> tuple[list[int], int]:
        """Byte offsets in a page of m, v, absmax_m and absmax_v; bytes of a page."""

    def memory(self, frame: int) -> Tensor | None:
        """The tensor lent to a frame that is on the device."""

    def step(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        rules: list[tuple[float, float, float, float, float, int]],
        rule_of: list[int],
        grad_scale: Tensor | None,
        overlapped: bool,
    ) -> None:
        """One step of AdamW (decay first) of every parameter that has a gradient.

        params: float, contiguous, in the pager's order. grads: theirs, of their dtype and numel,
        on their device. rules: (lr, beta1, beta2, eps, weight_decay, step counted from 1); rule_of:
        one of them for each parameter. grad_scale: float32 [1], multiplies the gradients. Where a
        gradient is NaN or infinite 8-bit moments become 0 and the weight stays.

        Torch's current stream waits for the update; with overlapped only when ``wait_for`` is
        called, until when gradients must stay.
        """

    def wait_for(self, params: list[int]) -> None:
        """Let torch's current stream wait for the last update of parameters, by their numbers."""

    def wait_for_all(self) -> None:
        """Let torch's current stream wait for every update."""

    def demote(self, frame: int) -> None:
        """Queue the move of a frame to its slot in host memory."""

    def take_back(self, wait: bool) -> list[int]:
        """Drop the memory of demoted frames, of all after waiting or of those already copied."""

    def promote(self, frame: int, memory: Tensor) -> None:
        """Queue the move of a frame to memory: uint8 [bytes of the frame] on the device."""

    def lend(self, frame: int, memory: Tensor) -> None:
        """Give memory to a frame that has no slot."""

    def settle(self) -> None:
        """Wait until the CPU may touch slots, and torch's current stream lent memory."""

    def rewritten(self) -> None:
        """Say that the moments were written, after ``settle``."""

    def victims(self, bytes: int) -> list[int]:
        """The frames to demote to free so many bytes."""

    def returners(self, bytes: int) -> list[int]:
        """The frames to promote into so many bytes."""

    def moved(self) -> tuple[int, int, int, int]:
        """Bytes demoted, promoted and moved across the bus by updates in place; updates."""

    def update_stream(self) -> int:
        """The handle of the stream on which updates run; 0 on a CPU."""

def quantize_4bit(
    x: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, blocksize: int
) -> None:
    """Quantize ``x`` to 4-bit codes, two a byte (the even element in the high nibble).

    x: float [n]. packed: uint8 [ceil(n / 2)], out. absmax: float32 [ceil(n / blocksize)], out;
    NaN or infinite for a block that holds such a value. quant_type: "nf4", "fp4" or "int4".
    blocksize: a power of two in 32..4096.
    """

def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: float,
    quant_type: str,
    blocksize: int,
    out: Tensor,
) -> None:
    """``out = table[code] * scale`` in fp32, rounded once to ``out``'s dtype.

    packed: uint8 [ceil(n / 2)]. out: float [n]. Scales, one a block: ``absmax`` float32 when
    ``nested_absmax`` and ``nested_map`` are None, else
    ``nested_map[absmax] * nested_absmax[block // 256] + offset`` with absmax uint8,
    nested_absmax float32 [ceil(blocks / 256)] and nested_map float32 [256].
    """

def double_quantize(
    absmax: Tensor, codes: Tensor, nested_absmax: Tensor, offset: Tensor, lanes: Tensor
) -> None:
    """Quantize block scales to 8 bits of the signed dynamic map, in groups of 256, around the mean.

    absmax: float32 [blocks]. codes: uint8 [blocks], out. nested_absmax: float32
    [ceil(blocks / 256)], out. offset: float32 [1], out: the mean. lanes: uint8
    [2048 * ceil(blocks / 65536)], scratch.
    """

def quantize_blockwise(
    x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, blocksize: int
) -> None:
    """Quantize ``x`` to the nearest entries of a dynamic 8-bit map.

    x: float [n]. codes: uint8 [n], out. absmax: float32 [ceil(n / blocksize)], out.
    blocksize: a power of two in 64..4096.
    """

def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, signed: bool, blocksize: int, out: Tensor
) -> None:
    """``out = map[codes] * absmax`` of the block, in fp32, rounded once to ``out``'s dtype.

    codes: uint8 [n]. absmax: float32 [ceil(n / blocksize)]. out: float [n].
    """

def gemv(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out = x weight^T``, accumulated in float32; CPU tensors only.

    x: float [M, K]. weight: x's dtype [N, K]. out: x's dtype [M, N]. A row of out does not depend
    on the other rows.
    """

def gemv_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_map: Tensor | None,
    offset: float,
    quant_type: str,
    blocksize: int,
    out: Tensor,
) -> None:
    """``out = x @ W.T`` with W [N, K] in 4 bits, for a few rows of x.

    x: float [M, K]. packed: uint8 [ceil(N K / 2)]. out: x's dtype [M, N]. Scales as in
    ``dequantize_4bit``. Sums are fp32; a row of ``out`` depends on its row of ``x`` only.
    """

def gemv_4bit_group(
    x: Tensor,
    products: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, Tensor]],
    quant_type: str,
    blocksize: int,
) -> None:
    """``gemv_4bit`` of one x with several W, in one launch where a kernel takes them so.

    products: (packed, absmax, nested_absmax, nested_map, offset, out) of each W, at most four.
    """

def gemm_4bit(
    x: Tensor,
    products: Sequence[tuple[Tensor, Tensor, Tensor | None, Tensor | None, float, Tensor]],
    quant_type: str,
    blocksize: int,
) -> None:
    """``gemv_4bit_group`` for tens to hundreds of rows of x.

    Sums are fp32; their order may depend on M and on what goes together.
    """

def gemv_4bit_fused(
    x: Tensor,
    products: Sequence[Any],
    quant_type: str,
    gated: bool,
    hidden: Tensor | None = None,
    arrived: Tensor | None = None,
    norm: Any = None,
    residual: Any = None,
    next: Any = None,
) -> None:
    """One to four 4-bit products of x [M, K] with what stands around them, in one launch.

    products, norm, residual, next: as `halfbyte.ops.gemv_4bit_fused` makes them, read by attribute;
    where gated, pairs of gate and up that share an out. norm, residual: beside 16 rows at most, 8
    with adapters. hidden: float32 [ceil(K / 2048), M, ranks of all adapters], for more than 8 rows
    or 256 ranks of one adapter x's dtype [M, the same ranks, each padded to a multiple of 16],
    scratch; arrived: int32, its first element zero before and after; adapters need both.
    GPUs for which `has_gemv_4bit_fused` is true only.
    """

def has_gemv_4bit_fused(device: int) -> bool:
    """Whether `gemv_4bit_fused` has kernels for a CUDA device; false where there is none."""

def has_lora_product(device: int) -> bool:
    """Whether `lora_product` has kernels for a CUDA device; false where there is none."""

def lora_product(
    x: Tensor,
    w: Tensor,
    hidden: Tensor,
    b: Tensor,
    transposed: bool,
    out: Tensor,
    a: Tensor | None = None,
    scaling: float = 1.0,
    progress: Tensor | None = None,
) -> None:
    """``out = x w^T + hidden b^T``, ``x w + hidden b`` if ``transposed``, as one sum in fp32.

    With a and progress hidden's first columns become ``scaling x a^T``, ``scaling x a``, before.

    x: fp16 or bf16 [M, K]. Of its dtype are w [N, K], hidden [M, r or more] with rows any distance
    apart, b [N, r], out [M, N] and a [s, K], s at most hidden's columns; transposed, w is [K, N],
    b [r, N] and a [K, s]. Every row begins at a multiple of 16 bytes. progress: int32
    [1 + ceil(M / 128)], zeros before. GPUs for which `has_lora_product` is true only.
    """

def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    tables: Tensor,
    lengths: Tensor,
    window: int,
    partials: Tensor,
    arrived: Tensor,
    out: Tensor,
) -> None:
    """One new token a row: rotate q and k, append k and v to the paged cache, attend.

    q, out: float [B, heads, D], D even and at most 256. k, v: [B, kv_heads, D]. cos, sin: [B, D],
    the first half of sin negated; all of q's dtype. keys, values: [blocks, 16, kv_heads, D], in and
    out, of q's dtype; or uint8 codes with key_scales, value_scales: float32 [blocks, kv_heads, 16],
    in and out: (code - 128) * scale. tables: int32 [B, blocks of a row]. lengths: int32 [B], the
    new token included. window: attend to so many tokens at most; 0: to all. partials: float32
    [B * heads * 32 * (D + 2)], scratch. arrived: int32 [B, heads], zeros before and after.
    """

def draw(
    scores: Tensor,
    settings: Tensor,
    top_k: Tensor,
    keys: Tensor,
    running: Tensor,
    lengths: Tensor,
    tokens: Tensor,
    reported: Tensor,
) -> None:
    """The next token of each row of scores, by filters and a draw that only the row decides.

    scores: floats [B, V], V at most 2^18. settings: float32 [B, 3], temperature, top_p and min_p.
    top_k: int32 [B], off from V on. keys: int32 [B, 2], the halves of 64 bits, low ones first.
    running: int32 [B], added to lengths, int32 [B], which hold the places of the new tokens before.
    tokens, reported: int32 [B], out; where scores are not finite 0 and -1. reported may be in
    pinned memory.
    """

def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    logsumexps: Tensor,
    vocab: int,
    divisor: Tensor | None = None,
) -> None:
    """Losses of rows of logits; with a divisor, the gradient of their sum over it replaces those.

    logits: float [rows, stride >= vocab], updated. labels: int32 [rows]; a row whose label is no
    column is masked: its loss and gradient are zeros. losses, logsumexps (of rows that are not
    masked): float32 [rows], out. divisor: float32 [1].
    """

def cross_entropy_backward(
    logits: Tensor, labels: Tensor, logsumexps: Tensor, divisor: Tensor, first: int, width: int
) -> None:
    """Logits of the vocabulary's columns from ``first`` on become the gradient of the losses' sum.

    logits: float [rows, stride >= width], updated. labels: int32 [rows], negative in a masked row.
    logsumexps: float32 [rows], of whole rows. divisor: float32 [1], of that sum.
    """

def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    residual: Tensor | None = None,
    sum: Tensor | None = None,
) -> None:
    """``sum = x + residual`` and ``out = rounded(sum / sqrt(mean(sum^2) + eps)) * weight`` by rows.

    x: float, rows of as many elements as weight has. weight: x's dtype or float32. out, residual,
    sum: x's dtype and size; without residual and sum, x is normed. fp32 between the roundings to
    x's dtype.
    """

def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_x: Tensor,
    grad_sum: Tensor | None = None,
    grad_weight: Tensor | None = None,
    roots: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """The gradient of what was normed, and of the weight where ``grad_weight`` is given.

    grad: float, of out. x: what was normed (the sum), grad's dtype and size, like grad_sum (the
    gradient that reaches the sum otherwise) and grad_x, out. grad_weight: like weight, out. roots:
    float32 [rows] and partials: float32 [64, columns], scratch.
    """

def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """Rotate the two halves of every head by the angles of its token, or back by ``inverse``.

    q: float [B, T, heads, D], k: q's dtype [B, T, kv_heads, D], each of any strides but 1 in the
    last dimension. cos, sin: q's dtype [B or 1, T, D], the first half of sin negated. q_out, k_out:
    like q and k, contiguous. Rounded after every product and sum, as torch does.
    """

def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """``out = rounded(silu(gate)) * up``, fp32 between the roundings to the dtype.

    gate, up: one float dtype, [rows, columns], rows any distance apart. out: the same, contiguous.
    """

def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, grads: Tensor, halves: bool) -> None:
    """The gradients of gate and up, together in ``grads``.

    grad: gate's dtype [rows, columns]. grads: [2, rows, columns], or [rows, 2, columns] if
    ``halves``.
    """

def codebook(quant_type: str) -> list[float]:
    """The 16 values of "nf4", "fp4" or "int4" by code, as checkpoints store them."""

def dynamic_map(signed: bool) -> list[float]:
    """The 256 values of the dynamic 8-bit map, ascending."""

def read_file(path: str | os.PathLike[str], offset: int, out: Tensor) -> int:
    """Fill out (uint8, on the CPU) with a file's bytes from `offset` on, by all threads.

    Returns how many there were, fewer than out has where the file ends. Raises OSError.
    """

def cuda_build() -> dict[str, str | list[str]] | None:
    """``{"nvcc": version, "archs": [...]}`` of the embedded kernels, None in a CPU-only build."""

def cuda_status() -> str:
    """ "ok" if CUDA kernels can run here, otherwise the reason why not."""

def cpu_features() -> list[str]:
    """The vector instruction sets of this processor that the CPU loops look for."""
