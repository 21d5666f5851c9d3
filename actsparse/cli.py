"""The command line: parse, call, print. Nothing is computed here."""

import contextlib
import faulthandler
import logging
import os
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.commands.regression.command import regress
from actsparse.commands.studies.commands import attribution, inspect, tasks
from actsparse.console.options import (
    BatchesOption,
    CalibrationOption,
    DeviceOption,
    DtypeOption,
    Int8Option,
    JsonOption,
    LengthOption,
    MemoryOption,
    ModelArgument,
    PagesOption,
    QuietOption,
    RoleOption,
    TargetOption,
    TextOption,
    TokenizerOption,
    job_options,
    split_list,
)
from actsparse.console.output import Output, tell
from actsparse.runtime.process import (
    EXIT_CODES_HELP,
    ExitCode,
    accept_any_text,
    explain_termination,
    is_launched,
    launched_rank,
    require_encodable,
    stand_in_for_home,
)

app = typer.Typer(
    help="Activation sparsity for language models: mask what does not matter, keep INT8, know what it costs.",
    epilog=EXIT_CODES_HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"actsparse {version('actsparse')}")
        raise typer.Exit


# What is shared among the processes of a launcher; any other command is for one process.
SHARED_COMMANDS = ("demo", "evaluate", "sparsify", "sweep")


@app.callback()
def main_options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Take the options before the command, and join the other processes of a launcher."""
    if is_launched():
        from actsparse.errors import ActsparseError
        from actsparse.runtime.distributed import together

        if context.invoked_subcommand not in SHARED_COMMANDS:
            msg = f"actsparse {context.invoked_subcommand} works in one process: run it without a launcher"
            raise ActsparseError(msg)
        explain_termination()
        context.with_resource(together())


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the report.")] = Path("demo-report"),
    model: Annotated[str, typer.Option(metavar="MODEL", help="Another model than the embedded default.")] = "default",
    text: TextOption = "default",
    calibration: CalibrationOption = "default",
    num_pages: PagesOption = None,
    max_length: LengthOption = None,
    num_batches: BatchesOption = 32,
    fast: Annotated[
        bool, typer.Option("--fast", help="4 pages and 8 calibration batches: a look, not a figure.")
    ] = False,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Sparsify a real model, measure what it costs and how fast it decodes: no model hub, no questions."""
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.demo import DemoJob, run_demo

    found = run_demo(DemoJob(**job_options(context)), output.say)
    output.finish(*found.results, figures=found.to_dict())
    output.say(f"written to {out}: report.json, report.md, thresholds.safetensors, sparsity_by_layer.png")


@app.command()
def sparsify(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the thresholds and the report.")],
    targets: TargetOption = [],  # noqa: B006
    roles: RoleOption = [],  # noqa: B006
    sparsity: Annotated[
        float | None, typer.Option(metavar="S", help="One sparsity for all Linear layers of the blocks.")
    ] = None,
    ignored: Annotated[
        list[str],
        typer.Option("--ignore", metavar="PATTERN", help="Leave out the layers whose name matches; may be repeated."),
    ] = [],  # noqa: B006
    algorithm: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How thresholds are found: a name or a pair SCORE+ALLOCATION. [bold]auto[/] tries several and takes "
            "what measures best on calibration batches held out; [bold]zeros[/] leaves out what is zero by itself, "
            "behind ReLU, and needs no sparsity.",
        ),
    ] = "auto",
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Instead of a sparsity: the largest share that perplexity may grow by, as 0.01."
        ),
    ] = None,
    held_out: Annotated[
        str, typer.Option("--held-out", metavar="SOURCE", help="The text that this is measured on.")
    ] = "default",
    recover: Annotated[
        int, typer.Option(metavar="STEPS", help="Train the masked model on its own dense predictions.")
    ] = 0,
    train: Annotated[
        str,
        typer.Option(
            metavar="weights|bias", help="What --recover trains: weights, and saves them, or the masks' biases alone."
        ),
    ] = "weights",
    training: Annotated[str, typer.Option(metavar="SOURCE", help="The text that --recover trains on.")] = "default",
    skip_first: Annotated[
        int, typer.Option("--skip-first", metavar="K", help="Leave the first K tokens of a prompt unmasked.")
    ] = 0,
    int8: Int8Option = None,
    accelerate: Annotated[
        bool, typer.Option("--accelerate", help="Also save an OpenVINO model that skips what is masked.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --accelerate: multiply with activations of 24 bits instead of 8.")
    ] = False,
    calibration: CalibrationOption = "default",
    num_batches: BatchesOption = 32,
    text: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Also measure what it costs, on this evaluation text.")
    ] = None,
    num_pages: PagesOption = None,
    max_length: LengthOption = None,
    fail_above: Annotated[
        float | None,
        typer.Option(
            "--fail-above",
            metavar="P",
            help="With --text: exit code 1, no thresholds and no OpenVINO model where token perplexity grows by more "
            "than this share, as 0.05.",
        ),
    ] = None,
    dtype: DtypeOption = "fp32",
    tokenizer: TokenizerOption = None,
    device: DeviceOption = "cpu",
    max_memory: MemoryOption = None,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Calibrate a model's thresholds and write them to a folder, with --accelerate a ready OpenVINO model too."""
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.sparsify import SparsifyJob, run_sparsify
    from actsparse.storage.files import written_since

    job = SparsifyJob(**job_options(context))
    start = time.time()
    result, tables = run_sparsify(job, output.say)
    output.finish(*tables, figures=result)
    if (gate := result.get("gate")) is not None and not gate["has_passed"]:
        output.fail(f"{gate['message']}: thresholds and model are not written, {out / 'report.json'} is")
    output.say(f"written to {out}: {', '.join(written_since(out, start))}")


