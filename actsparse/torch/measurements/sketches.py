"""Distributions of scores in the dense model."""

from collections.abc import Mapping

import torch

from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.calibration import blame_layer, require_seen
from actsparse.runtime import distributed
from actsparse.torch.measurements.probe import Probe


def measure_sketches(probe: Probe, importance: Mapping[str, torch.Tensor]) -> dict[str, MagnitudeSketch]:
    """
    Run forwards and count scores.

    :param importance: The importance a of each site, 0-d or [channels].
    :raises DatasetError: If no data went through one, or it is not finite.
    """
    found = {site: MagnitudeSketch() for site in importance}

    def count(name: str, x: torch.Tensor) -> torch.Tensor:
        if name in found:
            with blame_layer(name):
                found[name].merge(MagnitudeSketch.of(x.float() * importance[name].to(x.device)))
        return x

    with probe.watch(count):
        probe.run(distributed.share(probe.batches), "counting")
    distributed.add_up(*(sketch.counts for sketch in found.values()))
    require_seen(found, (site for site, sketch in found.items() if sketch.counts.any()))
    return found
