"""A node that shows the tensor going through it to Python, and lets Python replace it."""

from collections.abc import Callable
from typing import Any

import openvino as ov
import openvino.opset13 as ops
import torch

Intercept = Callable[[torch.Tensor], list[torch.Tensor]]


class Tap(ov.Op):
    """
    Give a tensor to a function, and what the function returns to the nodes behind.

    OpenVINO loses the type of an exception on its way through the graph, so the tap keeps it in `failures` and hands
    the tensor on as it is.

    :param inputs: The one output to read, fp32.
    :param intercept: Called with the tensor; returns one tensor of the same shape for each output of the tap.
    """

    def __init__(
        self, inputs: list[Any], intercept: Intercept, num_outputs: int, failures: list[BaseException]
    ) -> None:
        self._settings = (intercept, num_outputs, failures)
        super().__init__(self, inputs)

    def validate_and_infer_types(self) -> None:
        """Give every output the input's type and shape."""
        for index in range(self._settings[1]):
            self.set_output_type(index, self.get_input_element_type(0), self.get_input_partial_shape(0))

    def clone_with_new_inputs(self, new_inputs: list[Any]) -> "Tap":
        """Copy the node."""
        return Tap(new_inputs, *self._settings)

    # What OpenVINO calls has no third parameter.
    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Run the function."""
        intercept, num_outputs, failures = self._settings
        x = torch.from_numpy(inputs[0].data)
        try:
            results = [x] * num_outputs if failures else intercept(x)
        except BaseException as error:
            failures.append(error)
            results = [x] * num_outputs
        for output, result in zip(outputs, results, strict=True):
            output.shape = inputs[0].shape
            output.data[...] = result.numpy()
        return True

    def has_evaluate(self) -> bool:
        """Say that the node runs itself."""
        return True


def insert_tap(
    source: ov.Output, intercept: Intercept, num_outputs: int, failures: list[BaseException]
) -> list[ov.Output]:
    """
    Put a tap behind an output; nothing reads it yet.

    :param intercept: Called with its tensor in fp32.
    :return: The tap's outputs, in the type of the source.
    """
    kind = source.get_element_type()
    wide = source if kind == ov.Type.f32 else ops.convert(source, ov.Type.f32).output(0)
    tap = Tap([wide], intercept, num_outputs, failures)
    outputs = [tap.output(i) for i in range(num_outputs)]
    return outputs if kind == ov.Type.f32 else [ops.convert(output, kind).output(0) for output in outputs]
