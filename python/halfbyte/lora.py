"""LoRA: low-rank adapters over frozen linear layers, on disk exactly as PEFT writes them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.errors import CheckpointError
from halfbyte.fingerprint import fingerprint
from halfbyte.linear import Linear4bit, is_plain
from halfbyte.ops import lora_4bit
from halfbyte.ops.gemv_4bit_fused import LowRank
from halfbyte.tokenizer.folder import read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "halfbyte_base.json"
PREFIX = "base_model.model."
OUTPUT_LAYER = "lm_head"
# How the names of the biases end that train with an adapter.
BIASES = {"none": [], "lora_only": [".base_layer.bias"], "all": [".bias"]}
# Ways to begin, of PEFT's, that leave another base than the one that is loaded.
CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Config entries whose tensors or arithmetic the layers below do not implement.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
)


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
    return {PREFIX + name.replace(".trained.", "."): part.detach() for name, part in parts.items()}


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
    from safetensors.torch import save

    # Names within what torch.compile returns are others.
    model = getattr(model, "_orig_mod", model)
    config = getattr(model, "lora_config", None)
    if config is None:
        raise ValueError(
            "save_adapter: the model carries no adapter. Hint: lora.inject it first; of a wrapper "
            "such as DistributedDataParallel pass its `module`"
        )
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.float().cpu().contiguous() for k, v in adapter_tensors(model).items()}
    # Its save_file would leave the file to its owner alone.
    weights = save(tensors, metadata={"format": "pt"})
    _write_aside(folder / WEIGHTS_FILE, lambda path: path.write_bytes(weights))
    fields = json.dumps(_peft_config(model, config, base_name), indent=2, sort_keys=True)
    _write_aside(folder / CONFIG_FILE, lambda path: path.write_text(fields + "\n"))
    if base_record is None and config.bias == "none":
        base_record = fingerprint(model)
    if base_record is not None:
        record = json.dumps(dict(base_record), indent=2, sort_keys=True)
        _write_aside(folder / BASE_FILE, lambda path: path.write_text(record + "\n"))


def _write_aside(path: Path, write) -> None:
    """A crash leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _peft_config(model: nn.Module, config: LoraConfig, base_name: str | None) -> dict[str, Any]:
    """The minimal adapter_config.json: older PEFT versions refuse keys they do not know."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    ranks = {n: m.r for n, m in layers.items() if m.r != config.r}
    alphas = {n: m.lora_alpha for n, m in layers.items() if m.lora_alpha != config.lora_alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name or getattr(model, "source", None),
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "target_modules": _shortest_targets(model, list(layers)),
        "modules_to_save": config.modules_to_save,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "layers_to_transform": None,
        "layers_pattern": None,
        "revision": None,
    }


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
    fields = _read_config(folder)
    tensors = _read_tensors(folder)
    if hasattr(model, "lora_config"):
        raise ValueError(
            "load_adapter: the model already carries an adapter. Hint: load the base again; an "
            "Engine takes several"
        )
    check_own_layers(model, "load_adapter")
    config = _config_of(folder, fields, trainable)
    # The model is not touched before all is known to fit.
    ranks = layers_of(model, tensors, fields, folder)
    saved = _saved_names(model, config.modules_to_save or [])
    _check_others(model, tensors, ranks, saved, config.bias, folder)
    if difference := _base_difference(folder, model, base_record):
        warnings.warn(difference, stacklevel=2)
    model.requires_grad_(False)
    for name, rank in ranks.items():
        alpha = _pattern_value(fields.get("alpha_pattern"), name, config.lora_alpha)
        _wrap(model, name, rank, alpha, config)
    for name in saved:
        _replace(model, name, SavedModule(model.get_submodule(name)))
    model.lora_config = config
    for name, part in _parts(model).items():
        part.data.copy_(tensors[_plain(name)])
        part.requires_grad_(trainable)
    return model


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.exists():
        # A run's folder holds its adapter beside checkpoints and metrics.
        inside = folder / "adapter"
        hint = f", such as {inside}" if (inside / CONFIG_FILE).exists() else ""
        raise CheckpointError(
            f"{path}: no such file. Hint: expected a folder that PEFT or halfbyte saved{hint}"
        )
    fields = read_json(path)
    if fields.get("peft_type") != "LORA" or fields.get("r") is None:
        raise CheckpointError(
            f"{path}: expected peft_type LORA with a rank r, got peft_type "
            f"{fields.get('peft_type')!r}, r {fields.get('r')!r}"
        )
    if refused := [key for key in UNSUPPORTED if fields.get(key)]:
        raise CheckpointError(f"{path}: {refused} are not supported, only plain LoRA is")
    for name, (expected, fits) in FIELDS.items():
        if name in fields and not fits(fields[name]):
            raise CheckpointError(f"{path}: {name}: expected {expected}, got {fields[name]!r}")
    return fields


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    # Beyond, the product with a weight may be infinite in fp32.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def _are_patterns(of: Callable[[Any], bool], value: Any) -> bool:
    """Whether these are regular expressions, each with a value `of` some kind; or none."""
    if not isinstance(value, dict | None):
        return False
    try:
        return all(re.compile(f"({pattern})") and of(v) for pattern, v in (value or {}).items())
    except re.error:
        return False


# Of adapter_config.json, what is calculated with: what it has to be, and whether it is that.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive integer", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number", _is_number),
    "rank_pattern": ("ranks by regular expressions", partial(_are_patterns, _is_rank)),
    "alpha_pattern": ("numbers by regular expressions", partial(_are_patterns, _is_number)),
    "init_lora_weights": (
        "one that leaves the base as it is (PEFT's save_pretrained makes plain LoRA of others by "
        "path_initial_model_for_weight_conversion)",
        lambda value: not str(value).lower().startswith(CHANGE_THE_BASE),
    ),
    "modules_to_save": (
        "a list of names",
        lambda value: (
            value is None
            or isinstance(value, list)
            and all(isinstance(name, str) for name in value)
        ),
    ),
}


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
        raise CheckpointError(f"{folder / CONFIG_FILE}: {error}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors under the model's own names. Pickled adapters are never opened."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.exists():
        hint = ""
        if (folder / "adapter_model.bin").exists():
            hint = ". Hint: adapter_model.bin is a pickle; save it again with PEFT as safetensors"
        raise CheckpointError(f"{path}: no such file{hint}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: corrupt or truncated: {error}") from None
    plain = {_plain(name): value for name, value in tensors.items()}
    for name, value in plain.items():
        if "lora_" in name:
            _check_matrix(path, name, value, plain)
    return plain


def _check_matrix(path: Path, name: str, value: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Whether this is half of a pair of matrices."""
    layer, _, kind = name.removesuffix(".weight").rpartition(".")
    other = {"lora_A": "lora_B", "lora_B": "lora_A"}.get(kind)
    if other is None or not name.endswith(".weight"):
        raise CheckpointError(f"{path}: {name}: only lora_A.weight and lora_B.weight are supported")
    if value.dim() != 2:
        raise CheckpointError(f"{path}: {name}: expected a matrix, got {list(value.shape)}")
    if f"{layer}.{other}.weight" not in tensors:
        raise CheckpointError(f"{path}: {layer}.{other}.weight: missing beside {name}")


