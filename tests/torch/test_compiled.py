"""torch.compile beside masks: what is compiled computes what the model as written does, whatever came first."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch

from actsparse import (
    TargetScope,
    load_thresholds,
    measure_sparsity,
    remove_sparsifiers,
    save_thresholds,
    sparsify_activations,
)
from actsparse.evaluation.windows import WindowedText, measure_losses
from actsparse.torch.insertion import named_masks

COMPILE: dict[str, Any] = {"backend": "eager"}


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    torch.compiler.reset()


@pytest.fixture
def run(batches: list[Any]) -> Callable[[Any], torch.Tensor]:
    def run(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**batches[-1]).logits

    return run


def require_agreement(run: Callable[[Any], torch.Tensor], compiled: Any, model: Any) -> torch.Tensor:
    with torch.compiler.set_stance("force_eager"):
        expected = run(model)
    torch.testing.assert_close(run(compiled), expected)
    return expected


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude+uniform+rows"])
def test_a_model_is_masked_after_one_of_its_class_was_compiled(make_model, batches, run, algorithm) -> None:
    dense, masked = make_model(), make_model()
    compiled = torch.compile(dense, **COMPILE)
    before = run(compiled)
    sparsify_activations(masked, batches, 0.7, algorithm=algorithm)
    after = require_agreement(run, torch.compile(masked, **COMPILE), masked)
    assert not torch.allclose(before, after)
    # In turn, and a copy, which nobody has told of masks.
    assert run(compiled).equal(before)
    again = copy.deepcopy(masked)
    torch.testing.assert_close(run(torch.compile(again, **COMPILE)), after)
    assert run(compiled).equal(before)


@pytest.mark.parametrize(
    ("how", "algorithm"),
    [("wrapped", "magnitude+uniform+rows"), ("in place", "layer-fisher+global"), ("blocks in place", "magnitude")],
)
def test_what_is_compiled_is_masked_unmasked_and_loaded(make_model, batches, run, tmp_path, how, algorithm) -> None:
    model = make_model()
    compiled: Any = model
    if how == "wrapped":
        compiled = torch.compile(model, **COMPILE)
    else:
        for module in [model] if how == "in place" else model.model.layers:
            module.compile(**COMPILE)
    before = run(compiled)
    assert sparsify_activations(compiled, batches, 0.7, algorithm=algorithm) is compiled
    after = require_agreement(run, compiled, model)
    assert not torch.allclose(before, after)
    eager = sparsify_activations(make_model(), batches, 0.7, algorithm=algorithm)
    assert named_masks(model) == named_masks(eager)
    assert measure_sparsity(compiled, batches).sparsity == measure_sparsity(eager, batches).sparsity
    save_thresholds(compiled, tmp_path / "t.safetensors")
    remove_sparsifiers(compiled)
    assert run(compiled).equal(before)
    assert load_thresholds(compiled, tmp_path / "t.safetensors") is compiled
    torch.testing.assert_close(run(compiled), after)


def test_masks_of_other_layers_and_tokens_are_not_mistaken_for_each_other(make_model, batches, run) -> None:
    scopes = [TargetScope(roles=(role,)) for role in ("ffn.down", "attention.qkv")]
    masked = [sparsify_activations(make_model(), batches, {scope: 0.7}) for scope in scopes]
    masked.append(sparsify_activations(make_model(), batches, {scopes[0]: 0.7}, tokens="decode"))
    masked.append(sparsify_activations(make_model(), batches, {scopes[0]: 0.7}, skip_first=4))
    results = [require_agreement(run, torch.compile(model, **COMPILE), model) for model in (*masked, *masked)]
    assert all(not a.equal(b) for number, a in enumerate(results[:4]) for b in results[:number])


def test_a_compiled_model_costs_what_the_model_costs(small_language_model) -> None:
    model, tokenizer, pages, batches = small_language_model
    windows = WindowedText.of(model, tokenizer, pages, 64)
    compiled = torch.compile(model, **COMPILE)
    dense = measure_losses(compiled, windows, description="dense")
    sparsify_activations(compiled, batches, 0.6)
    expected = measure_losses(model, windows, description="as written")
    found = measure_losses(compiled, windows, description="compiled")
    assert found == pytest.approx(expected, rel=1e-5)
    assert found != pytest.approx(dense, rel=1e-3)


def test_the_mark_of_a_mask_survives_copies_and_pickles(make_model, batches, run) -> None:
    masked = sparsify_activations(make_model(), batches, 0.7)
    buffer = io.BytesIO()
    torch.save(masked, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for model in (loaded, copy.deepcopy(masked)):
        layer = model.model.layers[0].mlp.down_proj
        assert layer.forward.__self__ is layer
        assert run(model).equal(run(masked))
        remove_sparsifiers(model)
        assert "forward" not in vars(layer)


def test_a_compiled_model_is_exported(make_model, batches, tmp_path: Path) -> None:
    pytest.importorskip("optimum.intel")
    from actsparse.openvino import export_model
    from actsparse.openvino.graph_masks import find_masks

    model: Any = torch.compile(make_model(), **COMPILE)
    sparsify_activations(model, batches, 0.5)
    xml = export_model(model, tmp_path) / "openvino_model.xml"
    assert len(find_masks(ov.Core().read_model(xml))) == 8
