"""Cumulative errors of tail truncation: how far a network's output moves when small contributions are left out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.commands.studies.inspection.networks import Network
from actsparse.errors import DatasetError
from actsparse.scopes.sites import group_sites
from actsparse.sparsify import remove_sparsifiers
from actsparse.torch.insertion import insert_sparsifier
from actsparse.torch.measurements.output_errors import measure_output_errors
from actsparse.torch.measurements.probe import Probe
from actsparse.torch.measurements.sketches import measure_sketches
from actsparse.torch.measurements.weights import measure_weight_squares
from actsparse.torch.sparsifier import ActivationSparsifier

# A layer's error is measured at so many thresholds; in between it is taken for linear. Most are spaced by how many
# contributions they leave out: a single token may have most of a layer's energy. Some are spaced by energy: of a layer
# whose contributions are nearly all zero, the largest are left to tell apart.
QUANTILES, TAILS = 24, 8


class TailErrors:
    """
    The mean relative output error of every network, by threshold: CETT of Sparsing Law.

    For contributions s_i = |a_i| ‖w_i‖ and a threshold τ it is the mean over tokens of ‖Σ a_i w_i over s_i ≤ τ‖ /
    ‖Σ a_i w_i‖. All networks are measured in the same passes over the data, which are three, whatever the error sought.
    """

    def __init__(self, model: nn.Module, networks: list[Network], batches: list[Any]) -> None:
        probe = _make_probe(model, networks, batches)
        try:
            squares = measure_weight_squares(probe)
            self._norms = {network.down.name: squares[network.down.name].sqrt().float() for network in networks}
            sketches = measure_sketches(probe, self._norms)
            self.thresholds = {name: _space_thresholds(sketch) for name, sketch in sketches.items()}
            found = measure_output_errors(probe, self._norms, self.thresholds, {}, batches=batches)
        finally:
            remove_sparsifiers(model)
        self.errors = found

    def entry_thresholds(self, thresholds: Sequence[float]) -> dict[str, torch.Tensor]:
        """
        Turn thresholds for contributions into thresholds for entries.

        :return: τ / ‖w_i‖ for |a_i|, [in_features] by layer; a column of zeros contributes nothing.
        """
        largest = torch.finfo(torch.float32).max
        return {
            name: (tau / self._norms[name]).nan_to_num(0.0, largest, 0.0)
            for name, tau in zip(self.errors, thresholds, strict=True)
        }

    def at(self, thresholds: Sequence[float]) -> list[float]:
        """Read the error of each layer at a threshold."""
        pairs = zip(self.errors.items(), thresholds, strict=True)
        return [float(np.interp(tau, self.thresholds[name], errors)) for (name, errors), tau in pairs]

    def find(self, error: float) -> dict[str, float]:
        """
        Find the largest threshold of each layer that keeps to an error.

        :param error: The error, relative to the output, in (0, 1].
        """
        found = {}
        for name, errors in self.errors.items():
            # An error that falls again does not count: all smaller thresholds have to keep to it.
            rising = np.maximum.accumulate(errors)
            found[name] = float(np.interp(error, *_strictly(rising, self.thresholds[name])))
        return found

    @property
    def largest_fall(self) -> float:
        """By how much an error falls, at most, from one threshold to the next: 0 where CETT is monotone."""
        return max(float(np.max(-np.diff(errors), initial=0.0)) for errors in self.errors.values())


def _space_thresholds(sketch: MagnitudeSketch) -> list[float]:
    zeros = sketch.share(0.0)
    quantiles = [sketch.quantile(zeros + (1 - zeros) * k / QUANTILES) for k in range(1, QUANTILES)]
    tails = [sketch.tail((k / TAILS) ** 2) for k in range(1, TAILS + 1)]
    return sorted({0.0, *quantiles, *tails})


def _strictly(errors: np.ndarray, thresholds: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Of thresholds with the same error, keep the largest."""
    last = np.append(np.diff(errors) > 0, True)
    return errors[last], np.asarray(thresholds)[last]


def _make_probe(model: nn.Module, networks: list[Network], batches: list[Any]) -> Probe:
    if not batches:
        msg = "there is no data to measure errors on"
        raise DatasetError(msg)
    remove_sparsifiers(model)
    sites = group_sites(network.down for network in networks)
    sparsifiers = {}
    for site in sites:
        name = site.layers[0].name
        sparsifiers[name] = ActivationSparsifier(0.0, roles=("ffn.down",), site=name)
        insert_sparsifier(model, name, sparsifiers[name])
    return Probe(model, batches, {site.name: site for site in sites}, sparsifiers, None)