def _plain(name: str) -> str:
    """A parameter's name in the model without its adapter."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".trained.", ".")


def layers_of(
    model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], folder: Path
) -> dict[str, int]:
    """The layers that the file has matrices for, which have to fit them, with their ranks."""
    names = sorted(n.removesuffix(".lora_A.weight") for n in tensors if "lora_A" in n)
    return {name: _rank(model, name, tensors, fields, folder) for name in names}


def _rank(
    model: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    folder: Path,
) -> int:
    """The rank of a layer by its lora_A, which has to be the one that the config names."""
    layer = _linear(model, name, folder)
    rank = _pattern_value(fields.get("rank_pattern"), name, fields["r"])
    a = tensors[f"{name}.lora_A.weight"]
    if a.shape[0] != rank:
        raise CheckpointError(
            f"{folder}: {name}.lora_A.weight: expected rank {rank} by {CONFIG_FILE}, got "
            f"{a.shape[0]} in {list(a.shape)}. Hint: config and weights are of two adapters"
        )
    _check_shape(f"{name}.lora_A.weight", (rank, layer.in_features), tensors, folder)
    _check_shape(f"{name}.lora_B.weight", (layer.out_features, rank), tensors, folder)
    return rank


def _linear(model: nn.Module, name: str, folder: Path) -> nn.Linear:
    """The layer of that name, also beneath other adapters."""
    try:
        found: Any = model.get_submodule(name)
    except AttributeError:
        found = None
    found = getattr(found, "base_layer", found)
    if not isinstance(found, nn.Linear):
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {name}: the model has no such linear layer. "
            "Hint: the adapter belongs to another base model"
        )
    return found


def _check_shape(
    name: str, expected: tuple[int, ...], tensors: Mapping[str, Tensor], folder: Path
) -> None:
    shape = tuple(tensors[name].shape)
    if shape != expected:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {name}: expected {list(expected)}, got {list(shape)}"
        )


def _pattern_value(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: a regular expression or suffix of the path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_others(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    layers: Collection[str],
    saved: Collection[str],
    bias: str,
    folder: Path,
) -> None:
    """Raise CheckpointError unless the file holds, beside matrices, what trained with them."""
    trained = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        with_it = leaf == "bias" and (bias == "all" or bias == "lora_only" and owner in layers)
        if with_it or owner in saved:
            trained[name] = tuple(parameter.shape)
    others = [n for n in sorted(tensors) if "lora_" not in n and n not in trained]
    missing = sorted(set(trained) - set(tensors))
    unexpected = [name for name in others if not repeats(model, name, tensors[name])]
    if missing or unexpected:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    for name, shape in trained.items():
        _check_shape(name, shape, tensors, folder)


def repeats(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether an adapter's tensor is the base's own: PEFT adds the weight of an adapted head."""
    parameters = model.named_parameters(remove_duplicate=False)
    own = next((p for other, p in parameters if _plain(other) == name), None)
    return own is not None and own.shape == value.shape and torch.equal(own, value.to(own))


def _base_difference(
    folder: Path, model: nn.Module, base_record: Mapping[str, Any] | None
) -> str | None:
    """What a user has to know where the adapter was trained on another base."""
    path = folder / BASE_FILE
    if not path.exists():
        return None
    base_record = base_record or fingerprint(model)
    stored = read_json(path)
    differences = [
        f"{key}: trained on {stored[key]!r}, loaded on {base_record.get(key)!r}"
        for key in stored
        if stored[key] != base_record.get(key)
    ]
    if not differences:
        return None
    return (
        f"{folder}: this adapter was trained on another base; outputs will differ. "
        + "; ".join(differences)
        + ". Hint: load the base as in training: quant_type, double_quant, blocksize and dtype"
    )


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
