"""A Decoder -> a Hugging Face folder that transformers + bitsandbytes load."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.bnb import is_skipped, new_quantization_config
from halfbyte.checkpoint.folder import INDEX, SINGLE
from halfbyte.checkpoint.layout import HEAD, linear_layers
from halfbyte.checkpoint.loading import Settings, checked_device, load_source, open_source
from halfbyte.errors import CheckpointError
from halfbyte.fingerprint import stored_state
from halfbyte.linear import Linear4bit
from halfbyte.lora import check_own_layers
from halfbyte.models import Decoder
from halfbyte.ops.quant_state import FILE_QUANT_TYPES
from halfbyte.tokenizer.folder import read_json

MAX_SHARD_BYTES = 5_000_000_000
# What we and transformers write into a model folder; `overwrite` deletes nothing else.
MODEL_FILES = re.compile(
    r"(generation_)?config\.json|.*\.safetensors(\.index\.json)?|tokenizer\.(json|model)"
    r"|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|chat_template\.(jinja|json)"
)
TEMPLATES = "additional_chat_templates"
# Settings that follow from the layers, whatever the model came with.
OF_THE_LAYERS = (
    "quant_method",
    "bnb_4bit_quant_storage",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
)


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
    all; an empty folder that exists is filled, config.json last. `overwrite` replaces an existing
    model folder, but never one that holds anything else.

    Raises FileExistsError when `folder` holds something, OSError when it cannot be written,
    CheckpointError for int4 layers, which no file format has, ValueError when the model carries
    an adapter.
    """
    # Names within what torch.compile returns are others.
    model = getattr(model, "_orig_mod", model)
    target = Path(folder).expanduser().resolve()
    with _aside(target, overwrite, model.source) as aside:
        _write(model, aside, max_shard_bytes)


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
    # Made first, so that a place that cannot be written is found before the work.
    with _aside(target, overwrite, src) as aside:
        source = open_source(src)
        if quant_type is not None and source.config.get("quantization_config"):
            raise CheckpointError(
                f"{src}: expected unquantized weights, got a quantization_config in config.json. "
                "Hint: quantize from the original weights"
            )
        _write(load_source(source, settings, device, progress), aside, MAX_SHARD_BYTES)
    return target


def _write(model: Decoder, folder: Path, max_shard_bytes: int) -> None:
    """All files of `model` into the empty `folder`."""
    if hasattr(model, "lora_config"):
        raise ValueError(
            "save: expected a plain model, got one that carries an adapter. "
            "Hint: save the adapter with lora.save_adapter, or lora.merge it first"
        )
    check_own_layers(model, "save")
    tensors = _file_tensors(model)
    _write_json(folder / "config.json", _file_config(model))
    if model.generation_config:
        _write_json(folder / "generation_config.json", model.generation_config)
    if model.tokenizer is not None:
        model.tokenizer.save(folder)
    _write_weights(folder, tensors, max_shard_bytes)


