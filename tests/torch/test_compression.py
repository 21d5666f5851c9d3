"""Weights compressed by NNCF: one vocabulary for torch and OpenVINO models, and one line for whatever NNCF refuses."""

from collections.abc import Callable
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from torch import nn

from actsparse.errors import ActsparseError
from actsparse.openvino.linear import find_linears
from actsparse.openvino.weights import read_weights
from actsparse.torch.compression import INT8_MODES, NNCF_ERRORS, WEIGHT_MODES, compress_int8, compress_weights

X = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))
# In OpenVINO, the type of the weights; signed ones without a zero point.
TYPES = {"int8_asym": "u8", "int8_sym": "i8", "int4_asym": "u4", "int4_sym": "i4"}


class Network(nn.Module):
    """Two layers; NNCF leaves the last one of a model INT8 where the others become INT4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(192, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())


def make_openvino_model() -> ov.Model:
    tensor = x = ops.parameter([-1, 192], np.float32)
    generator = np.random.default_rng(0)
    for width in (192, 64):
        weight = ops.constant(generator.normal(size=(64, width)).astype(np.float32))
        tensor = ops.relu(ops.matmul(tensor, weight, transpose_a=False, transpose_b=True))
    make_graph: Any = ov.Model
    return make_graph([tensor], [x], "two layers")


def test_every_mode_of_the_command_line_has_one_of_nncf() -> None:
    assert TYPES.keys() == WEIGHT_MODES.keys()
    assert {f"int8_{mode}" for mode in INT8_MODES} == {name for name in WEIGHT_MODES if name.startswith("int8")}


@pytest.mark.parametrize("weights", WEIGHT_MODES)
def test_an_openvino_model_gets_the_weights_that_were_asked_for(weights: str) -> None:
    linear, last = find_linears(compress_weights(make_openvino_model(), weights))
    assert linear.constant.get_output_element_type(0).get_type_name() == TYPES[weights]
    assert last.constant.get_output_element_type(0).bitwidth == 8
    # 128 does not divide 192 channels: the group becomes a smaller one.
    assert read_weights(linear).group_size == (64 if weights.startswith("int4") else 192)


@pytest.mark.parametrize("weights", WEIGHT_MODES)
def test_a_torch_model_computes_nearly_the_same(weights: str) -> None:
    model = Network()
    with torch.no_grad():
        expected = model(X)
        found = compress_weights(model, weights, X)(X)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < (0.2 if weights.startswith("int4") else 0.02) * expected.norm()


def test_an_unknown_mode_is_one_line() -> None:
    with pytest.raises(ActsparseError, match="unknown INT8 mode 'asymm'; nearest: asym"):
        compress_int8(Network(), "asymm", X)


@pytest.mark.parametrize("make", [Network, make_openvino_model])
@pytest.mark.parametrize("error", NNCF_ERRORS)
def test_whatever_nncf_refuses_is_one_line(
    error: type[Exception], make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, **options: Any) -> None:
        del model, options
        msg = "not\nthis"
        raise error(msg)

    monkeypatch.setattr(nncf, "compress_weights", refuse)
    with pytest.raises(ActsparseError, match="^nncf cannot compress the weights to int4_sym: not this$"):
        compress_weights(make(), "int4_sym", X)


def test_what_nncf_really_refuses_is_one_line() -> None:
    with pytest.raises(ActsparseError, match="^nncf cannot compress the weights to int8_asym: ") as caught:
        compress_weights(Network(), "int8_asym")
    assert "\n" not in str(caught.value)
