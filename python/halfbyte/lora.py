"""LoRA: low-rank adapters over frozen linear layers, put on, loaded, saved and merged."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte import peft
from halfbyte.errors import CheckpointError
from halfbyte.fingerprint import fingerprint
from halfbyte.linear import Linear4bit, is_plain
from halfbyte.ops import lora_4bit
from halfbyte.ops.gemv_4bit_fused import LowRank

OUTPUT_LAYER = "lm_head"
# How the names of the biases end that train with an adapter.
BIASES = {"none": [], "lora_only": [".base_layer.bias"], "all": [".bias"]}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how; names and meanings are PEFT's, defaults are QLoRA's.

    target_modules: "all-linear" (every linear layer but the output layer), one regular
    expression that matches whole module paths, or a list of path suffixes or full paths.
    use_rslora: scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
    bias: "none", "all" or "lora_only": which biases train too.
    modules_to_save: how the paths of modules end that train in full beside the adapters: "norm"
    means every norm.
    """

    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        if not (isinstance(self.r, int) and self.r > 0):
            raise ValueError(f"LoraConfig: r: expected a positive int, got {self.r!r}")
        if not (isinstance(self.lora_alpha, int | float) and math.isfinite(self.lora_alpha)):
            raise ValueError(
                f"LoraConfig: lora_alpha: expected a finite number, got {self.lora_alpha!r}"
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoraConfig: lora_dropout: expected [0, 1), got {self.lora_dropout}")
        if self.bias not in BIASES:
            raise ValueError(
                f"LoraConfig: bias: expected 'none', 'all' or 'lora_only', got {self.bias!r}"
            )
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                "LoraConfig: modules_to_save: expected a list of names, "
                f"got {self.modules_to_save!r}. Hint: [{self.modules_to_save!r}]"
            )
        if isinstance(self.target_modules, str):
            _check_pattern(self.target_modules)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"LoraConfig: target_modules: expected 'all-linear', a regular expression or a list of "
            f"names, got {pattern!r}, which is no regular expression: {error}"
        ) from None


def add_product(y: Tensor, hidden: Tensor, b: Tensor) -> Tensor:
    """y + hidden b^T in y's dtype, in one pass over y and with one rounding.

    y: [..., N]; hidden: [..., r]; b: [N, r].
    """
    rows = torch.addmm(
        y.reshape(-1, y.shape[-1]),
        hidden.reshape(-1, hidden.shape[-1]).to(y.dtype),
        b.to(y.dtype).t(),
    )
    return rows.view(y.shape)


