"""The examples run as they stand, one after the other: the last applies what the first has saved."""

import inspect
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse import save_thresholds, sparsify_activations
from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.command import regress
from actsparse.commands.regression.inputs import describe_settings
from actsparse.commands.regression.records import read_yaml
from actsparse.commands.regression.reference import DEFAULTS, read_reference
from actsparse.models import load_model
from actsparse.texts import token_batches

EXAMPLES = Path(__file__).parents[1] / "examples"


# As a user runs them, but for the tokens that they calibrate with.
LENGTH = 32


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


# What a failed gate does is the same for every model.
KEPT_BACK = ("--model", "{files}/model", "--out", "kept-back", "--fail-above", "-1", "--pages", "1")
RUNS = [
    Example("sparsify_and_measure.py", said="word perplexity"),
    Example("deploy.py", ("--pages", "1"), said="sites accelerated"),
    Example("deploy.py", (*KEPT_BACK, "--batches", "1"), 1, "-100.0% allowed"),
    Example("deploy_thresholds.py", ("--out", "elsewhere", "--pages", "1"), said="sites accelerated"),
    Example("deploy_thresholds.py", ("tiny.safetensors", *KEPT_BACK), 1, "-100.0% allowed"),
]


def test_the_table_of_examples_has_all_of_them():
    table = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or f"]({path.name})" in table


def shorter_batches(make: Callable[..., Any], *given: Any, **options: Any) -> Any:
    return make(*given, **{**options, "length": LENGTH})


def run(example: Example, monkeypatch: pytest.MonkeyPatch, files: Path) -> str | int | None:
    """Run an example in this process, which has imported everything; return what it stops with."""
    monkeypatch.setattr(sys, "argv", [example.name, *(option.format(files=files) for option in example.options)])
    try:
        runpy.run_path(str(EXAMPLES / example.name), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.real_model
def test_examples_run_in_order_and_a_failed_gate_deploys_nothing(tmp_path, monkeypatch, capsys, files):
    # The server runs with openvino-genai's tests, on the model that is deployed there.
    assert {example.name for example in RUNS} == {path.name for path in EXAMPLES.glob("*.py")} - {"serve.py"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("actsparse.texts.token_batches", partial(shorter_batches, token_batches))
    tiny = load_model(str(files / "model")).model
    save_thresholds(sparsify_activations(tiny, [{"input_ids": torch.arange(16)[None]}], 0.5), "tiny.safetensors")
    for example in RUNS:
        stopped = run(example, monkeypatch, files)
        said = capsys.readouterr().out
        # With a text to stop with, Python says it and exits with 1.
        code, said = (1, stopped) if isinstance(stopped, str) else (stopped, said)
        assert code == example.code
        assert example.said in said
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
