"""Several LoRA adapters over one base, unmerged, chosen for each row of a batch."""

from __future__ import annotations

import itertools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfbyte import lora, peft
from halfbyte.errors import AdapterNotFoundError, CheckpointError
from halfbyte.fingerprint import fingerprint
from halfbyte.models import Decoder
from halfbyte.ops.gemv_4bit_fused import LowRank


@dataclass(eq=False)
class Adapter:
    """One loading of one adapter. warning: how its base was another than the model. users: requests
    that were given it and have not ended."""

    name: str
    folder: str
    layers: dict[str, LowRank] = field(repr=False)
    warning: str | None = None
    generation: int = field(default_factory=itertools.count(1).__next__)
    users: int = 0


class Layout(NamedTuple):
    """For each hidden value of a layer, the place of its adapter and its scaling."""

    key: tuple[tuple[int, float], ...]
    places: Tensor
    scalings: Tensor

    @classmethod
    def of(cls, adapters: list[tuple[int, LowRank]]) -> Layout:
        key = tuple((place, share.scaling) for place, share in adapters for _ in share.a)
        device = adapters[0][1].a.device
        places, scalings = zip(*key, strict=True)
        return cls(
            key,
            torch.tensor(places, device=device),
            torch.tensor(scalings, dtype=torch.float32, device=device),
        )


@dataclass
class Selection:
    """What the adapted layers apply in the forward that runs now: nothing where columns is None.

    columns: fp32 [B, 1, adapters], 1 where a row uses the adapter of that place, else 0.
    """

    columns: Tensor | None = None
    _factors: dict[tuple, Tensor] = field(default_factory=dict)

    def choose(self, columns: Tensor | None) -> None:
        self.columns = columns
        self._factors.clear()

    def factors(self, layout: Layout) -> Tensor:
        """fp32 [B, 1, r] for hidden values of a layout; layers of one layout share them."""
        assert self.columns is not None
        if layout.key not in self._factors:
            self._factors[layout.key] = self.columns[..., layout.places] * layout.scalings
        return self._factors[layout.key]


class AdaptedLinear(nn.Module):
    """y = base(x) + scaling * B(A(x)) with each row's own A and B, as LoRALinear rounds it.

    All adapters' matrices lie side by side; a row's hidden values of the others are set to zero.
    """

    def __init__(self, base_layer: nn.Linear, selection: Selection) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.stacked: tuple[Tensor, Tensor, Layout] | None = None

    def set(self, adapters: list[tuple[int, LowRank]]) -> None:
        """Apply these, each with its place among all adapters."""
        self.stacked = None
        if not adapters:
            return
        a = torch.cat([share.a for _, share in adapters])
        b = torch.cat([share.b for _, share in adapters], 1)
        self.stacked = (a, b, Layout.of(adapters))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, in_features], or [B, in_features] of last tokens -> [..., out_features]."""
        return self.adapt(x, self.base_layer(x))

    def low_rank(self, rows: int) -> LowRank | None:
        """The rows' own adapters as products of a few rows take them."""
        if self.selection.columns is None or self.stacked is None:
            return None
        a, b, layout = self.stacked
        factors = self.selection.factors(layout)[:, 0].expand(rows, -1).contiguous()
        return LowRank(a, b, factors, 1.0)

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """y = base(x) with each row's own adapter added."""
        if self.selection.columns is None or self.stacked is None:
            return y
        a, b, layout = self.stacked
        factors = self.selection.factors(layout)
        if x.dim() == 2:
            # The head's rows may be padded.
            factors = F.pad(factors[:, 0], (0, 0, 0, len(x) - len(factors)))
        hidden = (F.linear(x, a.to(x.dtype)) * factors).to(x.dtype)
        return lora.add_product(y, hidden, b)


