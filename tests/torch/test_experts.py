"""Mixtures of experts: split into Linear layers, the same function, masked like any other."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from actsparse import (
    ActsparseError,
    TargetScope,
    load_thresholds,
    measure_sparsity,
    remove_sparsifiers,
    save_thresholds,
    sparsify_activations,
)
from actsparse.errors import DatasetError, ThresholdsError
from actsparse.torch.experts import SplitExperts, has_split_experts, join_experts, split_experts
from actsparse.torch.insertion import named_sparsifiers

MIXTURES = ("mixtral", "qwen2_moe")
EXPERT_UP = r"model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj"


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(make_batches: Any) -> list[Any]:
    return make_batches(4, batch_size=2, length=48)


def logits(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_split_experts_compute_the_same_on_the_same_memory(mixture: str, make_model: Any, data: list[Any]) -> None:
    model = make_model(mixture)
    expected = logits(model, data[0])
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    original = model.model.layers[0].mlp.experts.gate_up_proj
    assert split_experts(model) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    experts = model.model.layers[0].mlp.experts
    assert len(experts) == 4
    assert experts[0].gate_proj.weight.data_ptr() == original.data_ptr()
    assert torch.equal(torch.cat([experts[3].gate_proj.weight, experts[3].up_proj.weight]), original[3])
    assert torch.allclose(logits(model, data[0]), expected, atol=1e-5)
    assert split_experts(model) == []
    join_experts(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert torch.equal(logits(model, data[0]), expected)


def test_models_without_such_experts_are_left_alone(architecture: str, make_model: Any) -> None:
    model = make_model(architecture)
    assert split_experts(model) == []
    assert not has_split_experts(model)


@pytest.mark.parametrize("algorithm", ["magnitude", "nncf", "auto", "fisher", "teal", "cats"])
def test_every_expert_is_masked(
    algorithm: str, mixture: str, make_model: Any, data: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Greedy runs every block once for each layer and step, over all the data.
    data = data[:1] if algorithm == "teal" else data
    monkeypatch.setattr("actsparse.algorithms.greedy.STEP", 0.25)
    model = sparsify_activations(make_model(mixture), data, 0.5, algorithm=algorithm)
    report = measure_sparsity(model, data)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 2 * 4 * 3
    assert {layer.roles for layer in experts} == {("ffn.gate",), ("ffn.up",), ("ffn.down",)}
    # NNCF's average of batches misses by more where an expert sees a few tokens of each.
    assert report.sparsity == pytest.approx(0.5, abs=0.06 if algorithm == "nncf" else 0.03)


def test_experts_are_named_by_pattern_and_role(make_model: Any, data: list[Any]) -> None:
    model = sparsify_activations(make_model("mixtral"), data, {TargetScope(patterns=[EXPERT_UP]): 0.4})
    assert len(list(named_sparsifiers(model))) == 8
    roles = {TargetScope(roles=("ffn.up",)): 0.4}
    assert len(list(named_sparsifiers(sparsify_activations(make_model("mixtral"), data, roles)))) == 8


def test_removal_and_failure_give_the_model_back(mixture: str, make_model: Any, data: list[Any], snapshot: Any) -> None:
    model = make_model(mixture)
    before = snapshot(model)
    with pytest.raises(DatasetError):
        sparsify_activations(model, [*data, {"input_ids": torch.full((1, 2), 9999)}], 0.5)
    assert snapshot(model) == before
    sparsify_activations(model, data, 0.5)
    assert has_split_experts(model)
    assert snapshot(remove_sparsifiers(model)) == before


def test_int8_takes_split_experts(make_model: Any, compress: Any, data: list[Any]) -> None:
    model = make_model("mixtral")
    split_experts(model)
    expected = logits(model, data[0])
    compressed = compress(model)
    weights = [m.weight.dtype for name, m in compressed.named_modules() if name.endswith("experts.0.up_proj")]
    assert weights == [torch.uint8, torch.uint8]
    # INT8 sends a few tokens to other experts: most are compared.
    difference = (logits(compressed, data[0]) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert difference.median() < 0.1
    sparsify_activations(compressed, data, 0.5, algorithm="auto")
    assert measure_sparsity(compressed, data).sparsity == pytest.approx(0.5, abs=0.05)
    # These weights are no longer the ones that transformers keeps: the model stays split.
    remove_sparsifiers(compressed)
    assert has_split_experts(compressed)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_stay_split(copied: Any, make_model: Any, data: list[Any]) -> None:
    model = sparsify_activations(make_model("mixtral"), data, 0.5)
    twin = copied(model)
    assert torch.equal(logits(twin, data[0]), logits(model, data[0]))
    assert "original" not in twin.model.layers[0].mlp.experts.__dict__
    remove_sparsifiers(twin)
    assert isinstance(twin.model.layers[0].mlp.experts, SplitExperts)


def test_thresholds_go_to_a_model_that_is_not_split_yet(
    make_model: Any, data: list[Any], tmp_path: Path, snapshot: Any
) -> None:
    model = sparsify_activations(make_model("mixtral"), data, 0.5, algorithm="auto")
    save_thresholds(model, tmp_path / "file")
    fresh = load_thresholds(make_model("mixtral"), tmp_path / "file")
    assert torch.equal(logits(fresh, data[0]), logits(model, data[0]))
    assert torch.equal(logits(load_thresholds(model, tmp_path / "file"), data[0]), logits(fresh, data[0]))
    other = make_model("qwen2_moe")
    before = snapshot(other)
    with pytest.raises(ThresholdsError, match="another model"):
        load_thresholds(other, tmp_path / "file")
    assert snapshot(other) == before


def test_an_expert_that_no_token_reaches_is_named(make_model: Any, make_batches: Any) -> None:
    tiny = make_batches(1, batch_size=1, length=1)
    with pytest.raises(DatasetError, match=r"layer model\.layers\.0\.mlp\.experts\..* received no activations"):
        sparsify_activations(make_model("mixtral"), tiny, 0.5)


@pytest.mark.parametrize("options", [{"tokens": "decode"}, {"skip_first": 2}])
def test_experts_cannot_tell_where_a_token_stood(options: Any, make_model: Any, data: list[Any]) -> None:
    with pytest.raises(ActsparseError, match="experts see single tokens"):
        sparsify_activations(make_model("mixtral"), data, 0.5, **options)
