"""The door to a model's framework: what the call, the thresholds file and the evaluation need of either."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from actsparse.algorithms import Measurements
from actsparse.calibration import Decision, Passes, Settings
from actsparse.errors import ActsparseError
from actsparse.mask import Mask
from actsparse.scopes import Layer, Layers, LayerSize, Site
from actsparse.sparsity_report import ZeroCounter


class CalibrationRun(Protocol):
    """
    A model that is being calibrated: the masks to be found pass everything, those that stay are at work.

    :param passes: How often it has run.
    """

    passes: Passes

    def measure(self, sites: Sequence[Site], data: list[Any]) -> Measurements:
        """
        Get ready to measure the model.

        :param sites: What is to be masked.
        :param data: The data, all of it.
        :return: What algorithms ask.
        """
        ...

    def calibrate(self, decision: Decision, total: int | None) -> int:
        """
        Run the data through the model, which masks itself with the estimates made so far.

        :param decision: Sites, plan, data and estimates; the estimates have seen the data afterwards.
        :param total: How many batches there are, where it is known.
        :return: How many were run.
        :raises DatasetError: If the model cannot take a batch, or it gives NaN or infinite activations.
        """
        ...

    def find_biases(self, decision: Decision, masks: Mapping[str, Mask]) -> Mapping[str, torch.Tensor]:
        """
        Find what to add to what masks let pass.

        :param decision: The sites and the data.
        :param masks: The masks by layer, with their thresholds.
        :return: The bias of each site that has one, [channels].
        """
        ...


class Backend(Protocol):
    """
    A model of one framework.

    :param name: The framework, ``torch`` or ``openvino``.
    """

    name: str

    def check(self, settings: Settings) -> None:
        """
        Refuse what this framework's models cannot do.

        :param settings: What is asked for.
        :raises ActsparseError: If that is impossible here.
        """
        ...

    def editing(self) -> AbstractContextManager[None]:
        """
        Get ready to place masks; what fails inside leaves the model as it was.

        :return: A context in which the model's layers can be masked.
        """
        ...

    def layers(self, example: Any) -> Layers:
        """
        Find the Linear layers that the model calls, as they are without masks.

        :param example: A model input; None for a language model, which any tokens do.
        :return: The layers, and the graph that they were found on.
        :raises DatasetError: If the model cannot take the input.
        :raises ScopeError: If it calls no Linear layer.
        """
        ...

    def sizes(self) -> dict[str, LayerSize]:
        """
        Measure every Linear layer.

        :return: The sizes by name.
        """
        ...

    def gate_functions(self, example: Any, matched: Sequence[Layer], layers: Sequence[Layer]) -> dict[str, str]:
        """
        Find the activation functions f of gated networks down(f(gate(x)) * up(x)), where masks of rows sit.

        :param example: A model input, or None as for `layers`.
        :param matched: The layers among which up is looked for.
        :param layers: All Linear layers.
        :return: The name of f by the name of up.
        :raises ScopeError: If f cannot be masked.
        """
        ...

    def masks(self) -> dict[str, Mask]:
        """
        List the model's masks.

        :return: The masks by layer.
        """
        ...

    def replace_masks(self, masks: Mapping[str, Mask]) -> None:
        """
        Mask layers, and no others; no masks at all leave the model what it was before it had any.

        :param masks: The masks by layer.
        :raises ActsparseError: If the model cannot carry one of them; it is then unchanged.
        """
        ...

    def calibrating(
        self, layouts: Sequence[Sequence[Site]], kept: Mapping[str, Mask], settings: Settings
    ) -> AbstractContextManager[CalibrationRun]:
        """
        Get ready to calibrate masks; afterwards the model is as it was, whatever happens.

        :param layouts: The sites of every way to place masks that is to be tried.
        :param kept: The masks that are to stay, by layer.
        :param settings: How the masks are to be.
        :return: A context with the model that is calibrated.
        """
        ...

    def count_zeros(self) -> AbstractContextManager[ZeroCounter]:
        """
        Count zeros behind the masks.

        :return: A context with the counter.
        """
        ...

    def language_model(self) -> Callable[..., Any]:
        """
        Look at the model as one that gives logits.

        :return: What takes `input_ids`, [sequences, tokens], and returns an object with `.logits`.
        """
        ...


def backend_of(model: Any) -> Backend:
    """
    Find out which framework a model belongs to; nothing else in the package asks.

    :param model: A torch module, `openvino.Model` or optimum-intel model.
    :return: Its backend.
    :raises ActsparseError: If it is none of these.
    """
    openvino_model = find_openvino_model(model)
    if openvino_model is not None:
        from actsparse.openvino.backend import OpenVinoBackend  # only who has such a model has imported OpenVINO

        return OpenVinoBackend(openvino_model, model)
    if isinstance(model, nn.Module):
        from actsparse.torch.backend import TorchBackend  # takes a second to import

        return TorchBackend(model)
    msg = f"the model must be a torch module or an OpenVINO model, not {type(model).__name__}"
    raise ActsparseError(msg)


def language_model(model: Any) -> Callable[..., Any]:
    """
    Look at a model as one that gives logits.

    :param model: A model of a backend, or anything that gives logits already.
    :return: What takes `input_ids`, [sequences, tokens], and returns an object with `.logits`.
    """
    is_model = isinstance(model, nn.Module) or find_openvino_model(model) is not None
    return backend_of(model).language_model() if is_model else model


def find_openvino_model(model: Any) -> Any:
    """
    Find the OpenVINO model that something is, or wraps as optimum-intel's models do, without importing either library.

    :param model: Anything.
    :return: The `openvino.Model`, or None.
    """
    # Who holds an OpenVINO model has imported the library.
    model_type = getattr(sys.modules.get("openvino"), "Model", None)
    if model_type is None:
        return None
    if isinstance(model, model_type):
        return model
    inner = vars(model).get("model") if hasattr(model, "clear_requests") else None
    return inner if isinstance(inner, model_type) else None
