"""What an algorithm may ask of a model before thresholds are calibrated."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import torch

from actsparse.algorithms.cache import MeasurementCache
from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.errors import ActsparseError
from actsparse.mask import Compensation


class Block(Protocol):
    """
    One of the model's blocks, with what it read from the calibration data.

    :param layers: The layers in it that are to be masked.
    """

    layers: tuple[str, ...]

    def error(self, sparsity: Mapping[str, float]) -> float:
        """
        Run the block with masks.

        :return: The norm of what its output moves by, beside the norm of the dense output.
        """
        ...


class GradientSums:
    """Sums over tokens of a site's input x and the loss's gradient g there, six vectors for any number of tokens."""

    def __init__(self, channels: int) -> None:
        self.tokens = 0
        self.square = torch.zeros(channels, dtype=torch.float64)
        """g²"""
        self.absolute = torch.zeros(channels, dtype=torch.float64)
        """|g|"""
        self.magnitude = torch.zeros(channels, dtype=torch.float64)
        """|x|"""
        self.attribution = torch.zeros(channels, dtype=torch.float64)
        """-g x: by how much the loss is expected to rise when x is left out"""
        self.saliency = torch.zeros(channels, dtype=torch.float64)
        """|g x|"""
        self.correction = torch.zeros(channels, dtype=torch.float64)
        """|x| times the token's gradient norm, halved"""

    def add(self, x: torch.Tensor, g: torch.Tensor) -> None:
        """
        Take in some tokens.

        :param x: The site's input, [..., channels].
        :param g: The gradient there, of the same shape.
        """
        x, g = (t.detach().flatten(0, -2).float() for t in (x, g))
        product = x * g
        norm = g.norm(dim=-1, keepdim=True)
        self.tokens += len(x)
        values = (g.square(), g.abs(), x.abs(), -product, product.abs(), x.abs() * norm / 2)
        for total, value in zip(self.vectors, values, strict=True):
            total += value.sum(0).double().cpu()

    @property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """All sums by channel, in the order above."""
        return self.square, self.absolute, self.magnitude, self.attribution, self.saliency, self.correction


@dataclass(frozen=True)
class Attribution:
    """
    What the masks of one layer do to the predictions of a masked model.

    :param increases: Of each batch Σ -g·(x - x̃), g the gradient of the divergence from the dense model's predictions:
        the layer's part in twice that divergence, as far as it grows quadratically.
    :param energy: Σ a²(x - x̃)², what the masks leave out of all batches.
    """

    increases: tuple[float, ...]
    energy: float


class Movement(NamedTuple):
    """
    How far masks move the predictions on one batch.

    :param divergence: From the dense model's predictions, KL(dense ‖ masked) in nats, a mean over tokens.
    :param loss: How much more a token of the text itself costs, in nats, a mean over tokens; NaN where that is not
        known.
    """

    divergence: float
    loss: float


@dataclass(frozen=True)
class Trial:
    """
    One way to mask what the layers of a site read.

    :param compensation: What compensates for what is left out.
    :param zeros: How much is left out of each layer's input.
    """

    site: str
    compensation: Compensation
    zeros: Mapping[str, float]


# For each batch the ways to mask it: the sparsity of each layer.
Trials = Sequence[Sequence[Mapping[str, float]]]


