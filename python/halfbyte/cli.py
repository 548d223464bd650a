"""The command `halfbyte`: thin wrappers round the functions of the same names."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from halfbyte._core import CudaError
from halfbyte.errors import HalfbyteError
from halfbyte.sampling import Sampling
from halfbyte.train import TrainConfig

SHOWN_PLAINLY = (
    HalfbyteError,
    OSError,
    ValueError,
    ImportError,
    FloatingPointError,
    torch.OutOfMemoryError,
    CudaError,
)


class Commands(TyperGroup):
    """The group of commands; what a user can mend is shown as one message, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except SHOWN_PLAINLY as error:
                if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                    raise
                _complain(f"error: {error}", fg="red", bold=True)
                raise typer.Exit(1) from None


def _show_warning(message: Warning | str, *_: Any) -> None:
    _complain(f"warning: {message}", fg="yellow")


def _complain(text: str, **style: Any) -> None:
    # Of the libraries beneath, rich alone heeds it (https://no-color.org).
    color = False if os.environ.get("NO_COLOR") else None
    typer.secho(text, err=True, color=color, **style)


app = typer.Typer(
    cls=Commands,
    help="Fine-tune a LoRA through 4-bit weights and chat with it, on the same bytes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the command `halfbyte`."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"halfbyte {version('halfbyte')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


Model = Annotated[str, typer.Argument(help="A model folder, a .gguf file or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: CUDA if usable.")]
QuantType = Annotated[str, typer.Option(help="nf4, fp4 or int4; none keeps 16-bit weights.")]
DoubleQuant = Annotated[bool, typer.Option(help="Keep the block scales in 8 bits.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model folder at OUT.")]
KVDType = Annotated[
    str | None, typer.Option(help="int8 keeps keys and values in 8 bits; default: the model's.")
]
DType = Annotated[str, typer.Option(help="bfloat16, float16 or float32: what is computed in.")]


def _none(value: str | None) -> str | None:
    """None for the word, also as Python and the settings' help write it."""
    return None if value in ("none", "None") else value


def _torch_dtype(name: str) -> torch.dtype:
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


@app.command()
def quantize(
    src: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    quant_type: Annotated[
        str, typer.Option(help="nf4 or fp4; none writes 16-bit weights.")
    ] = "nf4",
    double_quant: DoubleQuant = True,
    blocksize: Annotated[int, typer.Option(help="Weights that share one scale.")] = 64,
    dtype: DType = "bfloat16",
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantize SRC to 4 bits and save it in the folder OUT, in bitsandbytes' format."""
    from halfbyte import checkpoint

    checkpoint.quantize(
        src,
        out,
        quant_type=_none(quant_type),
        double_quant=double_quant,
        blocksize=blocksize,
        dtype=_torch_dtype(dtype),
        device=device,
        overwrite=overwrite,
    )
    typer.echo(f"wrote {out}")


def _option_type(annotation: Any) -> Any:
    """The command line's type for a field: `int | None` is an int, paths and data are words."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kinds = [kind.strip() for kind in text.split("|")]
    if any(kind.endswith("Sequence[str]") for kind in kinds):
        return list[str]
    if kinds[0].startswith("tuple"):
        return tuple[float, float]
    return (
        {"bool": bool, "int": int, "float": float}.get(kinds[0], str) if "str" not in kinds else str
    )


def _field_help(settings: type) -> dict[str, str]:
    """What the lines `name: text` of a dataclass's docstring say; further lines are indented."""
    doc = inspect.cleandoc(settings.__doc__ or "")
    entries = re.findall(r"^(\w+): (.*(?:\n +.*)*)", doc, re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in entries}


def _parameters(settings: type) -> list[inspect.Parameter]:
    """A dataclass's fields as parameters: those without a default are arguments."""
    texts, fields = _field_help(settings), dataclasses.fields(settings)
    shown = [field for field in fields if "python_only" not in field.metadata]
    return [_parameter(field, texts.get(field.name)) for field in shown]


def _parameter(field: dataclasses.Field[Any], text: str | None) -> inspect.Parameter:
    required = field.default is dataclasses.MISSING
    kind, default = _option_type(field.type), field.default
    if kind == list[str] and not required:
        default = [default] if isinstance(default, str) else list(default or [])
    if default is None:
        kind = kind | None
    parser = _number_or_none(kind) if default is not None and _may_be_none(field) else None
    declared = typer.Argument(help=text) if required else typer.Option(help=text, parser=parser)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else default,
        annotation=Annotated[kind, declared],
    )


def _may_be_none(field: dataclasses.Field[Any]) -> bool:
    return str(field.type) in ("int | None", "float | None")


def _number_or_none(kind: type) -> Callable[[str], Any]:
    """Reads a number, or the word none for a setting whose default is a number."""

    def number(word: str) -> Any:
        return None if _none(word) is None else kind(word)

    return number


def _with_options_of(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Lets a command's `**options` be the fields of `settings`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        parameters = [*own, *_parameters(settings)]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


@app.command()
@_with_options_of(TrainConfig)
def finetune(**options: Any) -> None:
    """Train a LoRA adapter on DATA through MODEL's 4-bit weights. Defaults are qlora.py's."""
    from halfbyte.train import finetune

    finetune(_train_config(options))


def _train_config(options: dict[str, Any]) -> TrainConfig:
    """The words of the command line as TrainConfig takes them."""
    options["quant_type"] = _none(options["quant_type"])
    options["resume"] = {"true": True, "false": False}.get(
        options["resume"].lower(), options["resume"]
    )
    for name in ("target_modules", "report_to"):
        if len(options[name]) == 1:
            (options[name],) = options[name]
    options["modules_to_save"] = options["modules_to_save"] or None
    return TrainConfig(**options)


@app.command()
@_with_options_of(Sampling)
def chat(
    model: Model,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA adapter, in PEFT's format.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt; default: the chat template's own.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete each line as plain text, without a template.")
    ] = False,
    quant_type: QuantType = "nf4",
    double_quant: DoubleQuant = True,
    dtype: DType = "bfloat16",
    device: Device = None,
    kv_dtype: KVDType = None,
    **sampling: Any,
) -> None:
    """Chat with MODEL in the terminal, or answer the lines of standard input."""
    from halfbyte import checkpoint, lora
    from halfbyte.chat import Conversation, repl
    from halfbyte.kv_cache import check_kv_dtype

    # What can be wrong without a model is said before it is loaded.
    check_kv_dtype(kv_dtype)
    settings = Sampling(**sampling)
    decoder = checkpoint.load(
        model, _none(quant_type), double_quant, dtype=_torch_dtype(dtype), device=device
    )
    if adapter is not None:
        lora.load_adapter(decoder, adapter)
    repl(Conversation(decoder, system, settings, kv_dtype), raw)


@app.command()
def serve(
    model: Model,
    adapter: Annotated[
        list[str], typer.Option(help="NAME=DIR: a LoRA adapter and what clients call it.")
    ] = [],  # noqa: B006  typer reads it, nobody writes it
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: its last word.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file that holds the key which clients must send.")
    ] = None,
    adapter_root: Annotated[
        Path | None, typer.Option(help="Let clients load adapters from folders under this one.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Sequences that run at once, at most 32.")] = 32,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; 429 beyond.")] = 64,
    kv_gb: Annotated[
        float | None, typer.Option(help="10^9 bytes for keys and values; default: what is free.")
    ] = None,
    kv_dtype: KVDType = None,
    request_timeout: Annotated[float, typer.Option(help="Seconds that a reply may take.")] = 600.0,
    drain_timeout: Annotated[
        int, typer.Option(help="Seconds that running requests get to end when it is stopped.")
    ] = 30,
    quant_type: QuantType = "nf4",
    double_quant: DoubleQuant = True,
    dtype: DType = "bfloat16",
    device: Device = None,
) -> None:
    """Serve MODEL and adapters over HTTP, as OpenAI's API does, with a chat page at /."""
    from halfbyte import checkpoint
    from halfbyte.serve import ServeConfig
    from halfbyte.serve import serve as run

    config = ServeConfig(
        name=name or Path(model).name,
        host=host,
        port=port,
        api_key=None if api_key_file is None else api_key_file.expanduser().read_text().strip(),
        adapter_root=adapter_root and adapter_root.expanduser(),
        max_batch=max_batch,
        max_waiting=max_waiting,
        kv_budget=None if kv_gb is None else int(kv_gb * 1e9),
        kv_dtype=kv_dtype,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
    )
    where = {"dtype": _torch_dtype(dtype), "device": device}
    run(
        lambda: checkpoint.load(model, _none(quant_type), double_quant, **where),
        config,
        _named_folders(adapter, config.name),
    )