@app.command()
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="A model, or a folder that sparsify wrote.")],
    text: TextOption = "default",
    num_pages: PagesOption = None,
    max_length: LengthOption = None,
    thresholds: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Mask the model with this thresholds file.")
    ] = None,
    int8: Int8Option = None,
    dtype: DtypeOption = "fp32",
    tokenizer: TokenizerOption = None,
    device: DeviceOption = "cpu",
    max_memory: MemoryOption = None,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a model's word perplexity and, if it is masked, its sparsity, on a text."""
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.evaluate import EvaluateJob, run_evaluate

    result, tables = run_evaluate(EvaluateJob(**job_options(context)), output.say)
    output.finish(*tables, figures=result)


@app.command()
def sweep(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for points, table data and plot.")],
    algorithms: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="Algorithms, or pairs SCORE+ALLOCATION.")
    ] = "magnitude,fisher,auto",
    sparsities: Annotated[
        str, typer.Option("--sparsity", metavar="S[,S…]", help="Sparsities of all Linear layers of the blocks.")
    ] = "0.3,0.4,0.5,0.6",
    roles: Annotated[
        list[str],
        typer.Option("--role", metavar="ROLE", help="Only layers of this role, such as ffn.down; may be repeated."),
    ] = [],  # noqa: B006
    int8: Int8Option = None,
    dtype: DtypeOption = "fp32",
    calibration: CalibrationOption = "default",
    num_batches: BatchesOption = 32,
    text: TextOption = "default",
    num_pages: PagesOption = None,
    max_length: Annotated[int, typer.Option("--max-length", metavar="N", help="Evaluation window in tokens.")] = 512,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = "cpu",
    max_memory: MemoryOption = None,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Compare algorithms at equal measured sparsity. Points that the folder has are not measured again."""
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.sweep import SweepJob, parse_sparsities, run_sweep

    parsed = {"algorithms": split_list(algorithms), "sparsities": parse_sparsities(sparsities)}
    job = SweepJob(**job_options(context, **parsed))
    result = run_sweep(job, output.say)
    output.finish(result.to_table(), figures=result.to_dict())
    output.say(f"written to {out}: sweep.json, frontier.png, points/")


for study in (attribution, inspect, tasks):
    app.command()(study)
app.command()(regress)


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="[bold]1b[/], [bold]1b-relu[/] or [bold]3b[/] (random weights, no hub), [bold]default[/], a hub id, a "
            "folder (of an OpenVINO model too), or a GGUF file.",
        ),
    ],
    sparsities: Annotated[
        list[str],
        typer.Option(
            "--sparsity",
            metavar="S[,S…]",
            help="Sparsity of all Linear layers of the blocks; 0.5 by default. Each S is measured.",
        ),
    ] = [],  # noqa: B006
    targets: TargetOption = [],  # noqa: B006
    roles: RoleOption = [],  # noqa: B006
    thresholds: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of targets: the masks of this file, as sparsify writes it."),
    ] = None,
    zeros: Annotated[
        bool, typer.Option("--zeros", help="Instead of targets: leave out what is zero by itself, behind ReLU.")
    ] = False,
    weights: Annotated[
        str | None, typer.Option(metavar="int8|int4|int4-aware|f16", help="How weights are stored; int8 by default.")
    ] = None,
    is_exact: Annotated[
        bool, typer.Option("--exact", help="Multiply with activations of 24 bits instead of 8.")
    ] = False,
    num_tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="How many decoded tokens are timed.")] = 60,
    prompt_lengths: Annotated[
        str, typer.Option(metavar="N[,N…]", help="Prompt lengths for the time to first token.")
    ] = "32,128,512,1024",
    batch_sizes: Annotated[
        str, typer.Option(metavar="N[,N…]", help="How many sequences are decoded at once, each number in turn.")
    ] = "4,16",
    repetitions: Annotated[int, typer.Option(metavar="N", help="How often each prompt is read.")] = 3,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that compute; all cores by default.")
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            "--target-speedup", metavar="X", help="Also say how sparse it has to be here to decode X times as fast."
        ),
    ] = None,
    text: TextOption = "default",
    calibration: CalibrationOption = "default",
    num_batches: Annotated[int, typer.Option("--batches", metavar="N", help="Calibration batches of 128 tokens.")] = 4,
    json: JsonOption = None,
    quiet: QuietOption = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw speed-up against sparsity into this PNG file.")
    ] = None,
) -> None:
    """Time a model dense and sparse, side by side with OpenVINO: decoding, batches, prompts, memory.

    Also says how much of the speed at which this machine reads memory the decoding reaches.
    """
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.bench.job import BenchJob, describe_report, draw_plot, parse_numbers, run_bench
    from actsparse.commands.bench.results import make_tables

    parsed = {
        "prompt_lengths": parse_numbers("--prompt-lengths", prompt_lengths),
        "batch_sizes": parse_numbers("--batch-sizes", batch_sizes),
    }
    job = BenchJob(**job_options(context, **parsed))
    report = run_bench(job, output.say)
    results: list[Any] = make_tables(report)
    if target_speedup is not None:
        needed = report.sparsity_for(target_speedup)
        answer = f"a sparsity of {100 * needed:.0f}%" if needed is not None else "more than these points can tell"
        results.append(f"decoding {target_speedup:g} times as fast as dense takes {answer}")
    draw_plot(job, report)
    output.finish(*results, figures=describe_report(job, report))


@app.command()
def tune(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write: the model, tune.json and tune.png.")],
    max_perplexity_increase: Annotated[
        float,
        typer.Option(metavar="X", help="How much token perplexity may rise on held-out text: 0.03 is 3%."),
    ] = 0.03,
    weights: Annotated[
        str, typer.Option(metavar="W[,W…]", help="Kinds of weights to try: int8, int4, int4-aware.")
    ] = "int8,int4,int4-aware",
    algorithm: Annotated[str, typer.Option(metavar="NAME", help="What finds the masks.")] = "auto",
    recover: Annotated[
        int, typer.Option(metavar="STEPS", help="Steps with which masks learn biases, in the end; 0 for none.")
    ] = 60,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Begin no new candidate after so many minutes.")
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="SOURCE", help="Held-out text: one half to search with, one to judge the result by.")
    ] = "default",
    calibration: CalibrationOption = "default",
    num_batches: BatchesOption = 32,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Find the fastest form of a model on this machine within a perplexity, and write it as an OpenVINO folder.

    Weights, masks and what runs them: few are measured, the rest is predicted. If dense INT4 is best, that is written.
    An interrupted run goes on where it was.
    """
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.tune.job import TuneJob, run_tune

    report = run_tune(TuneJob(**job_options(context, weights=tuple(split_list(weights)))), output.say)
    output.finish(report.to_table(), *report.to_lines(), figures=report.to_dict())
    output.say(f"written to {out}: an OpenVINO folder, tune.json, tune.png")


