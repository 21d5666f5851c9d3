"""Batches become inputs, and what a language model needs besides tokens is made."""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch

from actsparse.errors import ActsparseError
from actsparse.openvino.inputs import make_inputs

# pyright cannot tell the overloads of its constructor apart.
make_graph: Any = ov.Model

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])


def make_model(**shapes: list[int]) -> ov.Model:
    """Make a model with inputs of these names and shapes, whole numbers but for the cache."""
    parameters = []
    for name, shape in shapes.items():
        kind = np.float32 if name.startswith(("past", "x")) else np.int32 if name == "beam_idx" else np.int64
        parameter = ops.parameter(shape, kind, name=name)
        parameter.output(0).get_tensor().set_names({name.replace("__", ".")})
        parameters.append(parameter)
    return make_graph([ops.result(parameter) for parameter in parameters], parameters, "inputs")


@pytest.fixture
def language_model() -> ov.Model:
    return make_model(
        input_ids=[-1, -1],
        attention_mask=[-1, -1],
        position_ids=[-1, -1],
        beam_idx=[-1],
        past_key_values__0__key=[-1, 2, -1, 8],
    )


def test_what_is_missing_is_made_from_the_shape_of_the_tokens(language_model: ov.Model) -> None:
    inputs = make_inputs(language_model, IDS)
    assert inputs["input_ids"].tolist() == IDS.tolist()
    assert inputs["attention_mask"].tolist() == [[1, 1, 1]] * 2
    assert inputs["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert inputs["beam_idx"].tolist() == [0, 1]
    assert inputs["beam_idx"].dtype == np.int32
    assert inputs["past_key_values.0.key"].shape == (2, 2, 0, 8)


def test_what_is_given_is_kept(language_model: ov.Model) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    for batch in ({"attention_mask": mask, "input_ids": IDS}, (IDS, mask)):
        assert make_inputs(language_model, batch)["attention_mask"].tolist() == mask.tolist()


def test_bert_gets_token_types() -> None:
    inputs = make_inputs(make_model(input_ids=[-1, -1], token_type_ids=[-1, -1]), {"input_ids": IDS})
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0]] * 2


def test_a_model_without_an_attention_mask_takes_one_that_masks_nothing() -> None:
    model = make_model(input_ids=[-1, -1])
    assert list(make_inputs(model, {"input_ids": IDS, "attention_mask": torch.ones(2, 3)})) == ["input_ids"]
    with pytest.raises(ActsparseError, match="no input attention_mask; its inputs: input_ids"):
        make_inputs(model, {"input_ids": IDS, "attention_mask": torch.zeros(2, 3)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_numbers_get_the_type_of_the_input(dtype: torch.dtype) -> None:
    (x,) = make_inputs(make_model(x=[-1, 2]), torch.tensor([[0.5, 2.0]], dtype=dtype)).values()
    assert (x.dtype, x.tolist()) == (np.float32, [[0.5, 2.0]])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((1, 2, 3), "3 entries"),
        ({"x": [[1.0, 2.0, 3.0]], "y": 1}, "no input y"),
        ({"x": [[1.0, 2.0, 3.0]]}, r"shape \(1, 3\)"),
        ("text", "shape"),
        ({}, "the batch has no x"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ActsparseError, match=message):
        make_inputs(make_model(x=[-1, 2]), batch)
