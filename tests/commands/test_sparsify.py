"""What `actsparse sparsify` keeps of an unfinished calibration, and for which other runs."""

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from actsparse.backend import backend_of
from actsparse.commands import sparsify
from actsparse.commands.evaluate import EvaluateJob, load_for_evaluation
from actsparse.commands.sparsify import NEVER_MEASURED_WITH, SparsifyJob, name_calibration, run_sparsify
from actsparse.errors import SourceError
from actsparse.openvino import export_model

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


def test_an_openvino_model_is_no_model_to_sparsify_here(files: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    exported, calibration = export_model(model, tmp_path / "exported", tokenizer), str(files / "calibration.txt")
    job = SparsifyJob(str(exported), tmp_path / "out", sparsity=0.5, calibration=calibration)
    with pytest.raises(SourceError, match="holds an OpenVINO model, and this takes torch weights"):
        run_sparsify(job, lambda _line: None)
    assert not list((tmp_path / "out").iterdir())
    # Beside torch weights, it does not stand in their way, and is what is evaluated.
    model.save_pretrained(exported)
    job = SparsifyJob(str(exported), tmp_path / "out", sparsity=0.5, num_batches=2, calibration=calibration)
    run_sparsify(job, lambda _line: None)
    assert (tmp_path / "out" / "thresholds.safetensors").is_file()
    loaded, int8 = load_for_evaluation(EvaluateJob(str(exported)), lambda _line: None)
    assert (backend_of(loaded.model).name, int8) == ("openvino", None)
