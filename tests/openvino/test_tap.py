"""A tap shows a tensor to Python, hands on what Python returns, and keeps exceptions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch

from actsparse.openvino.tap import insert_tap

# pyright cannot tell the overloads of its constructor apart.
make_graph: Any = ov.Model


def run_tapped(kind: Any, intercept: Callable[..., Any], num_outputs: int, failures: list[Any], x: Any) -> list[Any]:
    parameter = ops.parameter([-1, 2], kind)
    outputs = insert_tap(parameter.output(0), intercept, num_outputs, failures)
    model = make_graph([ops.result(ops.convert(output, "f32")) for output in outputs], [parameter], "tapped")
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [compiled([x])[i].tolist() for i in range(num_outputs)]


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_every_output_is_what_the_function_returned(kind: Any) -> None:
    seen: list[torch.Tensor] = []

    def intercept(x: torch.Tensor) -> list[torch.Tensor]:
        seen.append(x.clone())
        return [x * 2, -x]

    found = run_tapped(kind, intercept, 2, [], np.array([[1.0, 2.0]], kind))
    assert found == [[[2.0, 4.0]], [[-1.0, -2.0]]]
    assert (seen[0].dtype, seen[0].tolist()) == (torch.float32, [[1.0, 2.0]])


def test_an_exception_is_kept_and_the_tensor_passes() -> None:
    error = ValueError("no")

    def intercept(_x: torch.Tensor) -> list[torch.Tensor]:
        raise error

    failures: list[BaseException] = []
    assert run_tapped(np.float32, intercept, 1, failures, np.ones((1, 2), np.float32)) == [[[1.0, 1.0]]]
    assert failures == [error]
