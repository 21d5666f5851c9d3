"""Check that a torch model computes what an OpenVINO model does."""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
from torch import nn

from actsparse.errors import ActsparseError, shorten_message
from actsparse.openvino.layers import named_calls
from actsparse.openvino.runner import Runner
from actsparse.torch.insertion import intercept_inputs
from actsparse.torch.running import run_model

# By how much logits, or what a layer reads, may differ beside their own norm: f32 in two orders of summation. Another
# weight moves them by more than ten times as much.
TOLERANCE = 1e-3


def require_equal(model: ov.Model, twin: nn.Module, batch: dict[str, Any]) -> None:
    """
    Compare the logits of both, in f32.

    :param model: An OpenVINO model without masks.
    :param twin: The torch model, in evaluation mode.
    :param batch: A model input with `input_ids`.
    :raises ActsparseError: If they differ by more than rounding; names the first layer that reads something else.
    """
    # Masked tokens have no logits that count.
    tokens = {"input_ids": batch["input_ids"]}
    expected = Runner(model).run(tokens).get("logits")
    if expected is None:
        msg = "the OpenVINO model gives no logits, so it is no causal language model"
        raise ActsparseError(msg)
    try:
        with torch.no_grad():
            found = run_model(twin, tokens).logits.numpy()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        msg = f"{type(twin).__name__} cannot run with the weights of the OpenVINO model: {shorten_message(error)}"
        raise ActsparseError(msg) from error
    difference = _differ(found, expected) if found.shape == expected.shape else None
    if difference is not None and difference <= TOLERANCE:
        return
    how = "have another shape" if difference is None else f"differ by {difference:.2g} of their norm"
    name = _first_to_differ(model, twin, tokens)
    where = f"what reaches {name} is the first" if name else "what reaches its Linear layers does not"
    msg = f"{type(twin).__name__} is no twin of the OpenVINO model: logits {how}; {where} to differ"
    raise ActsparseError(msg)


def _differ(found: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-30))
    return difference if np.isfinite(difference) else np.inf


def _first_to_differ(model: ov.Model, twin: nn.Module, tokens: dict[str, Any]) -> str | None:
    """Find the first layer whose input is another in the twin, in the order in which torch calls them."""
    calls = {name: group[0] for name, group in named_calls(model).items()}
    flat = {name: ops.reshape(call.source, np.array([-1]), special_zero=False) for name, call in calls.items()}
    for name, node in flat.items():
        node.output(0).set_names({name})
    results = [ops.result(node) for node in flat.values()]
    part = ov.Model(results, model.get_sinks(), model.get_parameters(), "inputs")  # pyright: ignore[reportGeneralTypeIssues]
    expected = Runner(part).run(tokens)
    found: list[str] = []

    def compare(name: str, x: torch.Tensor) -> torch.Tensor:
        theirs = expected[name]
        if not found and (x.numel() != theirs.size or _differ(x.reshape(-1).numpy(), theirs) > TOLERANCE):
            found.append(name)
        return x

    with torch.no_grad(), intercept_inputs(twin, calls, compare):
        run_model(twin, tokens)
    return found[0] if found else None