class LoRALinear(nn.Module):
    """y = base(x) + scaling * B(A(dropout(x))), A [r, in], B [out, r] (Hu et al. 2021).

    A and B are fp32 and multiply in x's dtype; A starts uniform in +-1/sqrt(in), B at zero, so
    that the first output is the base's.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = nn.Dropout(lora_dropout)
        device = base_layer.weight.device
        k, n = base_layer.in_features, base_layer.out_features
        # Drawn on the CPU, so that a seed gives the same adapter on every device.
        a = torch.empty(r, k, dtype=torch.float32, device="cpu")
        a.uniform_(-1, 1, generator=generator).div_(math.sqrt(k))
        self.lora_A = nn.Linear(k, r, bias=False, device="meta")
        self.lora_B = nn.Linear(r, n, bias=False, device="meta")
        self.lora_A.weight = nn.Parameter(a.to(device))
        self.lora_B.weight = nn.Parameter(torch.zeros(n, r, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]. Returns [..., out_features] in the base layer's output dtype."""
        base = self.base_layer
        outs = self.together(x, [self], [base]) if is_plain(self, base) else None
        return self.adapt(x, base(x)) if outs is None else outs[0]

    @staticmethod
    def together(
        x: Tensor, layers: Sequence[nn.Module], bases: Sequence[nn.Module], unread: bool = False
    ) -> list[Tensor] | None:
        """In training, the outputs of plain layers of one input in one node of the graph.

        None where they have to be called one by one, and under torch.compile, which makes its own.
        """
        training = layers[0].training
        if not (training or torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return None
        if any(type(layer) is not LoRALinear for layer in layers):
            return None
        dropouts = [layer.dropout for layer in layers]
        scaling, p = layers[0].scaling, dropouts[0].p
        if any(layer.scaling != scaling for layer in layers) or any(d.p != p for d in dropouts):
            return None
        outs = lora_4bit(
            x,
            [(base.weight, base._state()) for base in bases],
            [layer.lora_A.weight for layer in layers],
            [layer.lora_B.weight for layer in layers],
            scaling,
            [dropout(x) for dropout in dropouts] if training and p > 0 else (),
            unread,
        )
        return [base._biased(y) for base, y in zip(bases, outs, strict=True)]

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """y = base(x) with the adapter's share added."""
        hidden = F.linear(self.dropout(x), self.lora_A.weight.to(x.dtype)) * self.scaling
        return add_product(y, hidden, self.lora_B.weight)

    def low_rank(self, rows: int) -> LowRank:
        """The adapter as a product of a few rows takes it."""
        return LowRank(self.lora_A.weight, self.lora_B.weight, None, self.scaling)

    def delta(self) -> Tensor:
        """scaling * B A, fp32 [out_features, in_features]."""
        return self.scaling * (self.lora_B.weight.float() @ self.lora_A.weight.float())


class SavedModule(nn.Module):
    """A module trained in full (modules_to_save) beside its untouched original.

    The copy is fp32, so that small updates are not lost, and is used in the original's dtype.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.trained = nn.ParameterDict(
            {
                name: nn.Parameter(value.detach().float().clone())
                for name, value in base_layer.named_parameters()
            }
        )

    @property
    def weight(self) -> Tensor:
        return self.trained["weight"].to(self.base_layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        dtypes = {name: value.dtype for name, value in self.base_layer.named_parameters()}
        values = {name: value.to(dtypes[name]) for name, value in self.trained.items()}
        return torch.func.functional_call(self.base_layer, values, (x,))


def target_names(model: nn.Module, target_modules: str | list[str]) -> list[str]:
    """Paths of the linear layers that `target_modules` names, in module order.

    Raises ValueError when an entry matches nothing.
    """
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith((".lora_A", ".lora_B"))
    ]
    if target_modules == "all-linear":
        return [name for name in linear if name.rpartition(".")[2] != OUTPUT_LAYER]
    if isinstance(target_modules, str):
        found = [name for name in linear if re.fullmatch(target_modules, name)]
        missing = [] if found else [f"the whole-path pattern {target_modules}"]
    else:
        found = [n for n in linear if any(_is_suffix(entry, n) for entry in target_modules)]
        missing = [e for e in target_modules if not any(_is_suffix(e, n) for n in linear)]
    if missing or not found:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"LoraConfig: target_modules: no linear layer matches {missing or target_modules}. "
            f"Hint: the model's linear layers are named {known}"
        )
    return found


def _is_suffix(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def inject(
    model: nn.Module, config: LoraConfig, generator: torch.Generator | None = None
) -> nn.Module:
    """Freeze `model`, wrap its target layers in LoRALinear, in place; returns the model.

    generator: source of A's initial values (a CPU generator).
    Raises ValueError when the model already carries an adapter, an engine has some over it, or a
    target matches nothing.
    """
    if hasattr(model, "lora_config"):
        raise ValueError("inject: the model already carries an adapter. Hint: load the base again")
    check_own_layers(model, "inject")
    names = target_names(model, config.target_modules)
    saved = _saved_names(model, config.modules_to_save or [])
    if both := sorted(set(names) & set(saved)):
        raise ValueError(f"inject: {both} stand in target_modules and in modules_to_save")
    model.requires_grad_(False)
    for name in names:
        _wrap(model, name, config.r, config.lora_alpha, config, generator)
    for name in saved:
        _replace(model, name, SavedModule(model.get_submodule(name)))
    model.lora_config = config
    for part in _parts(model).values():
        part.requires_grad_(True)
    return model


def check_own_layers(model: nn.Module, purpose: str) -> None:
    """Raise ValueError where an engine has put its adapters round the model's layers."""
    wrapped = any(hasattr(module, "base_layer") for module in model.modules())
    if wrapped and not hasattr(model, "lora_config"):
        raise ValueError(
            f"{purpose}: an engine has adapters over the model's layers. Hint: engine.close() "
            "gives the model back as it was"
        )


def _saved_names(model: nn.Module, suffixes: list[str]) -> list[str]:
    # PEFT's rule: unlike those of target_modules, suffixes may begin within a word.
    names = [n for n, _ in model.named_modules() if n.endswith(tuple(suffixes))]
    if missing := [s for s in suffixes if not any(n.endswith(s) for n in names)]:
        raise ValueError(f"LoraConfig: modules_to_save: no module matches {missing}")
    if containers := [n for n in names if next(model.get_submodule(n).children(), None)]:
        raise ValueError(
            f"LoraConfig: modules_to_save: expected layers that hold weights of their own, got "
            f"{containers}, which hold modules. Hint: name what they hold"
        )
    if packed := [n for n in names if isinstance(model.get_submodule(n), Linear4bit)]:
        raise ValueError(
            f"LoraConfig: modules_to_save: {packed} are 4-bit and cannot train in full"
        )
    return names


def _wrap(model, name: str, r: int, alpha: float, config: LoraConfig, generator=None) -> None:
    layer = LoRALinear(
        model.get_submodule(name), r, alpha, config.lora_dropout, config.use_rslora, generator
    )
    _replace(model, name, layer)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Everything that trains, in module order."""
    return [p for p in model.parameters() if p.requires_grad]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, frozen or not: A, B, modules_to_save, biases.

    Raises ValueError where something else trains, which no adapter holds.
    """
    parts = _parts(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in parts:
            raise ValueError(
                f"{name}: expected only the adapter to train, got a parameter that is no part of "
                "it. Hint: name its module in modules_to_save, or freeze it"
            )
    return {
        peft.PREFIX + name.replace(".trained.", "."): part.detach() for name, part in parts.items()
    }


def _parts(model: nn.Module) -> dict[str, nn.Parameter]:
    """What of the model's parameters belongs to the adapter that it carries."""
    endings = [".lora_A.weight", ".lora_B.weight", *BIASES[model.lora_config.bias]]
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(tuple(endings)) or ".trained." in name
    }


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    base_name: str | None = None,
    base_record: Mapping[str, Any] | None = None,
) -> None:
    """Write the adapter as PEFT reads it: adapter_config.json, adapter_model.safetensors (fp32).

    base_name: the base model's path or hub id, recorded in the config. base_record: the base's
    `fingerprint`, written beside as halfbyte_base.json, which PEFT ignores; computed here unless
    the adapter trains biases of the base in place, when only the caller can have it from before.
    Raises ValueError when the model carries no adapter.
    """
    # Names within what torch.compile returns are others.
    model = getattr(model, "_orig_mod", model)
    config = getattr(model, "lora_config", None)
    if config is None:
        raise ValueError(
            "save_adapter: the model carries no adapter. Hint: lora.inject it first; of a wrapper "
            "such as DistributedDataParallel pass its `module`"
        )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    targets = _shortest_targets(model, list(layers))
    base_name = base_name or getattr(model, "source", None)
    if base_record is None and config.bias == "none":
        base_record = fingerprint(model)
    fields = peft.config_fields(config, layers, targets, base_name)
    peft.write_files(Path(folder).expanduser(), adapter_tensors(model), fields, base_record)


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Last path components if they name exactly these layers, else the full paths."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    matched = {
        name
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear | nn.Linear)
        and not name.endswith((".base_layer", ".lora_A", ".lora_B"))
        and any(_is_suffix(suffix, name) for suffix in suffixes)
    }
    return suffixes if matched == set(names) else sorted(names)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    trainable: bool = False,
    base_record: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Wrap `model` with the PEFT LoRA adapter in `folder`, in place; returns the model.

    The layers, their ranks and the modules trained in full are those whose tensors the file
    holds, so every spelling of target_modules loads. base_record: the model's `fingerprint`
    (default: computed if the adapter has a record to compare it with); a difference is a warning
    that says what differs.

    Raises CheckpointError naming file and tensor for a missing or corrupt file, a tensor that
    does not fit the model, and adapter kinds other than LoRA.
    """
    folder = Path(folder).expanduser()
    fields = peft.read_config(folder)
    tensors = peft.read_tensors(folder)
    if hasattr(model, "lora_config"):
        raise ValueError(
            "load_adapter: the model already carries an adapter. Hint: load the base again; an "
            "Engine takes several"
        )
    check_own_layers(model, "load_adapter")
    config = _config_of(folder, fields, trainable)
    # The model is not touched before all is known to fit.
    ranks = peft.layers_of(model, tensors, fields, folder)
    saved = _saved_names(model, config.modules_to_save or [])
    peft.check_others(model, tensors, ranks, saved, config.bias, folder)
    if difference := peft.base_difference(folder, model, base_record):
        warnings.warn(difference, stacklevel=2)
    model.requires_grad_(False)
    for name, rank in ranks.items():
        alpha = peft.pattern_value(fields.get("alpha_pattern"), name, config.lora_alpha)
        _wrap(model, name, rank, alpha, config)
    for name in saved:
        _replace(model, name, SavedModule(model.get_submodule(name)))
    model.lora_config = config
    for name, part in _parts(model).items():
        part.data.copy_(tensors[peft.plain_name(name)])
        part.requires_grad_(trainable)
    return model


def _config_of(folder: Path, fields: Mapping[str, Any], trainable: bool) -> LoraConfig:
    try:
        return LoraConfig(
            r=fields["r"],
            lora_alpha=fields.get("lora_alpha", 8),
            lora_dropout=fields.get("lora_dropout", 0.0) if trainable else 0.0,
            target_modules=fields.get("target_modules") or "all-linear",
            use_rslora=fields.get("use_rslora", False),
            bias=fields.get("bias", "none"),
            modules_to_save=fields.get("modules_to_save"),
        )
    except ValueError as error:
        raise CheckpointError(f"{folder / peft.CONFIG_FILE}: {error}") from None


@torch.no_grad()
def merge(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    original: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Fold the adapter into 16-bit linear layers, in place; returns the model.

    By default W = dequantize(W4) + scaling * B A, what training saw. original: 16-bit weights
    by parameter name ("model.layers.0.self_attn.q_proj.weight") to add the delta to instead;
    the result then differs from the trained model by the quantization error. Never re-quantizes:
    a second rounding to 4 bits drops nearly all of a normal fine-tune.

    Raises CheckpointError where `original` has not the weights of this model.
    """
    check_own_layers(model, "merge")
    if original is not None:
        _check_original(model, original)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | Linear4bit) and not name.endswith(".base_layer"):
            _replace(model, name, _merged_linear(module, name, dtype, original))
        elif isinstance(module, SavedModule):
            for key, value in module.trained.items():
                parent = module.base_layer.get_parameter(key)
                # A tied table is shared with the embedding, which keeps its own values.
                setattr(module.base_layer, key, nn.Parameter(value.to(parent.dtype)))
            _replace(model, name, module.base_layer)
    if hasattr(model, "lora_config"):
        del model.lora_config
    return model


def _check_original(model: nn.Module, original: Mapping[str, Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | Linear4bit) and not name.endswith(".base_layer"):
            base = module.base_layer if isinstance(module, LoRALinear) else module
            found = original.get(f"{name}.weight")
            expected = [base.out_features, base.in_features]
            if found is None or list(found.shape) != expected:
                raise CheckpointError(
                    f"merge: original: {name}.weight: expected {expected}, got "
                    f"{'none' if found is None else list(found.shape)}. Hint: it has to be the "
                    "model that was quantized, in 16 bits"
                )


def _merged_linear(module, name: str, dtype: torch.dtype, original) -> nn.Linear:
    base = module.base_layer if isinstance(module, LoRALinear) else module
    if original is not None:
        weight = original[f"{name}.weight"].to(base.weight.device, torch.float32)
    elif isinstance(base, Linear4bit):
        weight = base.dequantize(torch.float32)
    else:
        weight = base.weight.float()
    if isinstance(module, LoRALinear):
        weight = weight + module.delta()
    merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    merged.weight = nn.Parameter(weight.to(dtype))
    merged.bias = None if base.bias is None else nn.Parameter(base.bias.to(dtype))
    return merged
