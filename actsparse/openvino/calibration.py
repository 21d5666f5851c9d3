"""Run calibration data through an OpenVINO model, and see or replace what its layers read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch

from actsparse.calibration import run_each
from actsparse.openvino.graph_masks import group_by_source
from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import Linear
from actsparse.openvino.runner import Runner
from actsparse.openvino.tap import insert_tap
from actsparse.scopes import Site

Intercept = Callable[[str, torch.Tensor, list[float]], list[torch.Tensor]]


def run_intercepted(
    model: ov.Model,
    batches: Iterable[Any],
    sites: Sequence[Site],
    targets: Mapping[str, float],
    intercept: Intercept,
    *,
    total: int | None,
    description: str,
) -> int:
    """
    Run every batch, as far as any of the sites depends on it.

    :param intercept: Called with a site, what it reads, and the targets of its layers; gives what the layers of each
        target get.
    :raises DatasetError: If the model cannot take a batch.
    """
    calls = named_calls(model)
    failures: list[BaseException] = []
    ends: list[ov.Node] = []
    for site in sites:
        by_call = {call.name: targets[layer.name] for layer in site.layers for call in calls[layer.name]}
        for linears in group_by_source([call for layer in site.layers for call in calls[layer.name]]):
            ends.append(_tap(site.name, linears, by_call, intercept, failures))
    # What no site depends on, the head above all, is not computed.
    results = [ops.result(end) for end in ends]
    part = ov.Model(results, model.get_sinks(), model.get_parameters(), "calibration")  # pyright: ignore[reportGeneralTypeIssues]
    runner = Runner(part)

    def run(batch: Any) -> None:
        runner.run(batch)
        if failures:
            raise failures[0]

    return run_each(run, batches, total=total, description=description)


def _tap(
    site: str, linears: list[Linear], by_call: dict[str, float], intercept: Intercept, failures: list[BaseException]
) -> ov.Node:
    wanted = sorted({by_call[linear.name] for linear in linears})
    outputs = insert_tap(linears[0].source, lambda x: intercept(site, x, wanted), len(wanted), failures)
    for linear in linears:
        tapped = outputs[wanted.index(by_call[linear.name])]
        linear.node.input(linear.input_port).replace_source_output(tapped)
    # One entry of the tensor is enough to have the tap run.
    flat = ops.reshape(outputs[0], np.array([-1]), special_zero=False)
    return ops.gather(flat, np.array([0]), np.array(0))
