"""A Hugging Face model folder: json files and safetensors shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.checkpoint.header import TORCH_DTYPES, read_header
from halfbyte.checkpoint.source import Source, Staging, StoredTensor
from halfbyte.errors import CheckpointError
from halfbyte.tokenizer import Tokenizer
from halfbyte.tokenizer.folder import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_HINT = (
    "Hint: pickled weights can run code and are never read; convert them with "
    "transformers' AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(OUT)"
)


class Folder(Source):
    """A local folder with config.json and model.safetensors, or its index and shards.

    Raises CheckpointError for anything missing, damaged or inconsistent in it.
    """

    float_dtypes = ("F32", "F16", "BF16")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = str(path)
        self.config = self._config()
        self.generation_config = read_json(path / "generation_config.json", missing={})
        self.tensors = _tensors(path)

    def _config(self) -> dict[str, Any]:
        path = self.path / "config.json"
        if path.exists():
            return read_json(path)
        raise CheckpointError(f"{self.path}: expected a config.json, got none. {self._hint()}")

    def _hint(self) -> str:
        if (self.path / "adapter_config.json").exists():
            return "Hint: this is an adapter; load its base model and pass this as the adapter"
        if any(file.suffix.lower() == ".gguf" for file in self.path.iterdir()):
            return "Hint: pass the .gguf file itself"
        return "Hint: pass the folder that holds config.json and the safetensors files"

    def pieces(self, tensor: StoredTensor, staging: Staging) -> Iterator[Tensor]:
        dtype = TORCH_DTYPES[tensor.dtype]
        for part in staging.read(tensor, dtype.itemsize):
            yield part.view(dtype)

    def tokenizer(self) -> Tokenizer | None:
        if (self.path / "tokenizer.json").exists():
            return Tokenizer.from_folder(self.path)
        if others := [name for name in OTHER_TOKENIZERS if (self.path / name).exists()]:
            warnings.warn(
                f"{self.path}: expected tokenizer.json, got {', '.join(others)}: the model has no "
                "tokenizer. Hint: AutoTokenizer.from_pretrained(SRC).save_pretrained(OUT) makes it",
                stacklevel=2,
            )
        return None


def _tensors(folder: Path) -> list[StoredTensor]:
    """All tensors of the folder, shard after shard, each in the order of its data."""
    # The single file wins over an index, as in transformers.
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise _no_weights(folder)
    weight_map = read_weight_map(folder / INDEX)
    tensors = []
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if not path.exists():
            lacking = sum(file == shard for file in weight_map.values())
            raise CheckpointError(
                f"{path}: expected a shard with {lacking} tensors by {INDEX}, got no such file. "
                "Hint: the download is incomplete"
            )
        tensors += read_header(path)
    _check_index(folder / INDEX, weight_map, tensors)
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard by the index; CheckpointError for anything but plain safetensors names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of name -> file, got {weight_map!r}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or not file.endswith("safetensors"):
            kind = PICKLE_HINT if str(file).endswith(PICKLES) else ""
            raise CheckpointError(
                f"{index}: tensor {name}: expected a safetensors file name, got {file!r}. {kind}"
            )
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], tensors: list[StoredTensor]) -> None:
    """Index and shards must tell the same story, both ways."""
    seen: dict[str, str] = {}
    for tensor in tensors:
        file = tensor.file.name
        if tensor.name in seen:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: expected once, got it in "
                f"{seen[tensor.name]} too"
            )
        if tensor.name not in weight_map:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: expected to be listed in {index.name}, "
                "got no entry"
            )
        seen[tensor.name] = file
    for name, file in weight_map.items():
        if seen.get(name) != file:
            raise CheckpointError(
                f"{index}: tensor {name}: expected in {file}, got "
                f"{'it in ' + seen[name] if name in seen else 'no such tensor'}"
            )


def _no_weights(folder: Path) -> CheckpointError:
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        return CheckpointError(
            f"{folder}: expected safetensors weights, got {', '.join(pickles[:3])}. {PICKLE_HINT}"
        )
    return CheckpointError(
        f"{folder}: expected {SINGLE} or {INDEX}, got {', '.join(files[:10]) or 'an empty folder'}."
        " Hint: the download is incomplete, or the model has other weights than safetensors"
    )
