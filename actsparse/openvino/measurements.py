"""What algorithms ask of an OpenVINO model: weight norms and distributions of scores; it has no gradients."""

from collections.abc import Mapping, Sequence
from typing import Any

import openvino as ov
import openvino.opset13 as ops
import torch

from actsparse.algorithms import ESTIMATORS, Algorithm, MeasurementCache, Measurements, name_measurement
from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.calibration import Passes, blame_layer
from actsparse.openvino.calibration import run_intercepted
from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import Linear
from actsparse.scopes import Site

# What asks for nothing but weight norms and sketches.
_SCORES = ("magnitude", "weight-norm")
_ALLOCATIONS = ("uniform", "global", *ESTIMATORS)


def can_measure(algorithm: Algorithm) -> bool:
    """Tell whether an algorithm asks for nothing that an OpenVINO model does not tell."""
    is_known = algorithm.score in _SCORES and algorithm.allocation in _ALLOCATIONS
    return is_known and not (algorithm.rows or algorithm.compensation or algorithm.candidates)


class OpenVinoMeasurements(Measurements):
    """
    Measure an OpenVINO model on calibration data.

    :param model: The model without the masks that are to be found.
    :param cache: What was measured before of the same model, sites and data; filled in here.
    """

    subject = "an OpenVINO model"

    def __init__(
        self, model: ov.Model, batches: list[Any], sites: Sequence[Site], cache: MeasurementCache, passes: Passes
    ) -> None:
        super().__init__(batches, cache)
        self._model = model
        self._sites = {site.name: site for site in sites}
        self._passes = passes

    def weight_norms(self, site: str) -> torch.Tensor:
        """Measure the columns of a site's weights, decompressed."""
        squares = self.get_or_measure("weights", self._measure_squares)
        return torch.stack([squares[layer.name] for layer in self._sites[site].layers]).sum(0).sqrt()

    def sketches(self, importance: Mapping[str, torch.Tensor]) -> Mapping[str, MagnitudeSketch]:
        """Run forwards and count scores."""
        name = name_measurement("sketches", importance)
        return self.get_or_measure(name, lambda: self._measure_sketches(importance))

    def _measure_sketches(self, importance: Mapping[str, torch.Tensor]) -> dict[str, MagnitudeSketch]:
        found = {site: MagnitudeSketch() for site in importance}

        def count(site: str, x: torch.Tensor, wanted: list[float]) -> list[torch.Tensor]:
            with blame_layer(site):
                found[site].merge(MagnitudeSketch.of(x * importance[site]))
            return [x] * len(wanted)

        sites = [site for name, site in self._sites.items() if name in importance]
        alike = {layer.name: 0.0 for site in sites for layer in site.layers}
        total = len(self._batches)
        self._passes.forwards += run_intercepted(
            self._model.clone(), self._batches, sites, alike, count, total=total, description="counting"
        )
        return found

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
