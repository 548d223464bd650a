"""A Decoder -> a Hugging Face folder that transformers + bitsandbytes load."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.bnb import new_quantization_config
from halfbyte.checkpoint.folder import INDEX, SINGLE
from halfbyte.checkpoint.layout import linear_layers
from halfbyte.checkpoint.loading import Settings, checked_device, load_source, open_source
from halfbyte.errors import CheckpointError
from halfbyte.fingerprint import stored_state
from halfbyte.linear import Linear4bit
from halfbyte.models import Decoder
from halfbyte.ops.quant_state import FILE_QUANT_TYPES

MAX_SHARD_BYTES = 5_000_000_000


def save(
    model: Decoder,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` as a Hugging Face folder, 4-bit layers in bitsandbytes' format.

    Weights go to model.safetensors, or to shards of at most `max_shard_bytes` with an index, one
    shard in host memory at a time; beside them config.json, generation_config.json and the
    tokenizer's files. The folder is written aside and renamed, so it is there whole or not at
    all. `overwrite` replaces an existing model folder with everything in it.

    Raises FileExistsError when `folder` holds something, CheckpointError for int4 layers, which
    no file format has, ValueError when the model carries an adapter.
    """
    target = Path(folder).expanduser().resolve()
    _check_target(target, overwrite)
    if hasattr(model, "lora_config"):
        raise ValueError(
            "save: expected a plain model, got one that carries an adapter. "
            "Hint: save the adapter with lora.save_adapter, or lora.merge it first"
        )
    tensors, config = _file_tensors(model), _file_config(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        _write_json(aside / "config.json", config)
        if model.generation_config:
            _write_json(aside / "generation_config.json", model.generation_config)
        if model.tokenizer is not None:
            model.tokenizer.save(aside)
        _write_weights(aside, tensors, max_shard_bytes)
        _sync(aside)
        _move(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def quantize(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant_type: str | None = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    blocksize: int = 64,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """`load` from `src`, `save` to `out`; returns the folder written.

    quant_type: "nf4" or "fp4"; None writes the weights in `dtype`.
    Raises as these two do, and CheckpointError when `src` is quantized already.
    """
    if quant_type is not None and quant_type not in FILE_QUANT_TYPES:
        raise ValueError(
            f"quantize: quant_type: expected {FILE_QUANT_TYPES} or None, got {quant_type!r}"
        )
    settings = Settings(quant_type, double_quant, dtype, blocksize)
    device = checked_device(device)
    target = Path(out).expanduser().resolve()
    _check_target(target, overwrite)
    source = open_source(src)
    if quant_type is not None and source.config.get("quantization_config"):
        raise CheckpointError(
            f"{src}: expected unquantized weights, got a quantization_config in config.json. "
            "Hint: quantize from the original weights"
        )
    save(load_source(source, settings, device, progress), target, overwrite)
    return target


def _file_tensors(model: Decoder) -> dict[str, Tensor]:
    """Everything that goes to disk by its name there, in module order; nothing is copied."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                tensors[f"{path}.{leaf}"] = parameter.detach()
        if isinstance(module, Linear4bit):
            tensors |= stored_state(module, path).as_tensors(f"{path}.weight")
    return tensors


def _file_config(model: Decoder) -> dict[str, Any]:
    """config.json, with renamed fields in transformers 4's spelling and in 5's."""
    config = dict(model.config.raw)
    stored = config.pop("quantization_config", None)
    embedding = model.model.embed_tokens.weight
    config["dtype"] = config["torch_dtype"] = str(embedding.dtype).removeprefix("torch.")
    # Training or merging may have untied them.
    config["tie_word_embeddings"] = model.lm_head.weight is embedding
    if any(isinstance(module, Linear4bit) for module in model.modules()):
        config["quantization_config"] = _quantization_config(model, stored, config["dtype"])
    return config | _both_rope_spellings(config)


def _quantization_config(
    model: Decoder, stored: dict[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """The settings the model came with, or those transformers would have written."""
    if stored is not None:
        return stored | {"bnb_4bit_quant_storage": "uint8"}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    kinds = {(layer.quant_type, layer.double_quant) for layer in layers.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"save: expected one quantization for all layers, got {kinds}")
    quant_type, double_quant = kinds.pop()
    config = new_quantization_config(quant_type, double_quant, dtype)
    if plain := sorted(linear_layers(model) - set(layers)):
        config["llm_int8_skip_modules"] = [*plain, "lm_head"]
    return config


def _both_rope_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, and `rope_theta` with `rope_scaling`, from whichever are there."""
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    theta = rope.pop("rope_theta", None) or config.get("rope_theta", 10000.0)
    kind = rope.pop("type", "default")
    rope = {"rope_type": kind, **rope}
    return {
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": {"rope_theta": theta, **rope},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards = _shards(tensors, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        on_host = {key: tensors[key].cpu().contiguous() for key in shard}
        save_file(on_host, folder / name, metadata={"format": "pt"})
        # safetensors leaves the file to its owner alone; the other files follow the umask.
        shutil.copymode(folder / "config.json", folder / name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _shards(tensors: dict[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next tensor would make a shard too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder to write, got a file of that name")
    if not overwrite:
        raise FileExistsError(
            f"{target}: expected no folder or an empty one, got files in it. "
            "Hint: choose another folder, or pass overwrite"
        )
    if not (target / "config.json").exists():
        raise FileExistsError(
            f"{target}: expected a model folder to overwrite, got one without config.json, "
            "which is left alone. Hint: choose another folder"
        )


def _sync(folder: Path) -> None:
    """Contents must be on disk before the rename that makes them visible."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move(aside: Path, target: Path) -> None:
    if not target.exists():
        aside.rename(target)
        return
    # A rename cannot replace a folder that holds files, so the old one steps aside first.
    old = aside.with_suffix(".old")
    target.rename(old)
    aside.rename(target)
    shutil.rmtree(old)
