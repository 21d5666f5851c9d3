"""What algorithms ask of a torch model, each thing measured once."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from actsparse.algorithms import Attribution, GradientSums, Known, Movement, Trial, Trials, name_sketches, take_part
from actsparse.measurements.attributions import measure_attributions
from actsparse.measurements.blocks import TorchBlock, take_apart
from actsparse.measurements.centres import measure_centres
from actsparse.measurements.divergences import measure_divergences
from actsparse.measurements.gradients import measure_gradients
from actsparse.measurements.multipliers import measure_multipliers
from actsparse.measurements.output_errors import measure_output_errors
from actsparse.measurements.probe import Loss, Probe
from actsparse.measurements.sensitivities import measure_sensitivities
from actsparse.measurements.sketches import measure_sketches
from actsparse.measurements.trial_errors import measure_trial_errors
from actsparse.measurements.weights import measure_right_vectors, measure_weight_squares
from actsparse.scopes import Site
from actsparse.sparsifier import ActivationSparsifier
from actsparse.statistics import MagnitudeSketch


class TorchMeasurements:
    """
    Measure a torch model on calibration data; see `actsparse.algorithms.Measurements`.

    :param model: The model, with a mask on all that is to be measured; the masks pass everything.
    :param batches: The data; run once for each kind of measurement.
    :param sites: What the layers read.
    :param sparsifiers: The masks by layer name.
    :param loss: What gradients are of: a function of the model's output and its input. None takes the loss that the
        model computes from the batch's labels, or the next-token cross entropy of a causal language model.
    :param known: What was measured before of the same model, sites and data; filled in here.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        sites: list[Site],
        sparsifiers: Mapping[str, ActivationSparsifier],
        loss: Loss | None = None,
        known: Known | None = None,
    ) -> None:
        self._probe = Probe(model, batches, {site.name: site for site in sites}, sparsifiers, loss)
        self._known = known or Known()

    def once(self, what: Any, measure: Callable[[], Any]) -> Any:
        """
        Find out what was not found out before of this model, its sites and its data.

        :param what: Its name.
        :param measure: Finds it out.
        :return: What it gave, now or earlier.
        """
        return self._known.once(what, measure)

    def weight_norms(self, site: str) -> torch.Tensor:
        """
        Measure the columns of a site's weights, decompressed.

        :param site: The site.
        :return: The norm of each input channel's weights over the site's layers, [in_features]; of each row's where
            rows are masked, [out_features].
        """
        squares = self.once("weights", lambda: measure_weight_squares(self._probe))
        return torch.stack([squares[layer.name] for layer in self._probe.sites[site].layers]).sum(0).sqrt()

    def multipliers(self, site: str) -> torch.Tensor:
        """
        Measure what a masked tensor is multiplied by before anything else reads it.

        :param site: The site.
        :return: Where rows are masked, the root mean square of each of the layer's outputs, [out_features]; else 1.
        """
        if not self._probe.sites[site].gate_function:
            return torch.ones(())
        return self.once("multipliers", lambda: measure_multipliers(self._probe))[site]

    def sketches(self, importance: Mapping[str, torch.Tensor]) -> Mapping[str, MagnitudeSketch]:
        """
        Run forwards and count scores.

        :param importance: a of each site, 0-d or [channels].
        :return: The sketch of a_j |x_j| of each site.
        """
        return self.once(name_sketches(importance), lambda: measure_sketches(self._probe, importance))

    def gradients(self) -> Mapping[str, GradientSums]:
        """
        Run forwards and backwards once for each batch.

        :return: The sums of each site.
        :raises ActsparseError: If there is no loss to take gradients of.
        :raises DatasetError: If a gradient is NaN or infinite; names the layer.
        """
        return self.once("gradients", lambda: measure_gradients(self._probe))

    def sensitivities(self) -> Mapping[str, float]:
        """
        Sparsify one site after the other and see how far the predictions move.

        :return: For each site √(2 KL / energy left out).
        :raises ActsparseError: If the model gives no logits.
        """

        def measure() -> dict[str, float]:
            return measure_sensitivities(self._probe, self.sketches(dict.fromkeys(self._probe.sites, torch.ones(()))))

        return self.once("sensitivities", measure)

    def attributions(
        self, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> Mapping[str, Attribution]:
        """
        Run the masked model forwards and backwards, each sequence masked at its own quantiles.

        :param sparsity: The sparsity of each layer; those without one are left dense.
        :param importance: a of each site.
        :param part: Which part of the data, and how many parts there are; a single batch is taken for every part.
        :return: What each layer's mask does.
        :raises ActsparseError: If the model gives no logits, and there is no loss.
        """
        batches = take_part(self._probe.batches, part)
        what = ("attributions", part, *sorted(sparsity.items()), name_sketches(importance))
        return self.once(what, lambda: measure_attributions(self._probe, sparsity, importance, batches))

    def divergences(
        self, trials: Trials, importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> list[list[Movement]]:
        """
        Run the model forwards, masked in several ways, each sequence at its own quantiles; and once without masks.

        :param trials: For each batch the ways to mask it, by the sparsity of each layer.
        :param importance: a of each site.
        :param part: Which part of the data, and how many parts there are; a single batch is taken for every part.
        :return: For each batch and way how far the predictions move from the dense model's.
        :raises ActsparseError: If the model gives no logits, and there is no loss.
        """
        batches = take_part(self._probe.batches, part)
        ways = tuple(tuple(tuple(sorted(way.items())) for way in row) for row in trials)
        what = ("divergences", part, ways, name_sketches(importance))
        return self.once(what, lambda: measure_divergences(self._probe, trials, importance, batches))

    def count_batches(self, part: tuple[int, int]) -> int:
        """
        Count the batches of a part of the data.

        :param part: Which part, and how many parts there are.
        :return: How many batches it has, in all processes together.
        """
        return len(take_part(self._probe.batches, part))

    def output_errors(
        self, importance: Mapping[str, torch.Tensor], sparsities: Sequence[float]
    ) -> Mapping[str, list[float]]:
        """
        Leave out more and more of each site's input, all others dense.

        :param importance: a of each site.
        :param sparsities: How much to leave out.
        :return: For each site the mean over tokens of ‖what the outputs move by‖ / ‖outputs‖.
        """
        quantiles = {
            site: [sketch.quantile(s) for s in sparsities] for site, sketch in self.sketches(importance).items()
        }
        multipliers = {site: self.multipliers(site) for site in importance}
        return measure_output_errors(self._probe, importance, quantiles, multipliers)

    def centres(self) -> Mapping[str, tuple[float, float]]:
        """
        Find what the entries of each site's input crowd around.

        :return: Their median, and the mode of their density.
        """
        return self.once("centres", lambda: measure_centres(self._probe))

    def right_vectors(self, ranks: Mapping[str, int]) -> Mapping[str, torch.Tensor]:
        """
        Decompose the weights of sites, the layers of each stacked.

        :param ranks: How many singular vectors are wanted of each site.
        :return: The leading right ones, [in_features, rank].
        """
        return self.once(("right vectors", *ranks.items()), lambda: measure_right_vectors(self._probe, ranks))

    def trial_errors(self, trials: Sequence[Trial], importance: Mapping[str, torch.Tensor]) -> list[float]:
        """
        Mask one site in several ways, all others dense.

        :param trials: What to try.
        :param importance: a of each site.
        :return: For each trial the mean over tokens of ‖what the outputs move by‖ / ‖outputs‖, without biases.
        """
        return measure_trial_errors(self._probe, trials, importance)

    def blocks(self, layers: Collection[str], importance: Mapping[str, torch.Tensor]) -> Iterator[TorchBlock]:
        """
        Take the model apart into the elements of its module lists.

        :param layers: The layers to mask.
        :param importance: a of each site.
        :return: The blocks that have any of them.
        :raises ActsparseError: If a layer is in none, or the weights are compressed.
        """
        return take_apart(self._probe, layers, importance, lambda: self.sketches(importance))
