"""PEFT's files of a LoRA adapter: names, fields and shapes, checked when read, written aside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfbyte.errors import CheckpointError
from halfbyte.fingerprint import fingerprint
from halfbyte.tokenizer.folder import read_json

if TYPE_CHECKING:
    from halfbyte.lora import LoraConfig, LoRALinear

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "halfbyte_base.json"
PREFIX = "base_model.model."
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


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of adapter_config.json. Raises CheckpointError for all but plain LoRA."""
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


def read_tensors(folder: Path) -> dict[str, Tensor]:
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
    plain = {plain_name(name): value for name, value in tensors.items()}
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


def plain_name(name: str) -> str:
    """A tensor's or parameter's name in the model without its adapter."""
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
    rank = pattern_value(fields.get("rank_pattern"), name, fields["r"])
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


def pattern_value(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: a regular expression or suffix of the path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def check_others(
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
    own = next((p for other, p in parameters if plain_name(other) == name), None)
    return own is not None and own.shape == value.shape and torch.equal(own, value.to(own))


def base_difference(
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


def config_fields(
    config: LoraConfig, layers: Mapping[str, LoRALinear], targets: list[str], base_name: str | None
) -> dict[str, Any]:
    """The minimal adapter_config.json: older PEFT versions refuse keys they do not know."""
    ranks = {n: m.r for n, m in layers.items() if m.r != config.r}
    alphas = {n: m.lora_alpha for n, m in layers.items() if m.lora_alpha != config.lora_alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "target_modules": targets,
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


def write_files(
    folder: Path,
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    base_record: Mapping[str, Any] | None,
) -> None:
    """Write the adapter's weights (fp32) and config, and beside them which base it belongs to."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    # Its save_file would leave the file to its owner alone.
    weights = save(
        {name: value.float().cpu().contiguous() for name, value in tensors.items()},
        metadata={"format": "pt"},
    )
    _write_aside(folder / WEIGHTS_FILE, lambda path: path.write_bytes(weights))
    _write_json(folder / CONFIG_FILE, fields)
    if base_record is not None:
        _write_json(folder / BASE_FILE, base_record)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    text = json.dumps(dict(fields), indent=2, sort_keys=True)
    _write_aside(path, lambda path: path.write_text(text + "\n"))


def _write_aside(path: Path, write) -> None:
    """A crash leaves the old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
