"""How far predictions move, beside what a plain comparison of two models' outputs finds."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from actsparse import sparsify_activations
from actsparse.algorithms import MeasurementCache
from actsparse.scopes import group_sites
from actsparse.torch.insertion import named_sparsifiers, suspend_sparsifiers
from actsparse.torch.layers import find_layers, trace_graph
from actsparse.torch.measurements.torch_measurements import TorchMeasurements


def measure(model: Any, batches: list[Any], *ways: float) -> Any:
    layers = [layer for layer in find_layers(model, trace_graph(model, batches[0])) if "layers" in layer.name]
    sparsify_activations(model, batches, 0.5)
    masks = dict(named_sparsifiers(model))
    measurements = TorchMeasurements(model, batches, group_sites(layers), masks, cache=MeasurementCache())
    importance = dict.fromkeys((mask.site for mask in masks.values()), torch.ones(()))
    trials = [[dict.fromkeys(masks, share) for share in ways]] * len(batches)
    return measurements.divergences(trials, importance, (0, 1))


@torch.no_grad()
def test_divergence_and_loss_are_those_of_the_outputs(make_model: Any, make_batches: Any) -> None:
    model, batches = make_model(), make_batches(3, batch_size=2, length=40)
    batches[1]["attention_mask"] = torch.ones_like(batches[1]["input_ids"])
    batches[1]["attention_mask"][0, -5:] = 0
    found = measure(model, batches, 0.0, 1.0)
    for batch, (unmasked, silent) in zip(batches, found, strict=True):
        assert unmasked == pytest.approx((0.0, 0.0), abs=1e-6)
        labels = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(())) == 0, -100)[:, 1:].flatten()
        outputs = []
        for share in (0.0, 1.0):
            sparsify_activations(model, batches, share)
            outputs.append(model(**batch).logits.log_softmax(-1))
        dense, masked = outputs
        divergence = F.kl_div(masked.flatten(0, 1), dense.flatten(0, 1), reduction="batchmean", log_target=True)
        losses = [F.nll_loss(x[:, :-1].flatten(0, 1), labels, ignore_index=-100) for x in (dense, masked)]
        assert silent.divergence == pytest.approx(float(divergence), rel=1e-4)
        assert silent.loss == pytest.approx(float(losses[1] - losses[0]), rel=1e-3, abs=1e-6)


def test_a_model_that_writes_no_text_has_no_loss_of_it(make_model: Any, make_batches: Any) -> None:
    model, batches = make_model(), make_batches(2)
    model.can_generate = lambda: False
    assert all(movement.loss != movement.loss for row in measure(model, batches, 0.5) for movement in row)


def test_masks_are_off_again_afterwards(make_model: Any, make_batches: Any) -> None:
    model, batches = make_model(), make_batches(1)
    with torch.no_grad():
        dense = model(**batches[0]).logits
        measure(model, batches, 0.9)
        with suspend_sparsifiers(mask for _, mask in named_sparsifiers(model)):
            assert model(**batches[0]).logits.equal(dense)
