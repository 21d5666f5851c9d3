"""OpenVINO models behind the door: masks in the graph, calibrated on a copy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import openvino as ov
import torch

from actsparse.calibration import Decision, Passes, Settings
from actsparse.errors import ActsparseError, ScopeError
from actsparse.mask import Mask
from actsparse.openvino.calibration import run_intercepted
from actsparse.openvino.counting import OpenVinoZeroCounter
from actsparse.openvino.layers import find_openvino_layers, measure_sizes, name_gate_functions
from actsparse.openvino.masks import masks_of, replace_masks
from actsparse.openvino.measurements import OpenVinoMeasurements, can_measure
from actsparse.openvino.runner import OpenVinoLanguageModel, Runner
from actsparse.openvino.twin_calibration import TwinCalibration, TwinCalibrationRun
from actsparse.runtime import distributed
from actsparse.scopes import Layer, Layers, LayerSize, Site
from actsparse.sparsity_report import ZeroCounter


class OpenVinoBackend:
    """
    An OpenVINO model; see `actsparse.backend.Backend` for its methods.

    :param owner: What wraps it, as optimum-intel's models do; else the model again.
    """

    name = "openvino"

    def __init__(self, model: ov.Model, owner: Any) -> None:
        self._model = model
        self._owner = owner
        # What calibrates in the model's place, where an algorithm asks for more than an OpenVINO model tells.
        self._needs_twin = False
        self._twin: TwinCalibration | None = None

    def check(self, settings: Settings) -> None:
        """Refuse what takes torch: several processes and first tokens; the rest, where no torch model can be made."""
        if distributed.count_processes() > 1:
            msg = "an OpenVINO model is calibrated by one process: calibrate the torch model, and load its thresholds"
            raise ActsparseError(msg)
        if settings.skip_first:
            msg = "the masks of an OpenVINO model cannot let the first tokens pass: leave skip_first out"
            raise ActsparseError(msg)
        self._needs_twin = settings.algorithm.needs_data and not can_measure(settings.algorithm)
        if self._needs_twin and not hasattr(self._owner, "config"):
            msg = (
                f"{settings.algorithm.name} measures what an openvino.Model does not tell: give an OVModelForCausalLM, "
                "of which load_causal_lm makes one; or calibrate the torch model, save_thresholds, and load_thresholds "
                "here"
            )
            raise ActsparseError(msg)

    def editing(self) -> AbstractContextManager[None]:
        """Get ready for nothing: everything is tried on a copy."""
        return nullcontext()

    def layers(self, example: Any) -> Layers:
        """Read the layers off the graph without its masks; with a twin, in the order in which that calls them."""
        found = find_openvino_layers(self._copy({}))
        if not found.all:
            msg = "the OpenVINO model has no Linear layers to sparsify"
            raise ScopeError(msg)
        if not self._needs_twin:
            return found
        self._twin = TwinCalibration(self._model, self._owner.config, example)
        return self._twin.in_call_order(found)

    def sizes(self) -> dict[str, LayerSize]:
        """Measure every Linear layer."""
        return measure_sizes(self._model)

    def gate_functions(self, example: Any, matched: Sequence[Layer], layers: Sequence[Layer]) -> dict[str, str]:  # noqa: ARG002
        """Find them on the twin, or without one in the graph."""
        if self._twin:
            return self._twin.gate_functions(matched, layers)
        return name_gate_functions(self._model, [layer.name for layer in matched])

    def masks(self) -> dict[str, Mask]:
        """List the masks by layer."""
        return masks_of(self._model)

    def replace_masks(self, masks: Mapping[str, Mask]) -> None:
        """Rewrite the graph, and make an optimum-intel model compile it anew."""
        if any(mask.skip_first for mask in masks.values()):
            msg = "the first tokens pass unmasked (skip_first), which masks of an OpenVINO model cannot do"
            raise ActsparseError(msg)
        replace_masks(self._model, masks)
        if hasattr(self._owner, "clear_requests"):
            self._owner.clear_requests()

    @contextmanager
    def calibrating(
        self,
        layouts: Sequence[Sequence[Site]],
        kept: Mapping[str, Mask],
        settings: Settings,
    ) -> Iterator["OpenVinoCalibrationRun | TwinCalibrationRun"]:
        """Copy the model with the masks that stay, or put those on the twin."""
        if self._twin is None:
            yield OpenVinoCalibrationRun(self._copy(kept), settings)
            return
        with self._twin.calibrating(layouts, kept, settings) as run:
            yield run

    @contextmanager
    def count_zeros(self) -> Iterator[ZeroCounter]:
        """Count in a copy of the model."""
        yield OpenVinoZeroCounter(self._model, getattr(self._owner, "config", None))

    def language_model(self) -> Callable[..., Any]:
        """Compile the model, with everything in f32."""
        return OpenVinoLanguageModel(Runner(self._model), getattr(self._owner, "config", None))

    def _copy(self, masks: Mapping[str, Mask]) -> ov.Model:
        copy = self._model.clone()
        replace_masks(copy, masks)
        return copy


class OpenVinoCalibrationRun:
    """
    A copy of an OpenVINO model to be calibrated; see `actsparse.backend.CalibrationRun`.

    :param model: The copy; spoilt by this.
    """

    def __init__(self, model: ov.Model, settings: Settings) -> None:
        self.passes = Passes()
        self._model = model
        self._settings = settings

    def measure(self, sites: Sequence[Site], data: list[Any]) -> OpenVinoMeasurements:
        """Measure what the graph tells."""
        return OpenVinoMeasurements(self._model, data, sites, self._settings.cache, self.passes)

    def calibrate(self, decision: Decision, total: int | None) -> int:
        """Let Python see, and mask, what the layers read."""
        estimates = decision.estimates

        def intercept(site: str, x: torch.Tensor, wanted: list[float]) -> list[torch.Tensor]:
            estimates.update(site, x)
            return [estimates.mask_batch(site, x, target) for target in wanted]

        count = run_intercepted(
            self._model,
            decision.data,
            decision.sites,
            decision.plan.zeros,
            intercept,
            total=total,
            description="calibrating",
        )
        self.passes.forwards += count
        return count

    def find_biases(self, decision: Decision, masks: Mapping[str, Mask]) -> dict[str, torch.Tensor]:
        """Find none: whoever asks for biases is calibrated on a twin."""
        raise NotImplementedError
