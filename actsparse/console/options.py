"""The options that commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, a GGUF file, or [bold]default[/].")
]
TextOption = Annotated[
    str,
    typer.Option(
        "--text",
        metavar="SOURCE",
        help="Evaluation text: [bold]wikitext[/] (hub), a .txt/.raw/.tokens/.jsonl/.parquet file, or [bold]default[/].",
    ),
]
CalibrationOption = Annotated[
    str, typer.Option("--calibration", metavar="SOURCE", help="Calibration text, named as the evaluation text is.")
]
PagesOption = Annotated[
    int | None, typer.Option("--pages", metavar="N", help="Evaluate on the first N pages only; all if left out.")
]
LengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-length", metavar="N", help="Evaluation window in tokens; 2048 or the model's limit by default."
    ),
]
BatchesOption = Annotated[int, typer.Option("--batches", metavar="N", help="Calibration batches of 256 tokens.")]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write every figure to this JSON file too; - writes nothing else to stdout."
    ),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", help="No progress bars, status lines and tables; warnings and errors remain.")
]
Int8Option = Annotated[
    str | None,
    typer.Option("--int8", metavar="asym|sym", help="Compress the weights with nncf.compress_weights first."),
]
TargetOption = Annotated[
    list[str],
    typer.Option("--target", metavar="PATTERN=S", help="Sparsity of the layers whose name matches; may be repeated."),
]
RoleOption = Annotated[
    list[str], typer.Option("--role", metavar="ROLE=S", help="Sparsity of a role such as ffn.down; may be repeated.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="FOLDER",
        help="The tokenizer of this folder instead of the model's own, as for GGUF files.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="cpu|auto",
        help="auto uses accelerators, then memory, then the disk: weights that do not fit are loaded block by block.",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="With --device auto: memory for weights, such as 6GB."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="TYPE", help="fp32, bf16 or fp16.")]

# What says how a command talks, not what it does.
_OF_OUTPUT = ("json", "quiet")


def job_options(context: typer.Context, **parsed: Any) -> dict[str, Any]:
    """
    Return the options of a command, whose names are those of its job's fields.

    :param parsed: What has been read from the texts of some of them.
    :return: The options, lists as tuples, but those of its output.
    """
    given = {name: value for name, value in context.params.items() if name not in _OF_OUTPUT} | parsed
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def split_list(text: str) -> tuple[str, ...]:
    """Read names between commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
