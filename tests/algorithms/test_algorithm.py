"""Typed algorithms and their strings are the same thing."""

from typing import Any, get_args

import pytest
import torch

from actsparse import ActsparseError, Algorithm, sparsify_activations
from actsparse.algorithms import ALLOCATIONS, COMPENSATIONS, SCORES, get_algorithm
from actsparse.algorithms.allocations import AllocationName
from actsparse.algorithms.compensations import CompensationName
from actsparse.algorithms.scores import ScoreName
from actsparse.torch.insertion import named_sparsifiers


def test_editors_complete_what_the_registries_hold() -> None:
    assert get_args(ScoreName) == tuple(SCORES)
    assert get_args(AllocationName) == tuple(ALLOCATIONS)
    assert get_args(CompensationName) == tuple(COMPENSATIONS)


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (Algorithm("magnitude"), "magnitude"),
        (Algorithm("magnitude", "nncf-ema"), "nncf"),
        (Algorithm("weight-norm"), "wina"),
        (Algorithm("layer-fisher", "global"), "layer-fisher+global"),
        (Algorithm("magnitude", "attribution", rows=True), "magnitude+attribution+rows"),
        (Algorithm("gate", rows=True), "cats"),
        (Algorithm("weight-norm", compensation="low-rank"), "r-sparse"),
        (Algorithm("magnitude", "greedy", rows=True, compensation="shift"), "teal+rows+shift"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_string_is_the_shorthand(typed: Algorithm, text: str) -> None:
    assert get_algorithm(text) == typed
    assert get_algorithm(typed) is typed
    assert get_algorithm(typed.name) == typed


def test_the_call_takes_either(make_model: Any, batches: list[Any]) -> None:
    found = [
        {name: mask.threshold for name, mask in named_sparsifiers(model)}
        for algorithm in (Algorithm("magnitude", "global"), "magnitude+global")
        for model in [sparsify_activations(make_model("llama"), batches, 0.5, algorithm=algorithm)]
    ]
    assert all(torch.equal(threshold, found[1][name]) for name, threshold in found[0].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("magnitud",), "unknown score 'magnitud'; nearest: magnitude"),
        (("magnitude", "globl"), "unknown allocation 'globl'; nearest: global"),
        (("magnitude", "global", False, "shft"), "unknown compensation 'shft'; nearest: shift"),
        (("fisher", "nncf-ema"), "goes with the score magnitude, not fisher"),
        (("magnitude", "nncf-ema", True), "leave \\+rows out"),
    ],
)
def test_what_there_is_not_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ActsparseError, match=message):
        Algorithm(*arguments)


def test_what_is_no_algorithm_is_refused(make_model: Any, batches: list[Any]) -> None:
    wrong: Any = 3
    with pytest.raises(ActsparseError, match="unknown algorithm 3"):
        sparsify_activations(make_model("llama"), batches, 0.5, algorithm=wrong)
