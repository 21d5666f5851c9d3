"""The studies' command lines: parse, call, print."""

from pathlib import Path
from typing import Annotated, Any

import typer

from actsparse.console.options import (
    BatchesOption,
    CalibrationOption,
    DtypeOption,
    Int8Option,
    JsonOption,
    ModelArgument,
    PagesOption,
    QuietOption,
    TextOption,
    job_options,
    split_list,
)
from actsparse.console.output import Output


def attribution(
    context: typer.Context,
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for points, curves and plots.")],
    questions: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="A .csv or .jsonl file with a field [bold]question[/], or [bold]truthfulqa[/] (hub)."
        ),
    ],
    metrics: Annotated[
        str, typer.Option(metavar="NAME[,NAME…]", help="What units are ranked by; all if left out.")
    ] = "magnitude,gradient,gxo,snip,ig,corrected-gxo",
    ratios: Annotated[
        str, typer.Option(metavar="FIRST:LAST:STEP", help="Shares of units to switch off; or numbers between commas.")
    ] = "0:0.9:0.1",
    where: Annotated[str, typer.Option(metavar="heads|neurons|both", help="Which units are switched off.")] = "both",
    modes: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="oracle|static[,…]",
            help="Ranked for each token by its own gradient, which only the dense model's answer can tell; or by "
            "thresholds fixed on calibration text, which can be deployed (not for ig).",
        ),
    ] = "oracle",
    number: Annotated[
        int | None, typer.Option("--num", metavar="N", help="Ask the first N questions only; all if left out.")
    ] = None,
    ig_steps: Annotated[int, typer.Option("--ig-steps", metavar="N", help="Steps of integrated gradients.")] = 20,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Generate N tokens at most.")] = 32,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Ask N questions at a time.")] = 8,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="How to ask, with {question} in it; the chat template if left out."),
    ] = None,
    calibration: CalibrationOption = "default",
    num_batches: BatchesOption = 8,
    dtype: DtypeOption = "fp32",
    device: Annotated[str, typer.Option(metavar="NAME", help="Where to run: cpu, or cuda if torch has it.")] = "cpu",
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Switch off what matters least by several metrics, and compare what is generated (arXiv 2406.06562).

    Questions that the folder has figures of are not asked again.
    """
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.studies.attribution import AttributionJob, parse_ratios, run_attribution

    parsed = {"metrics": split_list(metrics), "ratios": parse_ratios(ratios), "modes": split_list(modes)}
    job = AttributionJob(**job_options(context, **parsed))
    curves = run_attribution(job, output.say)
    output.finish(*curves.to_tables(), figures=curves.to_dict())
    more = ", thresholds/" if "static" in modes else ""
    output.say(f"written to {out}: attribution.json, .csv, .png, .pdf, points/{more}")


def inspect(
    context: typer.Context,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for figures, heat map and thresholds.")],
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for sparsify; may be left out with --checkpoints.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="topk|fat|cett|pplp|zeros",
            help="Keep a share of entries; those beyond a threshold; all but what makes a relative output error; as "
            "few as perplexity allows; or all but what is zero by itself, behind ReLU and its kin.",
        ),
    ] = "pplp",
    value: Annotated[
        float | None,
        typer.Option(
            metavar="V", help="The share (0.5), threshold (0.01), error (0.2), or percent (1) that goes with it."
        ),
    ] = None,
    thresholds: Annotated[
        str | None, typer.Option(metavar="LINE", help="Instead of a method: the line that an earlier run printed.")
    ] = None,
    checkpoints: Annotated[
        list[str],
        typer.Option(metavar="PATTERN", help="Folders of one training, such as 'DIR/*'; may be repeated to compare."),
    ] = [],  # noqa: B006
    text: TextOption = "default",
    num_pages: PagesOption = None,
    max_length: Annotated[int, typer.Option("--max-length", metavar="N", help="Evaluation window in tokens.")] = 512,
    calibration: CalibrationOption = "default",
    num_batches: BatchesOption = 8,
    heat_tokens: Annotated[int, typer.Option("--heat-tokens", metavar="N", help="Tokens in the heat map.")] = 128,
    dtype: DtypeOption = "fp32",
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """See how sparse feed-forward networks are, of one model or over a training (Sparsing Law, arXiv 2411.02335)."""
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.studies.inspection import InspectJob, run_inspect, run_series

    job = InspectJob(**job_options(context))
    figures: dict[str, Any] = {}
    results: list[Any] = []
    if model is not None:
        inspection, settings = run_inspect(job, output.say)
        results.append(inspection.to_table(settings))
        if inspection.line is not None:
            results.append(f"--thresholds {inspection.line}")
        figures |= inspection.to_dict()
    if checkpoints:
        series = run_series(job, output.say)
        results.append(series.to_table())
        figures |= series.to_dict()
    output.finish(*results, figures=figures)
    output.say(f"written to {out}: " + ", ".join(sorted(path.name for path in out.iterdir())))


def tasks(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="A folder that sparsify wrote, or a model.")],
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="NAME[,NAME…]",
            help="Tasks of lm-evaluation-harness, or groups: [bold]sparsing-law-choice[/], "
            "[bold]sparsing-law-generation[/], [bold]truthfulqa-choice[/]. Their data comes from the hub.",
        ),
    ],
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with task files of your own (YAML).")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="N", help="The first N examples of each task only; below 1, that share.")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--fewshot", metavar="K", help="Solved examples in the prompt; each task's own number if left out."
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Run N examples at a time.")] = 8,
    thresholds: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Mask the model with this thresholds file.")
    ] = None,
    int8: Int8Option = None,
    dtype: DtypeOption = "fp32",
    uses_chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask in the model's chat format.")
    ] = False,
    runs_generated_code: Annotated[
        bool,
        typer.Option("--run-generated-code", help="Allow tasks that run the code a model writes (humaneval, mbpp)."),
    ] = False,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Score a masked model on downstream tasks, beside itself without masks, with lm-evaluation-harness."""
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.studies.tasks import TasksJob, run_tasks

    job = TasksJob(**job_options(context, tasks=split_list(tasks)))
    report = run_tasks(job, output.say)
    output.finish(report.to_table(), figures=report.to_dict())
