"""The command line: parse, call, print. Nothing is computed here."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

INTERRUPTED = 130

app = typer.Typer(
    help="Activation sparsity for language models: mask what does not matter, keep INT8, know what it costs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

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
    Path | None, typer.Option("--json", metavar="FILE", help="Write every figure to this JSON file too.")
]
Int8Option = Annotated[
    str | None,
    typer.Option("--int8", metavar="asym|sym", help="Compress the weights with nncf.compress_weights first."),
]
DtypeOption = Annotated[str, typer.Option("--dtype", metavar="TYPE", help="fp32, bf16 or fp16.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report.")] = Path("demo-report"),
    model: Annotated[str, typer.Option(metavar="MODEL", help="Another model than the embedded default.")] = "default",
    text: TextOption = "default",
    calibration: CalibrationOption = "default",
    pages: PagesOption = None,
    max_length: LengthOption = None,
    batches: BatchesOption = 32,
    fast: Annotated[
        bool, typer.Option("--fast", help="4 pages and 8 calibration batches: a look, not a figure.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Sparsify a real model, measure what it costs, and write a report: no model hub, no questions."""
    from actsparse.demo import run_demo
    from actsparse.report import print_table, write_json

    if pages is None and text == "default":
        pages = 4 if fast else 16
    report = run_demo(
        out,
        model_name=model,
        text_name=text,
        calibration_name=calibration,
        num_pages=4 if fast and pages is None else pages,
        max_length=max_length,
        num_batches=8 if fast else batches,
        say=_say,
    )
    print_table(report.to_table())
    if json is not None:
        write_json(json, report.to_dict())
    _say(f"written to {out}: report.json, report.md, thresholds.safetensors, sparsity_by_layer.png")


@app.command()
def sparsify(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the thresholds and the report.")],
    target: Annotated[
        list[str], typer.Option(metavar="PATTERN=S", help="Sparsity of the layers whose name matches; may be repeated.")
    ] = [],  # noqa: B006
    role: Annotated[
        list[str], typer.Option(metavar="ROLE=S", help="Sparsity of a role such as ffn.down; may be repeated.")
    ] = [],  # noqa: B006
    sparsity: Annotated[
        float | None, typer.Option(metavar="S", help="One sparsity for all Linear layers of the blocks.")
    ] = None,
    ignore: Annotated[
        list[str], typer.Option(metavar="PATTERN", help="Leave out the layers whose name matches; may be repeated.")
    ] = [],  # noqa: B006
    algorithm: Annotated[str, typer.Option(metavar="NAME", help="How thresholds are found.")] = "magnitude",
    int8: Int8Option = None,
    calibration: CalibrationOption = "default",
    batches: BatchesOption = 32,
    text: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Also measure what it costs, on this evaluation text.")
    ] = None,
    pages: PagesOption = None,
    max_length: LengthOption = None,
    dtype: DtypeOption = "fp32",
    json: JsonOption = None,
) -> None:
    """Calibrate a model's thresholds and write them to a folder; the model itself stays as it is."""
    from actsparse.jobs import SparsifyJob, run_sparsify
    from actsparse.report import print_table, write_json

    job = SparsifyJob(
        model=model,
        out=out,
        targets=tuple(target),
        roles=tuple(role),
        sparsity=sparsity,
        ignored=tuple(ignore),
        algorithm=algorithm,
        int8=int8,
        calibration=calibration,
        num_batches=batches,
        text=text,
        num_pages=pages,
        max_length=max_length,
        dtype=dtype,
    )
    result, tables = run_sparsify(job, _say)
    for table in tables:
        print_table(table)
    if json is not None:
        write_json(json, result)
    _say(f"written to {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="A model, or a folder that sparsify wrote.")],
    text: TextOption = "default",
    pages: PagesOption = None,
    max_length: LengthOption = None,
    thresholds: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Mask the model with this thresholds file.")
    ] = None,
    int8: Int8Option = None,
    dtype: DtypeOption = "fp32",
    json: JsonOption = None,
) -> None:
    """Measure a model's word perplexity and, if it is masked, its sparsity, on a text."""
    from actsparse.jobs import EvaluateJob, run_evaluate
    from actsparse.report import print_table, write_json

    job = EvaluateJob(model, text, pages, max_length, thresholds, int8, dtype)
    result, tables = run_evaluate(job, _say)
    for table in tables:
        print_table(table)
    if json is not None:
        write_json(json, result)


def main() -> None:
    """Run the command line: a user's mistake is one line and exit code 2, an interruption is 130."""
    # Libraries below must not talk over the tables; their errors are caught and shortened.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        message = _describe_mistake(error)
        if message is None:
            raise
        code = _fail(message, 2)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this
        _fail("interrupted; no file was left half-written", INTERRUPTED)
    sys.exit(code or 0)


def _describe_mistake(error: Exception) -> str | None:
    usage_message = getattr(error, "format_message", None)
    if usage_message is not None:  # typer's own errors: an unknown option, a missing argument
        return f"{usage_message()} (see actsparse --help)"
    from actsparse.errors import ActsparseError

    return str(error) if isinstance(error, ActsparseError) else None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    _say("error: " + " ".join(message.split()))
    return code
