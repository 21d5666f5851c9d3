"""The examples run as they stand, one after the other: the second applies what the first has saved."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from actsparse.regression.case import read_case
from actsparse.regression.command import regress
from actsparse.regression.identity import describe_settings
from actsparse.regression.reference import read_reference, tolerances_of
from actsparse.regression.tolerance import DEFAULTS
from actsparse.regression.yaml_file import read_yaml

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.real_model
def test_examples_run_in_order(tmp_path):
    names = ["sparsify_and_measure.py", "apply_thresholds.py", "accelerate_and_generate.py"]
    assert sorted(names) == sorted(path.name for path in EXAMPLES.glob("*.py"))
    for name in names:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "word perplexity" in done.stdout


def test_the_regression_example_holds_together():
    reference = read_reference(EXAMPLES / "regression" / "reference.yaml")
    for name in reference.cases:
        case, result = read_case(reference.case_path(name)), reference.read_result(name)
        settings = {key: value for key, value in result.inputs.items() if not key.startswith("checksum of")}
        assert describe_settings(case) == settings
        tolerances = {key: tolerance for key, tolerance in tolerances_of(reference.find(name)).items() if tolerance}
        assert tolerances == {key: DEFAULTS[key] for key in tolerances}
    # What the workflow calls is a command that there is.
    workflow = read_yaml(EXAMPLES / "regression" / "workflow.yml")
    commands = [step["run"].split() for step in workflow["jobs"]["regress"]["steps"] if "run" in step]
    options = {word for command in commands if command[:2] == ["actsparse", "regress"] for word in command[2:]}
    known = {f"--{name}" for name in inspect.signature(regress).parameters}
    assert {word for word in options if word.startswith("--")} <= known
    assert "--reference" in options
