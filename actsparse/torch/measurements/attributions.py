"""What each mask does to the predictions of a model that is masked everywhere."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from actsparse.algorithms import Attribution
from actsparse.runtime import distributed
from actsparse.torch.insertion import watch_gradient
from actsparse.torch.measurements.masks import SequenceMasks
from actsparse.torch.measurements.probe import Probe

# The tokens at the head of a sequence that all others attend to, whose activations are unlike any other's: what is lost
# of them is not what is lost of a text.
SINKS = 1


def measure_attributions(
    probe: Probe, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor], batches: list[Any]
) -> dict[str, Attribution]:
    """
    Run the masked model forwards and backwards, each sequence masked at its own quantiles.

    What gradients are of is the loss the caller gave; else the divergence from the dense model's predictions. The first
    `SINKS` tokens of a sequence are masked and not counted.

    :param sparsity: The sparsity of each layer; those without one are left dense.
    :raises ActsparseError: If the model gives no logits, and there is no loss.
    """
    masks = SequenceMasks(probe, sparsity, importance)
    names = [layer.name for site in probe.sites.values() for layer in site.layers]
    # Of each batch by itself: what several processes have found then adds up to the same, in whatever order.
    increases = {name: torch.zeros(len(batches), dtype=torch.float64) for name in names}
    energies = {name: torch.zeros(len(batches), dtype=torch.float64) for name in names}
    number = 0

    def leave_out(name: str, x: torch.Tensor) -> torch.Tensor:
        dropped = x.detach() - masks.mask(name, x.detach())
        if sparsity.get(name, 0.0) <= 0:
            return x
        if torch.is_grad_enabled():
            scores = _without_sinks(dropped).float() * importance[probe.sparsifiers[name].site].to(x.device)
            energies[name][number] += float(scores.square().sum(dtype=torch.float64))
        # The values of the masked tensor, and the gradient of x itself: see the attribution allocation.
        return watch_gradient(x - dropped, partial(add, name, dropped))

    def add(name: str, dropped: torch.Tensor, g: torch.Tensor) -> None:
        product = _without_sinks(g).float() * _without_sinks(dropped).float()
        increases[name][number] -= float(product.flatten(0, -2).sum(0, dtype=torch.float64).sum())

    def run(own: tuple[int, Any]) -> None:
        nonlocal number
        number, batch = own
        with torch.no_grad(), probe.suspend():
            dense = None if probe.loss is not None else probe.log_probabilities(batch)
        with torch.enable_grad(), probe.watch(leave_out):
            if dense is None:
                loss = probe.compute_loss(batch)
            else:
                found = _without_sinks(probe.log_probabilities(batch))
                loss = F.kl_div(found, _without_sinks(dense), reduction="sum", log_target=True)
            loss.backward()

    numbers = iter(distributed.share(range(len(batches))))
    probe.run_backwards(lambda batch: run((next(numbers), batch)), distributed.share(batches), "attributing")
    distributed.add_up(*increases.values(), *energies.values())
    return {name: Attribution(tuple(increases[name].tolist()), float(energies[name].sum())) for name in names}


def _without_sinks(x: torch.Tensor) -> torch.Tensor:
    """Leave out the first tokens of sequences; what is not laid out in sequences, such as an expert's, stays whole."""
    return x[..., SINKS:, :] if x.ndim > 2 and x.shape[-2] > SINKS else x
