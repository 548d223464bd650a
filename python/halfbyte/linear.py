"""Linear4bit: a frozen linear layer whose weight is packed 4-bit codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError
from halfbyte.ops import (
    QuantState,
    dequantize_4bit,
    gemm_4bit,
    gemm_4bit_group,
    quantize_4bit,
    rms_norm,
    swiglu,
)
from halfbyte.ops.gemv_4bit_fused import (
    Following,
    Norm,
    Product,
    Residual,
    fuses,
    gemv_4bit_fused,
    takes_norm,
    takes_residual,
)


class Linear4bit(nn.Linear):
    """y = x W^T + b with W [out_features, in_features] in 4 bits; gradients reach x and b only.

    A fresh layer holds no weight until `quantize_`, `set_quantized` or `load_state_dict` gives
    it one. `weight` is then uint8 [(N * K + 1) // 2, 1] and `quant_state` its QuantState; the
    state dict has exactly the keys that bitsandbytes writes.

    quant_type ("nf4", "fp4", "int4"), blocksize and double_quant say how `quantize_` works.
    dtype, device: of the bias.
    """

    quant_state: QuantState | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.blocksize, self.double_quant = quant_type, blocksize, double_quant
        nbytes = (in_features * out_features + 1) // 2
        self._set_weight(torch.empty(nbytes, 1, dtype=torch.uint8, device="meta"))
        self.quant_state = None
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def _set_weight(self, packed: Tensor) -> None:
        self.weight = nn.Parameter(packed, requires_grad=False)

    def quantize_(self, weight: Tensor, name: str = "weight") -> Linear4bit:
        """Quantize a float [out_features, in_features] tensor into this layer, on its device.

        Raises ValueError naming the tensor for another shape or dtype, or a NaN or Inf in it.
        """
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise ValueError(f"{name}: expected {list(expected)}, got {list(weight.shape)}")
        packed, state = quantize_4bit(
            weight, self.quant_type, self.blocksize, self.double_quant, name
        )
        return self.set_quantized(packed, state)

    def set_quantized(self, packed: Tensor, quant_state: QuantState) -> Linear4bit:
        """Take over stored codes as they are.

        packed: uint8 [(N * K + 1) // 2, 1], on quant_state's device.
        Raises ValueError when codes or state belong to another shape.
        """
        if quant_state.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"Linear4bit: quant_state.shape: expected "
                f"{[self.out_features, self.in_features]}, got {list(quant_state.shape)}"
            )
        if packed.dtype != torch.uint8 or packed.numel() != (quant_state.numel + 1) // 2:
            raise ValueError(
                f"Linear4bit: packed: expected uint8 [{(quant_state.numel + 1) // 2}, 1], "
                f"got {packed.dtype} {list(packed.shape)}"
            )
        self._set_weight(packed.reshape(-1, 1))
        self.quant_state = quant_state
        self.quant_type, self.blocksize = quant_state.quant_type, quant_state.blocksize
        self.double_quant = quant_state.nested is not None
        return self

    def _state(self) -> QuantState:
        if self.quant_state is None:
            raise RuntimeError(
                "Linear4bit holds no weight yet. Hint: call quantize_(weight), "
                "set_quantized(packed, quant_state) or load_state_dict(...) first"
            )
        return self.quant_state

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features], fp32, fp16 or bf16. Returns [..., out_features] of its dtype."""
        return self._biased(gemm_4bit(x, self.weight, self._state()))

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features] in `dtype` (default: that of the original)."""
        return dequantize_4bit(self.weight, self._state(), dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> Linear4bit:
        super()._apply(fn, recurse)
        # Scales follow the codes across devices and, unlike ordinary buffers, never change dtype.
        if self.quant_state is not None:
            self.quant_state = self.quant_state.to(self.weight.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.quant_state is not None:
            destination.update(self.quant_state.as_tensors(f"{prefix}weight"))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        key = f"{prefix}weight"
        if key in state_dict:
            try:
                self._load_weight(key, state_dict)
            except (CheckpointError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")
        elif strict:
            missing_keys.append(key)
        if self.bias is not None and f"{prefix}bias" in state_dict:
            try:
                self._load_bias(state_dict[f"{prefix}bias"])
            except ValueError as error:
                error_msgs.append(f"{prefix}bias: {error}")
        elif self.bias is not None and strict:
            missing_keys.append(f"{prefix}bias")
        if strict:
            known = (f"{key}.", key, f"{prefix}bias")
            unexpected_keys += [
                k for k in state_dict if k.startswith(prefix) and not k.startswith(known)
            ]

    def _load_weight(self, key: str, state_dict: dict[str, Tensor]) -> None:
        state = QuantState.from_tensors(key, state_dict)
        packed = state_dict[key].contiguous().view(-1).view(torch.uint8)
        device = packed.device if self.weight.is_meta else self.weight.device
        self.set_quantized(packed.to(device, copy=True), state.to(device))

    def _load_bias(self, value: Tensor) -> None:
        if value.shape != self.bias.shape:
            raise ValueError(f"expected {list(self.bias.shape)}, got {list(value.shape)}")
        if self.bias.is_meta:
            bias = value.detach().to(self.bias.dtype, copy=True)
            self.bias = nn.Parameter(bias, self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(value)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={self.quant_type}, "
            f"blocksize={self.blocksize}, double_quant={self.double_quant}"
        )


class Launch(NamedTuple):
    """What the one launch for a projection of few tokens knows of what comes behind it.

    arrived: as `gemv_4bit_fused` takes it. following: the layers that the next launch reads; gated:
    they are a gate and an up projection; norm: what stands in front of them. residual: what the one
    output is added to.
    """

    arrived: Tensor
    following: Sequence[nn.Module] = ()
    gated: bool = False
    norm: nn.Module | None = None
    residual: Tensor | None = None


def onto(residual: Tensor, launch: Launch | None) -> Launch | None:
    """A launch that adds its one output to a residual, if there is one."""
    return None if launch is None else launch._replace(residual=residual)


class Summed(NamedTuple):
    """A residual and the output that its launch has added to it; squares: as `Norm` takes them."""

    total: Tensor
    squares: Tensor


class Unnormed(NamedTuple):
    """A norm of what is summed that waits for the launch that reads it."""

    summed: Summed
    weight: Tensor
    eps: float

    def normed(self) -> Tensor:
        return rms_norm(self.summed.total, self.weight, self.eps)


def project(
    x: Tensor | Unnormed, *layers: nn.Module, unread: bool = False, launch: Launch | None = None
) -> list[Tensor] | list[Summed]:
    """`[layer(x) for layer in layers]`, the 4-bit products in one launch where a kernel can.

    layers: Linear4bit, or what adds something to the product of its `base_layer` by
    `adapt(x, y)`; any others, and layers with hooks, are called one after the other. unread: the
    outputs are wanted for their gradients only and may hold anything. launch: given where an
    engine reads; what stands around the products of a few rows joins theirs, and an output that
    was added to a residual is Summed.
    """
    if (outs := _fused(x, layers, False, launch)) is not None:
        return outs
    if isinstance(x, Unnormed):
        x = x.normed()
    bases = _bases(layers)
    plain = all(map(is_plain, layers, bases))
    together = getattr(type(layers[0]), "together", None)
    if plain and together is not None and (outs := together(x, layers, bases, unread)) is not None:
        return outs
    if not plain:
        return [layer(x) for layer in layers]
    products = gemm_4bit_group(x, [(base.weight, base._state()) for base in bases])
    outs = [base._biased(y) for base, y in zip(bases, products, strict=True)]
    adapted = zip(layers, bases, outs, strict=True)
    return [y if layer is base else layer.adapt(x, y) for layer, base, y in adapted]


def project_gated(
    x: Tensor | Unnormed, gate: nn.Module, up: nn.Module, launch: Launch | None = None
) -> Tensor:
    """swiglu(gate(x), up(x)), where an engine reads in one launch where a kernel can."""
    if (outs := _fused(x, (gate, up), True, launch)) is not None:
        return outs[0]
    return swiglu(*project(x, gate, up, launch=launch))


def _fused(
    x: Tensor | Unnormed, layers: Sequence[nn.Module], gated: bool, launch: Launch | None
) -> list[Tensor] | list[Summed] | None:
    """The outputs of plain layers by one kernel with what stands around their products, if any."""
    if launch is None:
        return None
    stream = x.summed.total if isinstance(x, Unnormed) else x
    rows = stream.reshape(-1, stream.shape[-1])
    products = _products(rows, layers)
    if products is None or not fuses(rows, products):
        return None
    norm = residual = None
    if isinstance(x, Unnormed) and takes_norm(rows, products):
        norm = Norm(x.weight, x.summed.squares, x.eps)
    elif isinstance(x, Unnormed):
        rows = x.normed().view_as(rows)
    if launch.residual is not None and takes_residual(rows, products):
        residual = Residual.of(launch.residual.reshape(-1, launch.residual.shape[-1]))
    following = _following(launch, residual is not None)
    outs = gemv_4bit_fused(rows, products, gated, following, launch.arrived, norm, residual)
    outs = [out.view(*stream.shape[:-1], -1) for out in outs]
    return outs if residual is None else [Summed(outs[0], residual.squares)]


def _products(rows: Tensor, layers: Sequence[nn.Module]) -> list[Product] | None:
    """What the kernel is asked for, where it may stand for the layers."""
    bases = _bases(layers)
    if not rows.is_cuda or not all(map(is_plain, layers, bases)):
        return None
    training = torch.is_grad_enabled() or layers[0].training or torch.compiler.is_compiling()
    if training or torch.is_autocast_enabled("cuda"):
        return None
    products = []
    for layer, base in zip(layers, bases, strict=True):
        if layer is not base and not hasattr(layer, "low_rank"):
            return None
        adapter = None if layer is base else layer.low_rank(len(rows))
        bias = None if base.bias is None else base.bias.to(rows.dtype)
        products.append(Product(base.weight, base._state(), bias, adapter))
    return products


def _following(launch: Launch, summed: bool) -> Following:
    """What the next launch reads; summed: a norm comes next, as what it norms is there."""
    bases = _bases(launch.following)
    plain = all(map(is_plain, launch.following, bases))
    weights = [(base.weight, base._state()) for base in bases] if plain else []
    norm = launch.norm.weight if summed and launch.norm is not None else None
    return Following(weights, launch.gated, norm)


def _bases(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """What each layer adapts, or the layer itself."""
    return [getattr(layer, "base_layer", layer) for layer in layers]


def is_plain(layer: nn.Module, base: nn.Module) -> bool:
    """Whether a layer is a Linear4bit, or adapts one, that calling it does nothing more than."""
    adapts = layer is base or hasattr(layer, "adapt")
    return type(base) is Linear4bit and adapts and not (is_watched(layer) or is_watched(base))


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hooks wait for the module to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