class Measurements:
    """
    A model with calibration data. Most methods run the data through the dense model, and remember the result.

    What a backend cannot measure, it leaves to this class, which refuses.

    :param batches: The data, all of it in every process of a job.
    :param cache: What was measured before of the same model, sites and data; filled in here.
    """

    subject = "this model"
    """What an error calls the model."""

    def __init__(self, batches: list[Any], cache: MeasurementCache | None = None) -> None:
        self._batches = batches
        self._cache = MeasurementCache() if cache is None else cache

    def get_or_measure(self, what: str, measure: Callable[[], Any]) -> Any:
        """
        Find out what was not found out before of this model, its sites and its data.

        :return: What it gave, now or earlier.
        """
        return self._cache.get_or_measure(what, measure)

    def up_rms(self, site: str) -> torch.Tensor:
        """
        Measure what a masked tensor is multiplied by before anything else reads it.

        :return: Where rows are masked, the root mean square of each of the layer's outputs, [channels]; 1 for a site
            whose layers read the masked tensor.
        """
        return torch.ones(())

    def attributions(
        self, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> Mapping[str, Attribution]:
        """
        Run the masked model forwards and backwards, each sequence masked at its own quantiles.

        :param part: Which part of the data, and how many parts there are.
        """
        self._refuse("attributions")

    def divergences(
        self, trials: Trials, importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> list[list[Movement]]:
        """
        Run the model forwards, masked in several ways, each sequence at its own quantiles; and once without masks.

        :param trials: For each batch the ways to mask it, by the sparsity of each layer.
        :param part: Which part of the data, and how many parts there are.
        :return: For each batch and way how far the predictions move from the dense model's.
        """
        self._refuse("divergences")

    def count_batches(self, part: tuple[int, int]) -> int:
        """
        Count the batches of a part of the data.

        :param part: Which part, and how many parts there are.
        :return: How many batches it has, in all processes together.
        """
        return len(take_part(self._batches, part))

    def weight_norms(self, site: str) -> torch.Tensor:
        """
        Measure the columns of a site's weights.

        :return: The Euclidean norm of each input channel's weights, over all the site's layers, [in_features]; of each
            row's where rows are masked, [out_features].
        """
        self._refuse("weight norms")

    def gradients(self) -> Mapping[str, GradientSums]:
        """
        Run forwards and backwards once for each batch.

        :return: The sums of each site.
        """
        self._refuse("gradients")

    def sensitivities(self) -> Mapping[str, float]:
        """
        Sparsify one site after the other and see how far the model's predictions move.

        :return: For each site the square root of twice the divergence per energy left out.
        """
        self._refuse("sensitivities")

    def output_errors(
        self, importance: Mapping[str, torch.Tensor], sparsities: Sequence[float]
    ) -> Mapping[str, list[float]]:
        """
        Leave out more and more of each site's input, all others dense.

        :return: For each site the mean over tokens of ‖what the outputs move by‖ / ‖outputs‖, without biases.
        """
        self._refuse("output errors")

    def centres(self) -> Mapping[str, tuple[float, float]]:
        """
        Find what the entries of each site's input crowd around.

        :return: Their median, and the mode of their density.
        """
        self._refuse("centres")

    def right_vectors(self, ranks: Mapping[str, int]) -> Mapping[str, torch.Tensor]:
        """
        Decompose the weights of sites, the layers of each stacked.

        :param ranks: How many singular vectors are wanted of each site.
        :return: The leading right ones, [in_features, rank].
        """
        self._refuse("right vectors")

    def reconstruction_errors(self, trials: Sequence[Trial], importance: Mapping[str, torch.Tensor]) -> list[float]:
        """
        Mask one site in several ways, all others dense.

        :return: For each trial the mean over tokens of ‖what the outputs move by‖ / ‖outputs‖, without biases.
        """
        self._refuse("output errors")

    def blocks(self, layers: Collection[str], importance: Mapping[str, torch.Tensor]) -> Iterator[Block]:
        """Take the model apart."""
        self._refuse("blocks")

    def sketches(self, importance: Mapping[str, torch.Tensor]) -> Mapping[str, MagnitudeSketch]:
        """
        Run forwards and count scores.

        :param importance: The importance a of each site, 0-d or [in_features].
        :return: The sketch of a_j |x_j| of each site.
        """
        self._refuse("sketches")

    def _refuse(self, what: str) -> NoReturn:
        msg = f"{self.subject} has no {what}: calibrate the torch model, save_thresholds, and load_thresholds here"
        raise ActsparseError(msg)


def take_part(batches: list[Any], part: tuple[int, int]) -> list[Any]:
    """
    Take some of the data.

    :param part: Which part, and how many parts there are.
    :return: Every n-th batch; all of them where so few leave none.
    """
    number, count = part
    return batches[number::count] or batches
