"""The first tokens of a prompt pass unmasked, if asked for."""

from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch

from actsparse import ActsparseError, load_thresholds, measure_sparsity, save_thresholds, sparsify_activations
from actsparse.commands.sparsify import SparsifyJob
from actsparse.sparsify import remove_sparsifiers
from actsparse.torch.insertion import intercept_outputs, named_sparsifiers
from actsparse.torch.sparsifier import ActivationSparsifier


def test_the_first_tokens_pass_and_the_rest_is_masked() -> None:
    mask = ActivationSparsifier(0.5, skip_first=2)
    mask.threshold.fill_(1.0)
    x = torch.tensor([0.5, 2.0, -0.5]).repeat(2, 4, 1)
    expected = x.clone()
    expected[:, 2:, 0] = expected[:, 2:, 2] = 0
    assert torch.equal(mask(x), expected)
    # All of a short prompt passes; a single token is one that is decoded.
    assert torch.equal(mask(x[:, :2]), x[:, :2])
    assert torch.equal(mask(x[:, :1]), torch.tensor([0.0, 2.0, 0.0]).repeat(2, 1, 1))


@pytest.mark.parametrize("algorithm", ["magnitude", "nncf", "auto", "fisher"])
def test_the_rest_meets_the_target(algorithm: str, make_model: Any, make_batches: Any) -> None:
    batches = make_batches(1, batch_size=1, length=40)
    model = sparsify_activations(make_model(), batches, 0.5, algorithm=algorithm, skip_first=8)
    zeros: dict[str, float] = {}

    def count(name: str, x: torch.Tensor) -> torch.Tensor:
        assert x[:, :8].count_nonzero() > 0.9 * x[:, :8].numel()
        zeros[name] = float((x[:, 8:] == 0).float().mean())
        return x

    masks = dict(named_sparsifiers(model))
    with intercept_outputs(masks, count), torch.no_grad():
        model(**batches[0])
    assert len(zeros) == 14
    for name, mask in masks.items():
        assert zeros[name] == pytest.approx(mask.allocated_sparsity, abs=0.01), name
    # What passes is counted: sparsity is that of all tokens.
    assert measure_sparsity(model, batches).sparsity == pytest.approx(0.5 * 32 / 40, abs=0.02)


def test_a_thresholds_file_keeps_it_and_openvino_refuses_it(
    make_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    model = sparsify_activations(make_model(), batches, 0.5, skip_first=3)
    with torch.no_grad():
        expected = model(**batches[0]).logits
        save_thresholds(model, tmp_path / "file")
        remove_sparsifiers(model)
        load_thresholds(model, tmp_path / "file")
        assert torch.equal(model(**batches[0]).logits, expected)
    with pytest.raises(ActsparseError, match="--skip-first is for torch alone"):
        SparsifyJob("default", tmp_path, sparsity=0.5, accelerate=True, skip_first=1)
    from actsparse.openvino import export_model

    with pytest.raises(ActsparseError, match="calibrate without skip_first"):
        export_model(model, tmp_path / "exported")
    remove_sparsifiers(model)
    converted = ov.Core().read_model(export_model(model, tmp_path / "dense") / "openvino_model.xml")
    with pytest.raises(ActsparseError, match="skip_first"):
        load_thresholds(converted, tmp_path / "file")
    with pytest.raises(ActsparseError, match="leave skip_first out"):
        sparsify_activations(converted, batches, 0.5, skip_first=1)


@pytest.mark.parametrize("bad", [-1, 1.5, True, "2"])
def test_what_is_no_number_of_tokens_is_refused(bad: Any, llama: Any, batches: list[Any]) -> None:
    with pytest.raises(ActsparseError, match="skip_first is"):
        sparsify_activations(llama, batches, 0.5, skip_first=bad)
