"""Calibrate the masks of an OpenVINO model on its twin in torch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import openvino as ov
import torch
from transformers import PretrainedConfig

from actsparse.algorithms import Measurements
from actsparse.calibration import Decision, Settings
from actsparse.errors import ScopeError
from actsparse.mask import Mask
from actsparse.openvino.twin import make_twin, to_torch_inputs
from actsparse.scopes import Layer, Layers, Site
from actsparse.torch.backend import TorchBackend, TorchCalibrationRun


class TwinCalibration:
    """
    An OpenVINO model's twin.

    Layers have the same names in both, so that scopes are the OpenVINO model's, and so are the masks that come out.

    :param model: The OpenVINO model; not changed.
    :param config: Its configuration.
    :param example: A model input.
    :raises ActsparseError: If there is no twin.
    """

    def __init__(self, model: ov.Model, config: PretrainedConfig, example: Any) -> None:
        self._model = model
        self._example = to_torch_inputs(model, example)
        self._backend = TorchBackend(make_twin(model, config, example))

    def in_call_order(self, found: Layers) -> Layers:
        """
        Sort layers into the order in which the twin calls them: a site is named after the first.

        :param found: The OpenVINO model's layers.
        :raises ScopeError: If the twin does not call one of them.
        """
        called = [layer.name for layer in self._backend.layers(self._example).all]
        missing = next((layer.name for layer in found.all if layer.name not in called), None)
        if missing is not None:
            msg = f"{missing} of the OpenVINO model is no layer that the torch model of its configuration calls"
            raise ScopeError(msg)
        order = {name: number for number, name in enumerate(called)}
        every, of_blocks = (sorted(x, key=lambda layer: order[layer.name]) for x in (found.all, found.of_blocks))
        return replace(found, all=every, of_blocks=of_blocks)

    def gate_functions(self, matched: Sequence[Layer], layers: Sequence[Layer]) -> dict[str, str]:
        """Find the modules that gate feed-forward networks."""
        return self._backend.gate_functions(self._example, matched, layers)

    @contextmanager
    def calibrating(
        self, layouts: Sequence[Sequence[Site]], kept: Mapping[str, Mask], settings: Settings
    ) -> Iterator["TwinCalibrationRun"]:
        """Get ready to calibrate; see `Backend.calibrating`."""
        self._backend.replace_masks(kept)
        with self._backend.calibrating(layouts, kept, settings) as run:
            yield TwinCalibrationRun(self._model, run)


class TwinCalibrationRun:
    """
    A twin that is being calibrated on an OpenVINO model's data; see `actsparse.backend.CalibrationRun`.

    :param model: The OpenVINO model, which tells what its inputs are.
    :param run: The twin's own run.
    """

    def __init__(self, model: ov.Model, run: TorchCalibrationRun) -> None:
        self.passes = run.passes
        self._model = model
        self._run = run

    def measure(self, sites: Sequence[Site], data: list[Any]) -> Measurements:
        """Measure the twin."""
        return self._run.measure(sites, [to_torch_inputs(self._model, batch) for batch in data])

    def calibrate(self, decision: Decision, total: int | None) -> int:
        """Calibrate the twin."""
        return self._run.calibrate(self._for_torch(decision), total)

    def find_biases(self, decision: Decision, masks: Mapping[str, Mask]) -> dict[str, torch.Tensor]:
        """Find them on the twin."""
        return self._run.find_biases(self._for_torch(decision), masks)

    def _for_torch(self, decision: Decision) -> Decision:
        return replace(decision, data=(to_torch_inputs(self._model, batch) for batch in decision.data))
