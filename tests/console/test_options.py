"""The options of every command are the fields of its job."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from actsparse import cli
from actsparse.commands.bench.job import BenchJob
from actsparse.commands.demo import DemoJob
from actsparse.commands.evaluate import EvaluateJob
from actsparse.commands.regression.command import regress
from actsparse.commands.regression.job import RegressJob
from actsparse.commands.sparsify import SparsifyJob
from actsparse.commands.studies import commands
from actsparse.commands.studies.attribution import AttributionJob
from actsparse.commands.studies.inspection import InspectJob
from actsparse.commands.studies.tasks import TasksJob
from actsparse.commands.sweep import SweepJob
from actsparse.console.options import RoleOption, job_options


@pytest.mark.parametrize(
    ("command", "job"),
    [
        (cli.demo, DemoJob),
        (cli.sparsify, SparsifyJob),
        (cli.evaluate, EvaluateJob),
        (cli.sweep, SweepJob),
        (cli.bench, BenchJob),
        (regress, RegressJob),
        (commands.attribution, AttributionJob),
        (commands.inspect, InspectJob),
        (commands.tasks, TasksJob),
    ],
)
def test_a_command_takes_what_its_job_has(command: Callable[..., None], job: Any) -> None:
    assert inspect.signature(command).parameters.keys() - {"context", "json", "quiet"} == {x.name for x in fields(job)}


@pytest.mark.parametrize(("given", "roles"), [([], ()), (["--role", "a=1", "--role", "b=0"], ("a=1", "b=0"))])
def test_options_are_what_was_given_lists_as_tuples(given: list[str], roles: tuple[str, ...]) -> None:
    app, found = typer.Typer(), {}

    @app.command()
    def _run(
        context: typer.Context,
        out: Path,
        roles: RoleOption = [],  # noqa: B006
        names: str = "a,b",
        quiet: bool = False,
    ) -> None:
        found.update(job_options(context, names=("a", "b")))

    assert CliRunner().invoke(app, ["folder", *given, "--quiet"]).exit_code == 0
    assert found == {"out": Path("folder"), "roles": roles, "names": ("a", "b")}
