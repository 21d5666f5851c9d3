"""The command line of `actsparse regress`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from actsparse.console.options import JsonOption, QuietOption, job_options
from actsparse.console.output import Output
from actsparse.runtime.process import ExitCode


def regress(
    context: typer.Context,
    cases: Annotated[
        list[str],
        typer.Argument(
            metavar="[CASE]…",
            help="Files of cases (.yaml), or names of the reference's cases; all of them if left out.",
        ),
    ] = [],  # noqa: B006
    reference: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare with the figures of this reference file.")
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Accept the figures as the reference instead; the reason is kept in it."),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the results here, by commit, and draw them; alone, only draw."),
    ] = None,
    json: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure regression cases and compare them with a reference. Exit code 1 if a figure got worse, 0 if none did."""
    output = context.with_resource(Output(json, quiet))
    from actsparse.commands.regression.compare import differences_table, results_table
    from actsparse.commands.regression.job import RegressJob, draw_history, run_regress

    job = RegressJob(**job_options(context))
    outcome = run_regress(job, output.say)
    tables = [differences_table(outcome.differences)] if outcome.differences else []
    if outcome.results and not tables:
        tables = [results_table(outcome.results)]
    output.finish(*tables, figures=outcome.to_dict())
    if history is not None:
        output.say("drawn: " + ", ".join(map(str, draw_history(history))))
    if update is not None:
        output.say(f"accepted in {reference}: {', '.join(outcome.results)}")
    raise typer.Exit(ExitCode.CHECK_FAILED if outcome.is_regression else ExitCode.DONE)
