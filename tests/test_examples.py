"""The examples run as they stand, one after the other: the last applies what the first has saved."""

import inspect
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.command import regress
from actsparse.commands.regression.inputs import describe_settings
from actsparse.commands.regression.records import read_yaml
from actsparse.commands.regression.reference import DEFAULTS, read_reference

EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Example:
    """
    One example as it is run.

    :param name: The file.
    :param options: What it is given.
    :param code: The exit code to expect.
    :param said: What it then says, where it says it.
    """

    name: str
    options: tuple[str, ...] = ()
    code: int = 0
    said: str = ""


RUNS = [
    Example("sparsify_and_measure.py", said="word perplexity"),
    Example("deploy.py", said="sites accelerated"),
    Example(
        "deploy.py", ("--out", "kept-back", "--fail-above", "0", "--batches", "1", "--pages", "1"), 1, "0.0% allowed"
    ),
    Example("deploy_thresholds.py", ("--out", "elsewhere"), said="sites accelerated"),
    Example("deploy_thresholds.py", ("--out", "kept-back", "--fail-above", "0.001", "--pages", "1"), 1, "0.1% allowed"),
]


def test_the_table_of_examples_has_all_of_them():
    table = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or f"]({path.name})" in table


@pytest.mark.real_model
def test_examples_run_in_order_and_a_failed_gate_deploys_nothing(tmp_path):
    assert {example.name for example in RUNS} == {path.name for path in EXAMPLES.glob("*.py")}
    for example in RUNS:
        command = [sys.executable, str(EXAMPLES / example.name), *example.options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == example.code, done.stderr
        assert example.said in (done.stderr.splitlines()[-1] if example.code else done.stdout)
    deployed = {path.parent.name for path in tmp_path.glob("*/openvino_model.xml")}
    assert deployed == {"deployed", "elsewhere"}
    assert not (tmp_path / "kept-back").exists()


def test_the_regression_example_holds_together():
    reference = read_reference(EXAMPLES / "regression" / "reference.yaml")
    for name in reference.cases:
        case, result = read_case(reference.case_path(name)), reference.read_result(name)
        settings = {key: value for key, value in result.inputs.items() if not key.startswith("checksum of")}
        assert describe_settings(case) == settings
        tolerances = {key: tolerance for key, tolerance in reference.find(name).tolerances.items() if tolerance}
        assert tolerances == {key: DEFAULTS[key] for key in tolerances}
    # What the workflow calls is a command that there is.
    workflow = read_yaml(EXAMPLES / "regression" / "workflow.yml")
    commands = [step["run"].split() for step in workflow["jobs"]["regress"]["steps"] if "run" in step]
    options = {word for command in commands if command[:2] == ["actsparse", "regress"] for word in command[2:]}
    known = {f"--{name}" for name in inspect.signature(regress).parameters}
    assert {word for word in options if word.startswith("--")} <= known
    assert "--reference" in options
