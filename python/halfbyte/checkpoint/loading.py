"""Build a Decoder from a source: check every header first, then stream the tensors once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfbyte import _core
from halfbyte.checkpoint.bnb import companion_of, quantization_config
from halfbyte.checkpoint.folder import PICKLE_HINT, PICKLES, Folder
from halfbyte.checkpoint.gguf import GGUF
from halfbyte.checkpoint.header import TORCH_DTYPES
from halfbyte.checkpoint.hub import HUB_ID, download, download_config
from halfbyte.checkpoint.layout import EMBEDDING, HEAD, linear_layers, plan
from halfbyte.checkpoint.source import Source, Staging, StoredTensor
from halfbyte.errors import CheckpointError, UnsupportedModelError
from halfbyte.linear import Linear4bit
from halfbyte.models import Decoder, DecoderConfig
from halfbyte.ops import QuantState, dequantize_4bit
from halfbyte.ops.quant_state import BLOCKSIZES, QUANT_TYPES
from halfbyte.tokenizer.folder import read_json

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `load` that decide what a weight becomes."""

    quant_type: str | None
    double_quant: bool
    dtype: torch.dtype
    blocksize: int

    def __post_init__(self) -> None:
        _check_choice("quant_type", self.quant_type, (*QUANT_TYPES, None))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("blocksize", self.blocksize, BLOCKSIZES)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"load: {name}: expected one of {choices}, got {value!r}")


def load(
    path: str | os.PathLike[str],
    quant_type: str | None = "nf4",
    double_quant: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    blocksize: int = 64,
    progress: bool = True,
) -> Decoder:
    """Load a model from a folder, a .gguf file or a hub id, quantizing it on the way.

    Weights are cast to `dtype` (bf16, fp16 or fp32) and every linear layer but lm_head is then
    quantized to `quant_type` ("nf4", "fp4", "int4"; None keeps all weights in `dtype`). A folder
    that is already in bitsandbytes' 4-bit format keeps its own bytes, whatever `double_quant` and
    `blocksize` say; with quant_type=None it is dequantized. `device` defaults to CUDA where it
    works. `progress` draws a bar on stderr. Parameters come frozen and the model in eval mode,
    with `tokenizer`, `generation_config` and `source` set.

    Tensors are visited once, in file order: peak memory on the device is the finished model and
    one tensor in `dtype`; on the host, what stays there, that tensor and a 16 MiB buffer.

    Raises CheckpointError for damaged, missing, surplus or mismatched files and tensors,
    UnsupportedModelError for an unknown architecture, FileNotFoundError for a path or id that
    does not exist, ConnectionError when the hub cannot be reached, ValueError for an argument.
    """
    settings = Settings(quant_type, double_quant, dtype, blocksize)
    device = checked_device(device)
    model = load_source(open_source(path), settings, device, progress)
    model.source = os.fspath(path)
    return model


def load_source(
    source: Source, settings: Settings, device: torch.device, progress: bool
) -> Decoder:
    """`load` for a source that is open already; `source.location` is the model's source."""
    filling = _Filling(source, settings, device)
    # Before the weights, so that what is wrong with it is said before they have been read.
    tokenizer = source.tokenizer()
    model = filling.run(progress)
    model.tokenizer = tokenizer
    model.generation_config = source.generation_config
    model.source = source.location
    return model.eval()


