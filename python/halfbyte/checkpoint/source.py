"""What every kind of model file gives: a config, and tensors that are read piece by piece."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte import _core
from halfbyte.errors import CheckpointError
from halfbyte.tokenizer import Tokenizer

PIECE_BYTES = 8 << 20


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
    def pieces(self, tensor: StoredTensor, staging: Staging) -> Iterator[Tensor]:
        """Successive flat parts of `tensor` on the CPU.

        Each is valid until the next is asked for, and for what was queued on the device by then.
        """

    @abstractmethod
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None if the source has none."""

    def read(
        self, tensor: StoredTensor, dtype: torch.dtype, device: torch.device, staging: Staging
    ) -> Tensor:
        """`tensor` cast to `dtype` on `device`; beside it only `staging` is held on the host."""
        out = torch.empty(tensor.shape, dtype=dtype, device=device)
        flat, start = out.view(-1), 0
        for piece in self.pieces(tensor, staging):
            # A copy that is not waited for casts on the device, which takes memory there.
            ahead = piece.is_pinned() and piece.dtype == dtype
            flat[start : start + piece.numel()].copy_(piece, non_blocking=ahead)
            start += piece.numel()
        return out


class Staging:
    """Two host buffers that tensors pass through in turn: one is filled while one is copied from.

    Pinned for CUDA, which copies from them directly.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._buffers = cycle(
            (
                torch.empty(PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=on_gpu),
                torch.cuda.Event() if on_gpu else None,
            )
            for _ in range(2)
        )

    def read(self, tensor: StoredTensor, unit: int, most: int = PIECE_BYTES) -> Iterator[Tensor]:
        """The bytes of `tensor` in file order, as uint8 [n] of whole `unit`s, n at most `most`.

        Each piece is valid as long as `Source.pieces` says.

        Raises CheckpointError when the file ends too early.
        """
        step = min(most, PIECE_BYTES) // unit * unit
        for done in range(0, tensor.nbytes, step):
            buffer, copied = next(self._buffers)
            if copied is not None:
                copied.synchronize()
            piece = buffer[: min(step, tensor.nbytes - done)]
            got = _core.read_file(tensor.file, tensor.offset + done, piece)
            if got != len(piece):
                raise CheckpointError(
                    f"{tensor.file}: tensor {tensor.name}: expected {tensor.nbytes} bytes, "
                    f"got {done + got} before the end of the file. Hint: the file is truncated, "
                    "download it again"
                )
            yield piece
            if copied is not None:
                copied.record(torch.cuda.current_stream(self._device))
