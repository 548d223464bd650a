"""What every kind of model file gives: a config, and tensors that are read piece by piece."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import CheckpointError
from halfbyte.tokenizer import Tokenizer

PIECE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file's header describes it.

    name: the Hugging Face parameter name. dtype: in the file's own spelling ("BF16", "Q4_K").
    offset, nbytes: where its bytes lie in `file`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def describe(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Source(ABC):
    """A model on disk.

    location: the folder or file, for messages. config, generation_config: as in the Hugging Face
    json files. tensors: in file order. float_dtypes: the stored dtypes that hold weights.
    """

    location: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: list[StoredTensor]
    float_dtypes: tuple[str, ...]

    @abstractmethod
    def pieces(self, tensor: StoredTensor, staging: Tensor) -> Iterator[Tensor]:
        """Successive flat parts of `tensor` on the CPU, each valid until the next is asked for."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if the source has none."""

    def read(
        self, tensor: StoredTensor, dtype: torch.dtype, device: torch.device, staging: Tensor
    ) -> Tensor:
        """`tensor` cast to `dtype` on `device`; beside it only `staging` is held on the host."""
        out = torch.empty(tensor.shape, dtype=dtype, device=device)
        flat, start = out.view(-1), 0
        for piece in self.pieces(tensor, staging):
            flat[start : start + piece.numel()].copy_(piece)
            start += piece.numel()
        return out


def new_staging(device: torch.device) -> Tensor:
    """A host buffer that tensors pass through; pinned for CUDA, which copies from it directly."""
    return torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")


def read_bytes(tensor: StoredTensor, staging: Tensor, unit: int) -> Iterator[Tensor]:
    """The bytes of `tensor` in file order, as uint8 views of `staging` of whole `unit`s.

    Raises CheckpointError when the file ends too early.
    """
    view = staging.numpy().data
    step = len(view) // unit * unit
    done = 0
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        while done < tensor.nbytes:
            want = min(step, tensor.nbytes - done)
            got = file.readinto(view[:want])
            if got != want:
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name}: expected {tensor.nbytes} bytes, "
                    f"got {done + got} before the end of the file. Hint: the file is truncated, "
                    "download it again"
                )
            yield staging[:want]
            done += want
