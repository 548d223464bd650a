"""Where every gigabyte of a fine-tuning run goes, from the model's config alone."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import nn

from halfbyte import _core
from halfbyte.errors import ContextLengthError
from halfbyte.models import Decoder, DecoderConfig
from halfbyte.ops.cross_entropy import chunk_rows

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
UNITS |= {f"{unit}i": 1 << (10 * (i + 1)) for i, unit in enumerate("kmgt")}
# The driver's context and the kernels' code, which torch does not count.
CONTEXT = 600_000_000
# What cuBLAS works in on current GPUs, for the forward's thread and for the backward's.
CUBLAS = 2 * (32 << 20)
STATE_BYTES = {"fp32": 8.0, "8bit": 2 + 8 / 256}


def parse_bytes(text: str) -> int:
    """ "24GB", "24g", "16 GiB" or a plain number of bytes. Raises ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if found is None or found[2] not in UNITS:
        raise ValueError(f"expected a size such as 24GB or 16GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class Setup:
    """What is to be trained how: the fields of TrainConfig that memory depends on."""

    seq: int
    batch: int = 1
    r: int = 64
    optim: str = "fp32"
    quant_type: str | None = "nf4"
    double_quant: bool = True
    blocksize: int = 64
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("seq", "batch", "r", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name}: expected at least 1, got {getattr(self, name)}")
        if self.optim not in STATE_BYTES:
            raise ValueError(f"plan: optim: expected fp32 or 8bit, got {self.optim!r}")

    @property
    def tokens(self) -> int:
        return self.seq * self.batch


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device at the highest point of a training step, in bf16, by what they are for.

    checkpoints: one activation a layer. recompute: what one layer holds in its backward, with its
    adapter in 16 bits. workspace: what comes and goes in it, above all a dequantized weight. The
    gradients grow while the checkpoints go, so that `peak` counts the larger of both.
    """

    base: int
    scales: int
    embeddings: int
    adapter: int
    gradients: int
    state: int
    checkpoints: int
    recompute: int
    logits: int
    workspace: int
    earlier_gradients: int = 0
    cublas: int = CUBLAS
    layers: int = 1

    @property
    def fixed(self) -> int:
        """What is there whatever the batch, without the optimizer's state."""
        model = self.base + self.scales + self.embeddings + self.adapter
        return model + self.earlier_gradients + self.cublas

    @property
    def activations(self) -> int:
        """Above what is fixed, at the highest point of forward and backward."""
        # The first layer is the last to be recomputed: its gradients alone are not there yet.
        last = self.checkpoints // self.layers + self.gradients - self.gradients // self.layers
        backward = max(self.checkpoints, last) + self.recompute
        return max(self.checkpoints + self.logits, backward) + self.workspace

    @property
    def peak(self) -> int:
        """As torch.cuda.max_memory_allocated counts it."""
        return self.fixed + self.state + self.activations

    def without_state(self) -> Footprint:
        return dataclasses.replace(self, state=0)

    def without_checkpoints(self, layers: int) -> Footprint:
        """Two layers' activations are on the device at a time: one in use, one on its way."""
        left = min(self.checkpoints, 2 * -(-self.checkpoints // layers))
        return dataclasses.replace(self, state=0, checkpoints=left)


@functools.cache
def _sizes(config: DecoderConfig) -> tuple[int, int, int, int]:
    """Elements of the linear layers' weights and of all others; the sum of the linear layers' in
    and out features; elements of their largest weight.
    """
    with torch.device("meta"):
        model = Decoder(config)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    numels = [linear.weight.numel() for linear in linears]
    others = sum(p.numel() for p in model.parameters()) - sum(numels)
    sides = sum(linear.in_features + linear.out_features for linear in linears)
    return sum(numels), others, sides, max(numels)


def footprint(config: DecoderConfig, setup: Setup) -> Footprint:
    """The device memory of training a LoRA of rank r on all linear layers, layers checkpointed."""
    weights, others, sides, largest = _sizes(config)
    lora = setup.r * sides
    quantized = setup.quant_type is not None
    tokens, hidden, inner = setup.tokens, config.hidden_size, config.intermediate_size
    chunk = min(tokens, chunk_rows(tokens, config.vocab_size, 2))
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    # Elements a token of a recomputed layer: both norms, their sum, the output's gradient;
    # rotated queries and keys, values, what was attended to; gate and up.
    kept = 4 * hidden + 2 * (q + kv) + 2 * inner
    # Beside them at most: the MLP's product and its gradient before the last weight; or its
    # product's gradient and theirs.
    weight = 2 * largest if quantized else 0
    row = 2 * tokens
    workspace = max(2 * row * inner + weight, 3 * row * inner)
    return Footprint(
        base=weights // 2 if quantized else 2 * weights,
        scales=_scales(weights, setup) if quantized else 0,
        embeddings=2 * others,
        adapter=4 * lora,
        gradients=4 * lora,
        state=math.ceil(STATE_BYTES[setup.optim] * lora),
        checkpoints=2 * tokens * hidden * config.num_hidden_layers,
        recompute=row * kept + 2 * lora // config.num_hidden_layers,
        # One chunk's, and the gradient of the hidden states that they come from.
        logits=2 * chunk * config.vocab_size + 2 * tokens * hidden,
        workspace=workspace,
        earlier_gradients=4 * lora if setup.gradient_accumulation_steps > 1 else 0,
        layers=config.num_hidden_layers,
    )


def _scales(weights: int, setup: Setup) -> int:
    blocks = weights / setup.blocksize
    return int(blocks * (1 + 4 / 256) if setup.double_quant else 4 * blocks)


@dataclass(frozen=True)
class Plan:
    """A footprint beside a device's memory, and what the pager would do about it.

    rungs: name -> peak after it, in the order in which they are taken. longest: rung -> most
    tokens a sequence at this batch size (0: none fits).
    """

    footprint: Footprint
    available: int
    rungs: dict[str, int]
    longest: dict[str, int]

    @property
    def needed(self) -> str | None:
        """The first rung that fits, None if none does."""
        return next((name for name, peak in self.rungs.items() if peak <= self.available), None)

    @property
    def host_bytes(self) -> int:
        """Host memory that the needed rung takes; state is always backed by it."""
        found = self.footprint.state
        if self.needed not in ("nothing paged", "state paged"):
            found += self.footprint.checkpoints
        return found


def plan(config: DecoderConfig, setup: Setup, gpu: int) -> Plan:
    """Whether and how a run fits into `gpu` bytes, before anything is loaded.

    Raises ContextLengthError for sequences that are longer than the model's context.
    """
    if setup.seq > config.max_position_embeddings:
        raise ContextLengthError(
            f"plan: seq: expected at most the model's context of {config.max_position_embeddings} "
            f"tokens (max_position_embeddings), got {setup.seq}"
        )

    def rungs(setup: Setup) -> dict[str, int]:
        found = footprint(config, setup)
        layers = config.num_hidden_layers
        row = footprint(config, dataclasses.replace(setup, batch=1)).without_checkpoints(layers)
        return {
            "nothing paged": found.peak,
            "state paged": found.without_state().peak,
            "activations offloaded": found.without_checkpoints(layers).peak,
            "batch split into rows": row.peak,
        }

    available = gpu - CONTEXT

    def longest(name: str) -> int:
        low, high = 0, config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            fits = rungs(dataclasses.replace(setup, seq=middle))[name] <= available
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    found = rungs(setup)
    return Plan(footprint(config, setup), available, found, {name: longest(name) for name in found})


def table(plan: Plan, setup: Setup, title: str):
    """The plan as a rich table for the terminal."""
    from rich.table import Table

    part, gb = plan.footprint, 1e9
    shown = Table(title=title, title_justify="left")
    shown.add_column("what")
    shown.add_column("GB", justify="right")
    shown.add_column("how much")
    rows = (
        ("4-bit base" if setup.quant_type else "16-bit base", part.base, ""),
        ("scales of its blocks", part.scales, "double quantized" if setup.double_quant else ""),
        ("embedding, head, norms", part.embeddings, "16 bits"),
        ("adapter", part.adapter, f"fp32, r = {setup.r} on all linear layers"),
        ("gradients", part.gradients, "grow while the checkpoints go"),
        ("gradients of earlier micro-batches", part.earlier_gradients, ""),
        ("optimizer state", part.state, f"{setup.optim}, can be paged"),
        (
            "checkpointed activations",
            part.checkpoints,
            f"{setup.tokens:,} tokens, can be offloaded",
        ),
        ("one layer recomputed", part.recompute, ""),
        ("logits of a chunk", part.logits, "while there are no gradients"),
        ("dequantized weight, or gradients", part.workspace, "while a layer is recomputed"),
        ("cuBLAS", part.cublas, ""),
    )
    for name, nbytes, note in rows:
        if nbytes:
            shown.add_row(name, f"{nbytes / gb:.2f}", note)
    shown.add_section()
    for name, peak in plan.rungs.items():
        fits = "fits" if peak <= plan.available else "does not fit"
        most = plan.longest[name]
        shown.add_row(
            f"peak, {name}", f"{peak / gb:.2f}", f"{fits}; longest sequence {most:,} tokens"
        )
    shown.add_row("device, less the driver's own", f"{plan.available / gb:.2f}", "")
    shown.add_section()
    budget = _core.Pager.host_budget()
    of = "" if budget is None else f"of {budget / gb:.1f} here"
    shown.add_row("pinned host memory", f"{plan.host_bytes / gb:.2f}", of)
    return shown
