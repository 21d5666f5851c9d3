"""What `actsparse sparsify` keeps of an unfinished calibration, and for which other runs."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from actsparse.commands import sparsify
from actsparse.commands.sparsify import NEVER_MEASURED_WITH, SparsifyJob, name_calibration, run_sparsify

OPTIONS = [field.name for field in fields(SparsifyJob)]


@pytest.fixture
def job(tmp_path: Path) -> SparsifyJob:
    return SparsifyJob("model", tmp_path, sparsity=0.5)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_calibration_with_another_option_is_another(
    option: str, job: SparsifyJob, llama: Any, batches: list[Any]
) -> None:
    other = copy.copy(job)
    # Whatever it may be: what is allowed is not the point.
    object.__setattr__(other, option, "another")
    is_another = name_calibration(other, llama, batches) != name_calibration(job, llama, batches)
    assert is_another is (option not in NEVER_MEASURED_WITH)


def test_what_never_matters_are_options() -> None:
    assert set(OPTIONS) > NEVER_MEASURED_WITH


@pytest.mark.parametrize(("algorithm", "times"), [("magnitude", 0), ("fisher", 1)])
def test_weights_are_read_to_name_a_calibration_only_where_it_measures(
    algorithm: str, times: int, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    real = sparsify.every_weight
    monkeypatch.setattr(sparsify, "every_weight", lambda model: (read.append(model), real(model))[1])
    calibration = str(files / "calibration.txt")
    job = SparsifyJob(
        str(files / "model"), tmp_path, sparsity=0.5, algorithm=algorithm, num_batches=2, calibration=calibration
    )
    run_sparsify(job, lambda _line: None)
    assert len(read) == times