def _file_tensors(model: Decoder) -> dict[str, Tensor]:
    """Everything that goes to disk by its name there, in module order; nothing is copied."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False):
            tensors[f"{path}.{leaf}"] = parameter.detach()
        if isinstance(module, Linear4bit):
            tensors |= stored_state(module, path).as_tensors(f"{path}.weight")
    if _is_tied(model):
        del tensors[HEAD]
    return tensors


def _is_tied(model: Decoder) -> bool:
    """Whether the head is the embedding now; training or merging may have untied them."""
    return model.lm_head.weight is model.model.embed_tokens.weight


def _file_config(model: Decoder) -> dict[str, Any]:
    """config.json, with renamed fields in transformers 4's spelling and in 5's."""
    config = dict(model.config.raw)
    stored = config.pop("quantization_config", None)
    dtype = model.model.embed_tokens.weight.dtype
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["tie_word_embeddings"] = _is_tied(model)
    if any(isinstance(module, Linear4bit) for module in model.modules()):
        config["quantization_config"] = _quantization_config(model, stored, config["dtype"])
    return config | _both_rope_spellings(config)


def _quantization_config(
    model: Decoder, stored: dict[str, Any] | None, dtype: str
) -> dict[str, Any]:
    """The settings transformers would have written, or those the model came with, as it is now."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    kinds = {(layer.quant_type, layer.double_quant) for layer in layers.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"save: expected one quantization for all layers, got {kinds}")
    new = new_quantization_config(*kinds.pop(), dtype)
    config = new if stored is None else stored | {name: new[name] for name in OF_THE_LAYERS}
    plain = {*linear_layers(model), "lm_head"} - set(layers)
    if {name for name in (*linear_layers(model), "lm_head") if is_skipped(name, config)} != plain:
        config["llm_int8_skip_modules"] = [*sorted(plain - {"lm_head"}), *plain & {"lm_head"}]
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
    total = sum(tensor.nbytes for tensor in tensors.values())
    if shutil.disk_usage(folder).free < total:
        raise _no_space(folder, total)
    shards = _shards(tensors, max_shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, {key: tensors[key] for key in shard})
    if len(shards) > 1:
        files = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    import safetensors
    from safetensors.torch import save_file

    on_host: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.cpu().contiguous()
        # safetensors refuses tensors that share memory.
        storage = tensor.untyped_storage().data_ptr()
        on_host[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    try:
        save_file(on_host, path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        nbytes = sum(tensor.nbytes for tensor in on_host.values())
        raise _no_space(path, nbytes, f" ({error})") from error
    # safetensors leaves the file to its owner alone; the other files follow the umask.
    shutil.copymode(path.with_name("config.json"), path)


def _no_space(path: Path, nbytes: int, cause: str = "") -> OSError:
    free = shutil.disk_usage(path.parent).free
    return OSError(
        f"{path}: expected to write {nbytes / 1e9:.3f} GB, got {free / 1e9:.3f} GB of free space"
        f"{cause}. Hint: free some, or choose a folder on another disk"
    )


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


@contextlib.contextmanager
def _aside(target: Path, overwrite: bool, source: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to write into, which becomes `target` when the block ends well."""
    check_target(target, overwrite, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not beside an empty folder that exists: it may be a mount point, which nothing can replace.
    parent = target if _is_empty(target) else target.parent
    aside = parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    aside.mkdir()
    try:
        yield aside
        _sync(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _move(aside, target)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def check_target(target: Path, overwrite: bool, source: str | os.PathLike[str]) -> None:
    """Raise FileExistsError where `save` would, for whoever has much to do before it."""
    if not target.exists() or _is_empty(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: expected a folder to write, got a file of that name")
    if not overwrite:
        raise FileExistsError(
            f"{target}: expected no folder or an empty one, got files in it. "
            "Hint: choose another folder, or pass overwrite"
        )
    if os.path.ismount(target):
        raise FileExistsError(
            f"{target}: expected a folder that can be replaced, got a mount point with files in "
            "it. Hint: choose a folder inside it, or empty it"
        )
    if _holds(target, os.fspath(source)):
        raise FileExistsError(
            f"{target}: expected a folder to overwrite, got one that holds the model's source "
            f"{source}. Hint: choose another folder"
        )
    _check_model_folder(target)


def _holds(target: Path, source: str) -> bool:
    """Whether `source`, which may be a hub id or unknown, lies inside `target`."""
    path = Path(source).expanduser()
    return bool(source) and path.exists() and target in path.resolve().parents


def _check_model_folder(folder: Path) -> None:
    """`overwrite` deletes the folder, so it must hold a model and nothing beside it."""
    if not {"model_type", "architectures"} & read_json(folder / "config.json", missing={}).keys():
        raise FileExistsError(
            f"{folder}: expected a model folder to overwrite, got one without config.json, or with "
            "another program's, which is left alone. Hint: choose another folder"
        )
    for path in [*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]:
        if not _is_model_file(path, folder):
            raise FileExistsError(
                f"{folder}: expected only a model's files to overwrite, got "
                f"{path.relative_to(folder)}. Hint: move it away, or choose another folder"
            )


def _is_model_file(path: Path, folder: Path) -> bool:
    if path.parent.name == TEMPLATES and path.parent != folder:
        return path.is_file() and path.suffix == ".jinja"
    if path.name == TEMPLATES:
        return path.is_dir()
    return path.is_file() and bool(MODEL_FILES.fullmatch(path.name))


def _sync(folder: Path) -> None:
    """Contents must be on disk before the rename that makes them visible."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(aside: Path, target: Path) -> None:
    """Put the finished folder in its place; where that fails nothing is deleted."""
    old = aside.with_suffix(".old")
    try:
        if aside.parent == target:
            _empty_into(aside, target)
        else:
            _rename(aside, target, old)
    except OSError as error:
        raise OSError(
            f"{target}: expected to put the finished model there, got {error}. Hint: what was not "
            f"moved is in {aside}{f', the model before it in {old}' * old.exists()}; move it there"
        ) from error
    _sync_one(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _empty_into(aside: Path, target: Path) -> None:
    """A folder without config.json is no model yet, so that comes last."""
    for path in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
        path.rename(target / path.name)
    aside.rmdir()
    _sync_one(target)


def _rename(aside: Path, target: Path, old: Path) -> None:
    """A rename cannot replace a folder that holds files, so the one before steps to `old` first."""
    if target.exists():
        target.rename(old)
    try:
        aside.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
