"""The planted regression on a tiny model: raised thresholds are caught, other draws of calibration windows are not."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.inputs import find_inputs
from actsparse.commands.regression.prepare import prepare_model
from actsparse.commands.regression.reference import DEFAULTS

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
CASE = """
model: model
sparsity: 0.5
calibration: {text: calibration.txt, batches: 12, length: 64}
evaluation: {text: evaluation.txt, max_length: 64}
"""


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("planted_regression")
    for name in ("planted_regression", "bars", "command"):
        sys.modules.pop(name)


def test_raised_thresholds_are_caught_and_noise_is_not(plant: Any, files: Path) -> None:
    path = files / "planted.yaml"
    path.write_text(CASE)
    case = read_case(path)
    inputs = find_inputs(case)
    model = prepare_model(case, inputs, lambda _: None)
    for parameter in model.model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    found = plant.plant(model, inputs, DEFAULTS, range(1, 11))
    bars = {bar.name: bar for bar in plant.make_bars(found)}
    assert bars["noise: seeds called a regression"].measured == 0, bars
    assert bars["thresholds x 1.05: seeds called a regression"].measured == 10, bars
