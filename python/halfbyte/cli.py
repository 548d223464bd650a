"""The command `halfbyte`: thin wrappers round the functions of the same names."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from halfbyte.errors import HalfbyteError
from halfbyte.train import TrainConfig

SHOWN_PLAINLY = (
    HalfbyteError,
    OSError,
    ValueError,
    ImportError,
    FloatingPointError,
    torch.OutOfMemoryError,
)


class Commands(TyperGroup):
    """The group of commands; what a user can mend is shown as one message, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except SHOWN_PLAINLY as error:
            if ctx.params["debug"]:
                raise
            typer.secho(f"error: {error}", fg="red", bold=True, err=True)
            raise typer.Exit(1) from None


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
DType = Annotated[str, typer.Option(help="bfloat16, float16 or float32: what is computed in.")]


def _none(value: str | None) -> str | None:
    return None if value == "none" else value


def _torch_dtype(name: str) -> torch.dtype:
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in dtypes:
        raise ValueError(f"--dtype: expected one of {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]


@app.command()
def quantize(
    src: Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    quant_type: QuantType = "nf4",
    double_quant: DoubleQuant = True,
    blocksize: Annotated[int, typer.Option(help="Weights that share one scale.")] = 64,
    dtype: DType = "bfloat16",
    device: Device = None,
) -> None:
    """Quantize SRC to 4 bits and save it in the folder OUT, in bitsandbytes' format."""
    from halfbyte import checkpoint

    checkpoint.quantize(
        src,
        out,
        quant_type=quant_type,
        double_quant=double_quant,
        blocksize=blocksize,
        dtype=_torch_dtype(dtype),
        device=device,
    )
    typer.echo(f"wrote {out}")


OPTION_TYPES = {
    "bool": bool,
    "int": int,
    "float": float,
    "tuple[float, float]": tuple[float, float],
    "Sequence[str]": list[str],
}


def _option_type(annotation: str) -> Any:
    """The command line's type for a field: `int | None` is an int, paths and data are words."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    known = [OPTION_TYPES[kind] for kind in kinds if kind in OPTION_TYPES]
    if "Sequence[str]" in kinds:
        return list[str]
    return known[0] if known and "str" not in kinds else str


def _field_help() -> dict[str, str]:
    """What TrainConfig's docstring says of each field."""
    entries = re.findall(
        r"^((?:\w+, )*\w+): (.*?)(?=^(?:\w+, )*\w+: |\Z)",
        inspect.cleandoc(TrainConfig.__doc__ or ""),
        re.MULTILINE | re.DOTALL,
    )
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _train_parameters() -> list[inspect.Parameter]:
    """TrainConfig's fields as parameters: those without a default are arguments."""
    texts, parameters = _field_help(), []
    for field in dataclasses.fields(TrainConfig):
        required = field.default is dataclasses.MISSING
        declare = typer.Argument if required else typer.Option
        kind = _option_type(str(field.type))
        default = inspect.Parameter.empty if required else field.default
        if kind is list[str] and isinstance(default, str):
            default = [default]
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=Annotated[
                    kind if default is not None else kind | None,
                    declare(help=texts.get(field.name)),
                ],
            )
        )
    return parameters


def _train_config(options: dict[str, Any]) -> TrainConfig:
    values = dict(options)
    values["quant_type"] = _none(values["quant_type"])
    values["resume"] = {"true": True, "false": False}.get(values["resume"], values["resume"])
    for name in ("target_modules", "report_to"):
        if len(values[name]) == 1:
            values[name] = values[name][0]
    values["modules_to_save"] = values["modules_to_save"] or None
    return TrainConfig(**values)


def finetune(**options: Any) -> None:
    """Train a LoRA adapter on DATA through MODEL's 4-bit weights. Defaults are qlora.py's."""
    from halfbyte.train import finetune

    finetune(_train_config(options))


finetune.__signature__ = inspect.Signature(_train_parameters())  # type: ignore[attr-defined]
app.command()(finetune)


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
) -> None:
    """Merge ADAPTER into MODEL and save a 16-bit model in the folder OUT.

    By default the adapter is added to the dequantized 4-bit weights, which are those that it was
    trained through.
    """
    from halfbyte import checkpoint, lora

    dtype_ = _torch_dtype(dtype)
    where = {"dtype": dtype_, "device": device}
    merged = checkpoint.load(model, quant_type=_none(quant_type), double_quant=double_quant, **where)
    lora.load_adapter(merged, adapter, base_record=checkpoint.fingerprint(merged))
    weights = checkpoint.load(original, None, **where).state_dict() if original else None
    lora.merge(merged, dtype_, weights)
    checkpoint.save(merged, out)
    typer.echo(f"wrote {out}")


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


if __name__ == "__main__":
    main()