def default_device() -> torch.device:
    """CUDA where torch and halfbyte's kernels both have it, else the CPU.

    Warns, with the reason, when torch sees a GPU that halfbyte's kernels cannot use.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    status = _core.cuda_status()
    if status != "ok":
        warnings.warn(f"halfbyte uses the CPU although torch has CUDA: {status}", stacklevel=3)
        return torch.device("cpu")
    return torch.device("cuda")


def checked_device(device: torch.device | str | None) -> torch.device:
    """The device that was asked for, or the default one.

    Raises ValueError for a device that is not there, CudaError if CUDA cannot be used.
    """
    if device is None:
        return default_device()
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device: expected cpu or cuda, got {device}. Hint: cuda:1 is the second GPU"
        )
    if found.type == "cpu":
        return found
    status = _core.cuda_status()
    if status == "ok" and not torch.cuda.is_available():
        status = "torch finds no GPU"
    if status != "ok":
        raise _core.CudaError(f"device {found}: {status}. Hint: see `halfbyte doctor`")
    if (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: expected one of {torch.cuda.device_count()} GPUs, got {found}")
    return found


def open_source(path: str | os.PathLike[str]) -> Source:
    """The model at a local folder or .gguf file, or of a hub id, which is downloaded.

    Raises as `load` does.
    """
    text = os.fspath(path)
    local = Path(text).expanduser()
    if local.is_dir():
        return Folder(local)
    if local.is_file():
        return _open_file(local)
    if (
        isinstance(path, str)
        and HUB_ID.fullmatch(text)
        and local.suffix.lower() not in FILE_SUFFIXES
    ):
        return Folder(download(text))
    raise FileNotFoundError(
        f"{text}: expected a model folder, a .gguf file or a hub id such as 'owner/name', "
        "got a path where there is nothing"
    )


def read_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """The config of a model that `load` takes, without its weights: they need not be there.

    path: also a config.json itself. Raises as `load` does.
    """
    text = os.fspath(path)
    local = Path(text).expanduser()
    if local.is_file() and local.suffix == ".json":
        return DecoderConfig.from_dict(read_json(local))
    if local.is_dir() and (local / "config.json").exists():
        return DecoderConfig.from_dict(read_json(local / "config.json"))
    if not local.exists() and HUB_ID.fullmatch(text) and local.suffix not in FILE_SUFFIXES:
        return DecoderConfig.from_dict(read_json(download_config(text)))
    return DecoderConfig.from_dict(open_source(path).config)


FILE_SUFFIXES = (".gguf", ".safetensors", *PICKLES)


def _open_file(path: Path) -> Source:
    if path.suffix.lower() == ".gguf":
        return GGUF(path)
    hint = "Hint: pass the folder that holds config.json and the weights"
    raise CheckpointError(
        f"{path}: expected a model folder or a .gguf file, got a {path.suffix or 'nameless'} file. "
        f"{PICKLE_HINT if path.suffix in PICKLES else hint}"
    )


class _Filling:
    """One pass over a source's tensors into an empty Decoder."""

    def __init__(self, source: Source, settings: Settings, device: torch.device) -> None:
        self.source, self.settings, self.device = source, settings, device
        stored = quantization_config(source.config, source.location)
        _check_stored_type(source, stored, settings)
        # Old folders carry the rotary frequencies, which follow from the config.
        self.tensors = [t for t in source.tensors if ".rotary_emb." not in t.name]
        self.model = _empty_decoder(source)
        self.layout = plan(source, self.tensors, self.model, stored)
        self.tied = self.model.config.tie_word_embeddings
        self.four_bit = self._swap_linears(stored)
        self.waiting: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self.staging = Staging(device)

    def _swap_linears(self, stored: dict[str, Any] | None) -> set[str]:
        """Put empty 4-bit layers in place; returns the names of their weights."""
        quant_type = self.settings.quant_type
        if quant_type is None:
            return set()
        weights = set(self.layout.packed)
        if stored is None:
            weights = {f"{name}.weight" for name in linear_layers(self.model)}
        for weight in weights:
            path = weight.removesuffix(".weight")
            parent, _, leaf = path.rpartition(".")
            linear = cast(nn.Linear, self.model.get_submodule(path))
            layer = _linear_4bit(linear, quant_type, self.settings)
            setattr(self.model.get_submodule(parent), leaf, layer)
        return weights

    def run(self, progress: bool) -> Decoder:
        total = sum(tensor.nbytes for tensor in self.tensors)
        label = f"loading {Path(self.source.location).name}"
        with _progress_bar(label, total, progress) as advance:
            for tensor in self.tensors:
                if tensor.name in self.layout.floats:
                    self._place(tensor)
                else:
                    self._place_part(tensor)
                advance(tensor.nbytes)
        self.model.tie_weights()
        return self.model

    def _place(self, tensor: StoredTensor) -> None:
        value = self.source.read(tensor, self.settings.dtype, self.device, self.staging)
        _check_finite(f"{tensor.file}: tensor {tensor.name}", value)
        if tensor.name in self.four_bit:
            self._linear(tensor.name).quantize_(value, name=tensor.name)
        elif self.tied and tensor.name in (HEAD, EMBEDDING):
            self._place_tied(tensor, value)
        else:
            self._assign(tensor.name, value)

    def _place_tied(self, tensor: StoredTensor, value: Tensor) -> None:
        """A tied pair may be stored twice, but only as equals."""
        current = self.model.model.embed_tokens.weight
        if current.is_meta:
            self._assign(EMBEDDING, value)
        elif not torch.equal(current, value):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name}: expected {HEAD} equal to {EMBEDDING}, which "
                "config.json ties, got other values. Hint: set tie_word_embeddings to false"
            )

    def _place_part(self, tensor: StoredTensor) -> None:
        """Keep one tensor of a 4-bit layer until all have come; they may lie in several shards."""
        weight = companion_of(tensor.name) or tensor.name
        if weight == tensor.name:
            # The packed bytes may be stored under a float dtype; they are bytes all the same.
            tensor = dataclasses.replace(tensor, dtype="U8", shape=(tensor.nbytes, 1))
        dtype = TORCH_DTYPES[tensor.dtype]
        parts = self.waiting[weight]
        parts[tensor.name] = self.source.read(tensor, dtype, self.device, self.staging)
        if len(parts) == len(self.layout.parts[weight]):
            self._place_4bit(weight, self.waiting.pop(weight))

    def _place_4bit(self, weight: str, parts: dict[str, Tensor]) -> None:
        packed = parts.pop(weight)
        state = self._state(weight, parts)
        if weight in self.four_bit:
            self._linear(weight).set_quantized(packed, state)
        else:
            self._assign(weight, dequantize_4bit(packed, state, self.settings.dtype))

    def _state(self, weight: str, parts: dict[str, Tensor]) -> QuantState:
        where = self.source.location
        try:
            state = QuantState.from_tensors(weight, parts)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: tensor {error}") from None
        shape = self.layout.packed[weight]
        if state.shape != shape:
            raise CheckpointError(
                f"{where}: tensor {weight}: expected shape {list(shape)} by the config, "
                f"got {list(state.shape)} in its quant_state"
            )
        if state.nested is None:
            _check_scales(f"{where}: tensor {weight}.absmax", state.absmax)
        else:
            _check_scales(f"{where}: tensor {weight}.nested_absmax", state.nested.absmax)
            _check_map(f"{where}: tensor {weight}.nested_quant_map", state.nested.map)
        return state

    def _linear(self, weight: str) -> Linear4bit:
        return cast(Linear4bit, self.model.get_submodule(weight.removesuffix(".weight")))

    def _assign(self, name: str, value: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(value, requires_grad=False)
        setattr(self.model.get_submodule(module), leaf, parameter)


def _empty_decoder(source: Source) -> Decoder:
    """The decoder of the source's config, with parameters that hold no memory."""
    try:
        config = DecoderConfig.from_dict(source.config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{source.location}: {error}") from None
    with torch.device("meta"):
        return Decoder(config)


def _linear_4bit(linear: nn.Linear, quant_type: str, settings: Settings) -> Linear4bit:
    return Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_type=quant_type,
        blocksize=settings.blocksize,
        double_quant=settings.double_quant,
        device="meta",
        dtype=settings.dtype,
    )


def _check_stored_type(source: Source, stored: dict[str, Any] | None, settings: Settings) -> None:
    """The default "nf4" takes a quantized folder as it is; another type is a wish it breaks."""
    if stored is None or settings.quant_type in (None, "nf4"):
        return
    got = stored.get("bnb_4bit_quant_type", "fp4")
    if settings.quant_type != got:
        raise ValueError(
            f"{source.location}: quant_type: expected {settings.quant_type!r}, got a folder that "
            f"is quantized to {got!r} already. Hint: quantize from the original weights"
        )


def _check_finite(where: str, value: Tensor) -> None:
    # aminmax passes NaN on and needs no second tensor, unlike isfinite.
    if value.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(value)):
        raise CheckpointError(
            f"{where}: expected finite values, got NaN or Inf as {value.dtype}. "
            "Hint: the weights are damaged, or overflow this dtype"
        )


def _check_scales(where: str, scales: Tensor) -> None:
    _check_finite(where, scales)
    if scales.numel() and scales.min() < 0:
        raise CheckpointError(f"{where}: expected scales of 0 or more, got {scales.min():g}")


def _check_map(where: str, codebook: Tensor) -> None:
    _check_finite(where, codebook)
    if not (codebook.diff() > 0).all():
        raise CheckpointError(f"{where}: expected {len(codebook)} ascending values, got others")


@contextlib.contextmanager
def _progress_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes on a terminal's stderr; yields the function that advances it."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    disable = not (shown and console.is_terminal)
    with progress.Progress(*columns, console=console, disable=disable) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)
