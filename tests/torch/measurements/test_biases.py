"""Biases without training: the mean of what is left out, put back where it helps."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from actsparse import remove_sparsifiers, sparsify_activations
from actsparse.mask import mask_small
from actsparse.torch.insertion import named_sparsifiers, suspend_sparsifiers


class OneLayer(nn.Module):
    """Logits of one layer, whose small inputs have a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return ModelOutput(logits=self.layer(x))


def divergence(model: Any, batches: list[Any]) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            found = model(batch).logits if isinstance(batch, torch.Tensor) else model(**batch).logits
            with suspend_sparsifiers(mask for _, mask in named_sparsifiers(model)):
                dense = model(batch).logits if isinstance(batch, torch.Tensor) else model(**batch).logits
            total += float(F.kl_div(found.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum"))
    return total


def test_it_is_the_mean_of_what_the_mask_leaves_out() -> None:
    torch.manual_seed(1)
    batches = [torch.randn(4, 16) * torch.linspace(0.1, 2, 16) + torch.linspace(0.5, 0, 16) for _ in range(8)]
    model = sparsify_activations(OneLayer(), batches, 0.5, algorithm="magnitude+bias")
    ((_, mask),) = named_sparsifiers(model)
    x = torch.cat(batches)
    assert mask.bias is not None
    torch.testing.assert_close(mask.bias, (x - mask_small(x, mask.threshold)).mean(0))
    with_bias = divergence(model, batches)
    mask.bias = None
    assert with_bias < 0.9 * divergence(model, batches)


@pytest.mark.parametrize("base", ["magnitude", "auto", "magnitude+uniform+rows"])
def test_it_is_never_farther_on_the_batches_held_out(base: str, make_model: Any, make_batches: Any) -> None:
    batches = make_batches(8, batch_size=1, length=24)
    model = sparsify_activations(make_model(), batches, 0.6, algorithm=f"{base}+bias")
    masks = [mask for _, mask in named_sparsifiers(model)]
    biases = [mask.bias for mask in masks]
    assert all(mask.bias is None for mask in masks if mask.rows_of)
    found = divergence(model, batches[3::4])
    for mask in masks:
        mask.bias = None
    without = divergence(model, batches[3::4])
    assert found <= without * (1 + 1e-6)
    # The thresholds are those without a bias.
    thresholds = {name: mask.threshold for name, mask in named_sparsifiers(model)}
    plain = sparsify_activations(remove_sparsifiers(model), batches, 0.6, algorithm=base)
    assert all(torch.equal(mask.threshold, thresholds[name]) for name, mask in named_sparsifiers(plain))
    assert len(biases) == len(masks)