def _named_folders(words: list[str], base: str) -> dict[str, str]:
    """NAME=DIR, each name once and none the base's."""
    folders: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not (name and equals and folder) or name in (base, *folders):
            raise ValueError(f"--adapter: expected NAME=DIR with a name of its own, got {word!r}")
        folders[name] = folder
    return folders


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    original: Annotated[
        str | None,
        typer.Option(help="16-bit model to merge into instead of MODEL's dequantized weights."),
    ] = None,
    quant_type: QuantType = "nf4",
    double_quant: DoubleQuant = True,
    dtype: DType = "bfloat16",
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge ADAPTER into MODEL and save a 16-bit model in the folder OUT.

    By default the adapter is added to the dequantized 4-bit weights, which are those that it was
    trained through.
    """
    from halfbyte import checkpoint, lora
    from halfbyte.checkpoint.saving import check_target

    dtype_ = _torch_dtype(dtype)
    check_target(out.expanduser().resolve(), overwrite, model)
    where = {"dtype": dtype_, "device": device}
    merged = checkpoint.load(
        model, quant_type=_none(quant_type), double_quant=double_quant, **where
    )
    lora.load_adapter(merged, adapter)
    weights = checkpoint.load(original, None, **where).state_dict() if original else None
    lora.merge(merged, dtype_, weights)
    checkpoint.save(merged, out, overwrite)
    typer.echo(f"wrote {out}")


@app.command()
def plan(
    model: Model,
    gpu: Annotated[str, typer.Option(help="Memory of the device, such as 24GB.")] = "24GB",
    seq: Annotated[
        int | None, typer.Option(help="Tokens of a sequence; default: 2048, or the model's most.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences that the device takes at once.")] = 1,
    r: Annotated[int, typer.Option(help="Rank of the adapter, on all linear layers.")] = 64,
    optim: Annotated[str, typer.Option(help="fp32 or 8bit optimizer state.")] = "fp32",
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Micro-batches a step.")] = 1,
    quant_type: QuantType = "nf4",
    double_quant: DoubleQuant = True,
) -> None:
    """Show where the memory of fine-tuning MODEL goes, and what fits, from its config alone."""
    from rich.console import Console

    from halfbyte import checkpoint
    from halfbyte.plan import Setup, parse_bytes, table
    from halfbyte.plan import plan as plan_run

    config = checkpoint.read_config(model)
    setup = Setup(
        seq=min(2048, config.max_position_embeddings) if seq is None else seq,
        batch=batch,
        r=r,
        optim=optim,
        quant_type=_none(quant_type),
        double_quant=double_quant,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    found = plan_run(config, setup, parse_bytes(gpu))
    size = f"{gpu} bytes" if gpu.strip().isdigit() else gpu
    title = f"{model}: {batch} x {setup.seq} tokens on a device of {size}"
    Console().print(table(found, setup, title))
    if found.needed is None:
        raise ValueError(
            f"{batch} x {setup.seq} tokens do not fit into {size}. hint: the longest sequence that "
            f"does has {max(found.longest.values()):,} tokens; try optim 8bit or a smaller r"
        )
    typer.echo(f"fits with {found.needed}")


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Use this model; default: SmolLM2-135M-Instruct.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path(
        "halfbyte-demo"
    ),
    device: Device = None,
) -> None:
    """Fine-tune a small chat model on a task it fails at, and show what changed."""
    from halfbyte.demo import run

    run(model, output_dir, device)


@app.command()
def doctor() -> None:
    """Show what is installed, what it was built for, and why CUDA is or is not used."""
    from halfbyte.doctor import report

    report()
