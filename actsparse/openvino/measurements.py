"""What algorithms ask of an OpenVINO model: weight norms and distributions of scores; it has no gradients."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import openvino as ov
import openvino.opset13 as ops
import torch

from actsparse.algorithms import (
    Attribution,
    Block,
    GradientSums,
    Known,
    Movement,
    Trial,
    Trials,
    name_sketches,
    take_part,
)
from actsparse.calibration import blame_layer
from actsparse.errors import ActsparseError
from actsparse.openvino.calibration import run_intercepted
from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import Linear
from actsparse.scopes import Site
from actsparse.statistics import MagnitudeSketch


class OpenVinoMeasurements:
    """
    Measure an OpenVINO model on calibration data; see `actsparse.algorithms.Measurements`.

    :param model: The model without the masks that are to be found.
    :param batches: The data.
    :param sites: What its layers read.
    :param known: What was measured before of the same model, sites and data; filled in here.
    """

    def __init__(self, model: ov.Model, batches: list[Any], sites: list[Site], known: Known) -> None:
        self._model = model
        self._batches = batches
        self._known = known
        self._sites = {site.name: site for site in sites}

    def weight_norms(self, site: str) -> torch.Tensor:
        """
        Measure the columns of a site's weights, decompressed.

        :param site: The site.
        :return: The norm of each input channel's weights over the site's layers, [in_features].
        """
        squares = self._known.once("weights", self._measure_squares)
        return torch.stack([squares[layer.name] for layer in self._sites[site].layers]).sum(0).sqrt()

    def sketches(self, importance: Mapping[str, torch.Tensor]) -> Mapping[str, MagnitudeSketch]:
        """
        Run forwards and count scores.

        :param importance: a of each site, 0-d or [in_features].
        :return: The sketch of a_j |x_j| of each site.
        """
        return self._known.once(name_sketches(importance), lambda: self._measure_sketches(importance))

    def _measure_sketches(self, importance: Mapping[str, torch.Tensor]) -> dict[str, MagnitudeSketch]:
        found = {site: MagnitudeSketch() for site in importance}

        def count(site: str, x: torch.Tensor, wanted: list[float]) -> list[torch.Tensor]:
            with blame_layer(site):
                found[site].merge(MagnitudeSketch.of(x * importance[site]))
            return [x] * len(wanted)

        sites = [site for name, site in self._sites.items() if name in importance]
        alike = {layer.name: 0.0 for site in sites for layer in site.layers}
        total = len(self._batches)
        run_intercepted(
            self._model.clone(), self._batches, sites, alike, count, total=total, description="counting"
        )  # fmt: skip
        return found

    def gradients(self) -> Mapping[str, GradientSums]:
        """
        Refuse: OpenVINO computes none.

        :raises ActsparseError: Always.
        """
        _refuse("gradients")

    def sensitivities(self) -> Mapping[str, float]:
        """
        Refuse: they are measured on torch models.

        :raises ActsparseError: Always.
        """
        _refuse("sensitivities")

    def once(self, what: Any, measure: Callable[[], Any]) -> Any:
        """
        Find out what was not found out before of this model, its sites and its data.

        :param what: Its name.
        :param measure: Finds it out.
        :return: What it gave, now or earlier.
        """
        return self._known.once(what, measure)

    def multipliers(self, site: str) -> torch.Tensor:  # noqa: ARG002
        """
        Measure what a masked tensor is multiplied by: inputs of layers are, by nothing.

        :param site: The site.
        :return: 1.
        """
        return torch.ones(())

    def attributions(
        self, sparsity: Mapping[str, float], importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> Mapping[str, Attribution]:
        """
        Refuse: they need gradients.

        :raises ActsparseError: Always.
        """
        _refuse("attributions")

    def divergences(
        self, trials: Trials, importance: Mapping[str, torch.Tensor], part: tuple[int, int]
    ) -> list[list[Movement]]:
        """
        Refuse: they are measured on torch models.

        :raises ActsparseError: Always.
        """
        _refuse("divergences")

    def count_batches(self, part: tuple[int, int]) -> int:
        """
        Count the batches of a part of the data.

        :param part: Which part, and how many parts there are.
        :return: How many batches it has.
        """
        return len(take_part(self._batches, part))

    def output_errors(
        self, importance: Mapping[str, torch.Tensor], sparsities: Sequence[float]
    ) -> Mapping[str, list[float]]:
        """
        Refuse: they are measured on torch models.

        :raises ActsparseError: Always.
        """
        _refuse("output errors")

    def blocks(self, layers: Collection[str], importance: Mapping[str, torch.Tensor]) -> Iterator[Block]:
        """
        Refuse: an OpenVINO model has no blocks that run on their own.

        :raises ActsparseError: Always.
        """
        _refuse("blocks")

    def centres(self) -> Mapping[str, tuple[float, float]]:
        """
        Refuse: stand-ins are chosen on torch models.

        :raises ActsparseError: Always.
        """
        _refuse("centres")

    def right_vectors(self, ranks: Mapping[str, int]) -> Mapping[str, torch.Tensor]:
        """
        Refuse: stand-ins are chosen on torch models.

        :raises ActsparseError: Always.
        """
        _refuse("right vectors")

    def trial_errors(self, trials: Sequence[Trial], importance: Mapping[str, torch.Tensor]) -> list[float]:
        """
        Refuse: stand-ins are chosen on torch models.

        :raises ActsparseError: Always.
        """
        _refuse("output errors")

    def _measure_squares(self) -> dict[str, torch.Tensor]:
        calls = named_calls(self._model)
        names = [layer.name for site in self._sites.values() for layer in site.layers]
        results = [ops.result(_sum_squares(calls[name][0])) for name in names]
        model = ov.Model(results, [], "norms")  # pyright: ignore[reportGeneralTypeIssues]
        found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])
        return {name: torch.from_numpy(found[i].reshape(-1).copy()) for i, name in enumerate(names)}


def _sum_squares(linear: Linear) -> ov.Node:
    weight = ops.convert(linear.node.input_value(linear.weight_port), ov.Type.f32)
    outputs = -2 if linear.is_weight_transposed else -1
    return ops.reduce_sum(ops.multiply(weight, weight), ops.constant([outputs]))


def _refuse(what: str) -> NoReturn:
    msg = f"an OpenVINO model has no {what}: calibrate the torch model, save_thresholds, and load_thresholds here"
    raise ActsparseError(msg)