@app.command()
def doctor(context: typer.Context, json: JsonOption = None, quiet: QuietOption = False) -> None:
    """Say whether acceleration works here, and what is missing. Exit code 0 if it works, 1 if not.

    Builds the OpenVINO extension if that has not been done yet.
    """
    output = context.with_resource(Output(json, quiet))
    from actsparse.openvino.doctor import diagnose

    diagnosis = diagnose()
    output.finish(diagnosis.to_table(), figures=diagnosis.to_dict())
    raise typer.Exit(ExitCode.DONE if diagnosis.is_accelerated else ExitCode.CHECK_FAILED)


def main() -> None:
    """Run the command line: a user's mistake is one line and exit code 2, an interruption is 130."""
    # Libraries below must not talk over the tables; their errors are caught and shortened.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # That there is a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    stand_in_for_home()
    accept_any_text()
    # Where a library ends the process, say at least what was at work: on a standard error that is a file.
    with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
        faulthandler.enable()
    try:
        require_encodable(sys.argv[1:])
        code = app(standalone_mode=False)
    except KeyboardInterrupt:  # where it comes while typer is at work on another error
        code = ExitCode.INTERRUPTED
    except Exception as error:
        message = _describe_mistake(error)
        if message is None:
            traceback.print_exc()
            message, code = "this is unexpected; please report it with the lines above", ExitCode.UNEXPECTED
        else:
            code = ExitCode.MISTAKE
        _complain(message)
    if code == ExitCode.INTERRUPTED:  # typer turns Ctrl-C into this
        _complain("interrupted; no file was left half-written")
        # An interruption inside `exec`, as dataclasses are made, stays noted, and CPython would end with the signal
        # instead of the exit code; running anything that way takes the note back.
        exec("")
    sys.exit(code or ExitCode.DONE)


def _describe_mistake(error: Exception) -> str | None:
    usage_message = getattr(error, "format_message", None)
    if usage_message is not None:  # typer's own errors: an unknown option, a missing argument
        return f"{usage_message()} (see actsparse --help)"
    from actsparse.errors import ActsparseError

    return str(error) if isinstance(error, ActsparseError) else None


def _complain(message: str) -> None:
    process = f"process {launched_rank()}: " if is_launched() else ""
    tell(f"error: {process}" + " ".join(message.split()))
