"""The command line of `actsparse regress`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from actsparse.options import JsonOption, say


def regress(
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
) -> None:
    """Measure regression cases and compare them with a reference. Exit code 1 if a figure got worse, 0 if none did."""
    from actsparse.files import prepare_folder
    from actsparse.regression.job import RegressJob, draw, run_regress
    from actsparse.regression.tables import differences_table, results_table
    from actsparse.report import print_table, write_json

    job = RegressJob(tuple(cases), reference, update, history)
    if json is not None:
        prepare_folder(json.parent)
    outcome = run_regress(job, say)
    if outcome.differences:
        print_table(differences_table(outcome.differences))
    elif outcome.results:
        print_table(results_table(outcome.results))
    if json is not None:
        write_json(json, outcome.to_dict())
    plots = draw(job)
    if plots:
        say("drawn: " + ", ".join(map(str, plots)))
    if update is not None:
        say(f"accepted in {reference}: {', '.join(outcome.results)}")
    raise typer.Exit(1 if outcome.is_regression else 0)
