"""What algorithms ask of a torch model, each thing measured once."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from actsparse.algorithms import (
    Attribution,
    GradientSums,
    MeasurementCache,
    Measurements,
    Movement,
    Trial,
    Trials,
    name_measurement,
    take_part,
)
from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.calibration import Loss
from actsparse.scopes import Site
from actsparse.torch.measurements.attributions import measure_attributions
from actsparse.torch.measurements.blocks import TorchBlock, take_apart
from actsparse.torch.measurements.centres import measure_centres
from actsparse.torch.measurements.divergences import measure_divergences
from actsparse.torch.measurements.gradients import measure_gradients
from actsparse.torch.measurements.output_errors import measure_output_errors
from actsparse.torch.measurements.probe import Probe
from actsparse.torch.measurements.reconstruction_errors import measure_reconstruction_errors
from actsparse.torch.measurements.sensitivities import measure_sensitivities
from actsparse.torch.measurements.sketches import measure_sketches
from actsparse.torch.measurements.up_rms import measure_up_rms
from actsparse.torch.measurements.weights import measure_right_vectors, measure_weight_squares
from actsparse.torch.sparsifier import ActivationSparsifier


class TorchMeasurements(Measurements):
    """
    Measure a torch model on calibration data.

    :param model: The model, with a mask on all that is to be measured; the masks pass everything.
    :param batches: The data; run once for each kind of measurement.
    :param loss: What gradients are of: a function of the model's output and its input. None takes the loss that the
        model computes from the batch's labels, or the next-token cross entropy of a causal language model.
    :param cache: What was measured before of the same model, sites and data; filled in here.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        sites: list[Site],
        sparsifiers: Mapping[str, ActivationSparsifier],
        loss: Loss | None = None,
        cache: MeasurementCache | None = None,
    ) -> None:
        super().__init__(batches, cache)
        self._probe = Probe(model, batches, {site.name: site for site in sites}, sparsifiers, loss)

    def weight_norms(self, site: str) -> torch.Tensor:
        """Measure the columns of a site's weights, decompressed."""
        squares = self.get_or_measure("weights", lambda: measure_weight_squares(self._probe))
        return torch.stack([squares[layer.name] for layer in self._probe.sites[site].layers]).sum(0).sqrt()

    def up_rms(self, site: str) -> torch.Tensor:
        """Measure what a masked tensor is multiplied by before anything else reads it."""
        if not self._probe.sites[site].gate_function:
            return torch.ones(())
        return self.get_or_measure("up_rms", lambda: measure_up_rms(self._probe))[site]

    def sketches(self, importance: Mapping[str, torch.Tensor]) -> Mapping[str, MagnitudeSketch]:
        """Run forwards and count scores."""
        name = name_measurement("sketches", importance)
        return self.get_or_measure(name, lambda: measure_sketches(self._probe, importance))

    def gradients(self) -> Mapping[str, GradientSums]:
        """Run forwards and backwards once for each batch."""
        return self.get_or_measure("gradients", lambda: measure_gradients(self._probe))

    def sensitivities(self) -> Mapping[str, float]:
        """Sparsify one site after the other and see how far the predictions move."""

        def measure() -> dict[str, float]:
            return measure_sensitivities(self._probe, self.sketches(dict.fromkeys(self._probe.sites, torch.ones(()))))

        return self.get_or_measure("sensitivities", measure)

    def attributions(
        self, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> Mapping[str, Attribution]:
        """Run the masked model forwards and backwards, each sequence masked at its own quantiles."""
        batches = take_part(self._probe.batches, part)
        name = name_measurement("attributions", part, sparsity, importance)
        return self.get_or_measure(name, lambda: measure_attributions(self._probe, sparsity, importance, batches))

    def divergences(
        self, trials: Trials, importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> list[list[Movement]]:
        """Run the model forwards, masked in several ways, each sequence at its own quantiles, and without masks."""
        batches = take_part(self._probe.batches, part)
        name = name_measurement("divergences", part, trials, importance)
        return self.get_or_measure(name, lambda: measure_divergences(self._probe, trials, importance, batches))

    def output_errors(
        self, importance: Mapping[str, torch.Tensor], sparsities: Sequence[float]
    ) -> Mapping[str, list[float]]:
        """Leave out more and more of each site's input, all others dense."""
        quantiles = {
            site: [sketch.quantile(s) for s in sparsities] for site, sketch in self.sketches(importance).items()
        }
        up_rms = {site: self.up_rms(site) for site in importance}
        return measure_output_errors(self._probe, importance, quantiles, up_rms)

    def centres(self) -> Mapping[str, tuple[float, float]]:
        """Find what the entries of each site's input crowd around."""
        return self.get_or_measure("centres", lambda: measure_centres(self._probe))

    def right_vectors(self, ranks: Mapping[str, int]) -> Mapping[str, torch.Tensor]:
        """Decompose the weights of sites, the layers of each stacked."""
        name = name_measurement("right vectors", ranks)
        return self.get_or_measure(name, lambda: measure_right_vectors(self._probe, ranks))

    def reconstruction_errors(self, trials: Sequence[Trial], importance: Mapping[str, torch.Tensor]) -> list[float]:
        """Mask one site in several ways, all others dense."""
        return measure_reconstruction_errors(self._probe, trials, importance)

    def blocks(self, layers: Collection[str], importance: Mapping[str, torch.Tensor]) -> Iterator[TorchBlock]:
        """Take the model apart into the elements of its module lists."""
        return take_apart(self._probe, layers, importance, lambda: self.sketches(importance))