class Adapters:
    """The adapters that an engine can use, and which one each row of its decode step uses.

    The model's linear layers that some adapter changes are wrapped, in place, until `close`.
    """

    def __init__(self, model: Decoder, rows: int) -> None:
        self.model = model
        self.by_name: dict[str, Adapter] = {}
        self.selection = Selection()
        self._places: list[Adapter] = []
        self._of_row: list[Adapter | None] = [None] * rows
        self._layers: dict[str, AdaptedLinear] = {}
        self._columns: Tensor | None = None
        self._only: Tensor | None = None
        self._base_record: dict | None = None
        # Between a request that names an adapter and an adapter that loses its name.
        self._lock = threading.Lock()

    def acquire(self, name: str) -> Adapter:
        """The adapter of this name, with one user more. Raises AdapterNotFoundError."""
        with self._lock:
            adapter = self._find(name)
            adapter.users += 1
            return adapter

    def _find(self, name: str) -> Adapter:
        if name not in self.by_name:
            known = ", ".join(sorted(self.by_name)) or "none"
            raise AdapterNotFoundError(f"{name}: no such adapter is loaded; there is: {known}")
        return self.by_name[name]

    def read(self, name: str, folder: str | os.PathLike[str]) -> Adapter:
        """Read an adapter that PEFT or halfbyte saved, and check that it fits.

        Raises CheckpointError naming what does not; warns where the base was another.
        """
        if hasattr(self.model, "lora_config"):
            raise ValueError(
                "adapters: expected a base model without an adapter of its own. Hint: load the "
                "base again, or leave out `adapters` to use the one that it carries"
            )
        folder = Path(folder).expanduser()
        fields, tensors = peft.read_config(folder), peft.read_tensors(folder)
        for key in sorted(tensors):
            if "lora_" not in key and not peft.repeats(self.model, key, tensors[key]):
                raise CheckpointError(
                    f"{folder}: {key}: only LoRA matrices can be served beside other adapters. "
                    "Hint: lora.load_adapter takes biases and modules_to_save, one adapter a model"
                )
        ranks = peft.layers_of(self.model, tensors, fields, folder)
        layers = {name: self._share(folder, name, fields, tensors) for name in ranks}
        # Before the first wrapping, as a fingerprint names the model's layers.
        self._base_record = self._base_record or fingerprint(self.model)
        warning = peft.base_difference(folder, self.model, self._base_record)
        if warning is not None:
            warnings.warn(warning, stacklevel=3)
        return Adapter(name, str(folder), layers, warning)

    def _share(self, folder: Path, name: str, fields: dict, tensors: dict[str, Tensor]) -> LowRank:
        a, b = (tensors[f"{name}.{kind}.weight"] for kind in ("lora_A", "lora_B"))
        rank = len(a)
        alpha = peft.pattern_value(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8))
        divisor = rank**0.5 if fields.get("use_rslora") else rank
        weight = self.model.model.embed_tokens.weight
        a, b = (x.to(weight.dtype) for x in (a, b))
        if not (a.isfinite().all() and b.isfinite().all()):
            # Zero times NaN is NaN: rows of other adapters would have it, too.
            raise CheckpointError(f"{folder}: {name}: expected finite numbers in {weight.dtype}")
        a, b = (x.to(weight.device) for x in (a, b))
        return LowRank(a, b, None, alpha / divisor)

    def add(self, adapter: Adapter) -> None:
        """Let requests name this adapter; one of the same name goes on for those that use it.

        `arrange` has to follow, as it has after `remove` and after a `release` that says so.
        """
        self.by_name[adapter.name] = adapter

    def remove(self, name: str) -> None:
        """Let no more requests name it. Raises AdapterNotFoundError."""
        with self._lock:
            del self.by_name[self._find(name).name]

    def release(self, adapter: Adapter) -> bool:
        """Count one user less; whether that was the last one of an adapter that has no name now."""
        with self._lock:
            adapter.users -= 1
            return adapter.users == 0 and self.by_name.get(adapter.name) is not adapter

    def arrange(self) -> None:
        """Give each adapter that has a name or a user its columns in all layers; forget others."""
        with self._lock:
            named = set(self.by_name.values())
            held = [a for a in self._places if a not in named and a.users > 0]
        self._places = held + sorted(named, key=lambda adapter: adapter.generation)
        for name in sorted({name for adapter in self._places for name in adapter.layers}):
            if name not in self._layers:
                linear = self.model.get_submodule(name)
                adapted = AdaptedLinear(linear, self.selection).train(linear.training)
                self._layers[name] = adapted
                _replace(self.model, name, self._layers[name])
        for name, layer in self._layers.items():
            shares = enumerate(adapter.layers.get(name) for adapter in self._places)
            layer.set([(place, share) for place, share in shares if share is not None])
        device = self.model.model.embed_tokens.weight.device
        size = len(self._of_row), 1, len(self._places)
        self._columns = torch.zeros(size, dtype=torch.float32, device=device)
        self._only = torch.zeros_like(self._columns[:1])
        for row, adapter in enumerate(self._of_row):
            if adapter is not None:
                self._columns[row, 0, self._places.index(adapter)] = 1

    def use(self, row: int, adapter: Adapter | None) -> None:
        """Let a row of the decode step use an adapter."""
        self._of_row[row] = adapter
        if self._columns is not None:
            self._columns[row].zero_()
            if adapter is not None:
                self._columns[row, 0, self._places.index(adapter)] = 1

    def move(self, source: int, target: int) -> None:
        self.use(target, self._of_row[source])

    @contextmanager
    def rows(self, part: slice, adapted: bool) -> Iterator[None]:
        """The adapters of these rows, or none, in the forward inside."""
        columns = self._columns[part] if adapted and self._columns is not None else None
        with self._selected(columns):
            yield

    @contextmanager
    def only(self, adapter: Adapter | None) -> Iterator[None]:
        """One adapter for every row of the forward inside, which may be captured."""
        columns = None
        if adapter is not None and self._only is not None:
            columns = self._only.zero_()
            columns[..., self._places.index(adapter)] = 1
        with self._selected(columns):
            yield

    @contextmanager
    def _selected(self, columns: Tensor | None) -> Iterator[None]:
        self.selection.choose(columns)
        try:
            yield
        finally:
            self.selection.choose(None)

    def close(self) -> None:
        """Give the model its own layers back."""
        for name, layer in self._layers.items():
            _replace(self.model, name, layer.base_layer)
        self._layers.clear()


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
