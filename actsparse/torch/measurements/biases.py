"""The biases that make up for what masks leave out: its mean, where that brings the predictions nearer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from actsparse.calibration import run_each
from actsparse.mask import mask_small
from actsparse.runtime import distributed
from actsparse.torch.insertion import intercept_outputs
from actsparse.torch.measurements.divergences import measure_from
from actsparse.torch.measurements.probe import Probe
from actsparse.torch.running import evaluation_mode, run_batches, run_model


def find_biases(probe: Probe, held_out: Sequence[Any]) -> dict[str, torch.Tensor]:
    """
    Measure the mean of what each mask leaves out of the dense model's activations, and choose where to put it back.

    Put back, it brings a layer's output nearer to the dense one. All means together may still move the predictions
    away: errors of several layers make up for each other. So sites of one role are taken together, and of the roles
    those that bring predictions nearer, as many of them as do so together.

    :param probe: The model; its masks have their thresholds.
    :param held_out: Batches on which predictions are compared; of this process.
    :return: The bias of each site that has one, [channels].
    """
    means = _measure_means(probe)
    by_role: dict[tuple[str, ...], list[str]] = {}
    for name in means:
        by_role.setdefault(tuple(sorted({r for layer in probe.sites[name].layers for r in layer.roles})), []).append(
            name
        )
    roles = list(by_role.values())
    none, *alone = _compare(probe, held_out, means, [[], *roles])
    gains = [none - divergence for divergence in alone]
    order = sorted((i for i, gain in enumerate(gains) if gain > 0), key=lambda i: -gains[i])
    together = [sum((roles[i] for i in order[:count]), []) for count in range(1, len(order) + 1)]
    divergences = _compare(probe, held_out, means, together)
    best = min(range(len(together)), key=divergences.__getitem__, default=None)
    chosen = [] if best is None or divergences[best] >= none else together[best]
    return {name: means[name] for name in chosen}


def _measure_means(probe: Probe) -> dict[str, torch.Tensor]:
    sites = [name for name, site in probe.sites.items() if not site.gate_function]
    sums = {name: torch.zeros(probe.channels(name), dtype=torch.float64) for name in sites}
    counts = {name: torch.zeros((), dtype=torch.float64) for name in sites}

    def count(name: str, x: torch.Tensor) -> torch.Tensor:
        if name in sums:  # a site is named after its first layer
            rest = x.detach().flatten(0, -2).float()
            left_out = rest - mask_small(rest, probe.sparsifiers[name].threshold)
            sums[name] += left_out.sum(0).double().cpu()
            counts[name] += len(rest)
        return x

    own = distributed.share(probe.batches)
    with probe.watch(count):
        run_batches(probe.model, own, total=len(own), description="measuring what is left out", reads_logits=False)
    distributed.add_up(*sums.values(), *counts.values())
    return {name: (sums[name] / counts[name].clamp(min=1)).float() for name in sites}


def _compare(
    probe: Probe, batches: Sequence[Any], means: Mapping[str, torch.Tensor], trials: Sequence[Collection[str]]
) -> list[float]:
    """Measure how far predictions are from the dense model's with the means of some sites, for each trial."""
    if not trials:
        return []
    found = torch.zeros(len(trials), dtype=torch.float64)

    def run(batch: Any) -> None:
        with probe.suspend():
            measure = measure_from(probe, batch, run_model(probe.model, batch))
        for number, sites in enumerate(trials):
            with intercept_outputs(probe.sparsifiers, _add(probe, means, sites)):
                found[number] += measure(run_model(probe.model, batch)).divergence

    with evaluation_mode(probe.model), torch.no_grad():
        run_each(run, batches, total=len(batches), description="comparing biases")
    distributed.add_up(found)
    return found.tolist()


def _add(
    probe: Probe, means: Mapping[str, torch.Tensor], sites: Collection[str]
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def add(name: str, x: torch.Tensor) -> torch.Tensor:
        site = probe.sparsifiers[name].site
        return x + means[site].to(x) if site in sites else x

    return add
