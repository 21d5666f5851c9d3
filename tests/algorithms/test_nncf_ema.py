"""Parity with NNCF: the same thresholds bit for bit, the same logits."""

import copy
from dataclasses import dataclass
from typing import Any

import nncf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nncf.experimental.torch.sparsify_activations import TargetScope as NncfTargetScope
from nncf.experimental.torch.sparsify_activations import sparsify_activations as nncf_sparsify_activations
from nncf.experimental.torch.sparsify_activations.torch_backend import ActivationsSparsifier as NncfSparsifier
from nncf.torch.function_hook.wrapper import get_hook_storage

from actsparse import TargetScope, sparsify_activations
from actsparse.algorithms.nncf_ema import NncfMovingAverage
from actsparse.torch.insertion import named_sparsifiers
from actsparse.torch.layers import find_layers, trace_graph

# NNCF itself cannot calibrate in bfloat16: it goes through numpy, which has no such type.
FLOAT_TYPES = (torch.float32, torch.float16, torch.float64)


def calibrate_nncf(batches: list[torch.Tensor], target: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
    sparsifier = NncfSparsifier(target)
    sparsifier.freeze = False
    masked = [sparsifier(batch) for batch in batches]
    return sparsifier.running_threshold, masked


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@given(data=st.data())
def test_the_moving_average_is_nncfs_bit_for_bit(dtype: torch.dtype, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    seed, target = data.draw(st.integers(0, 1000)), data.draw(st.floats(0.001, 1))
    generator = torch.Generator().manual_seed(seed)
    # Coarse values, so that some are equal and some are zero.
    batches = [(torch.randn(1, n, 4, generator=generator) * 8).round().div(8).to(dtype) for n in sizes]
    expected, expected_masked = calibrate_nncf(batches, target)
    estimator = NncfMovingAverage((target,))
    for batch, masked in zip(batches, expected_masked, strict=True):
        estimator.update(batch)
        assert torch.equal(estimator.mask_batch(batch, target), masked)
    assert torch.equal(estimator.threshold(target), expected)
    assert estimator.threshold(target).dtype == expected.dtype


def test_an_average_computed_by_hand() -> None:
    estimator = NncfMovingAverage((0.5,))
    for value in (1.0, 2.0, 4.0):
        estimator.update(torch.full((1, 3, 2), value))
    # Weights 0.64, 0.8 and 1, divided by their sum.
    assert estimator.threshold(0.5).item() == pytest.approx((0.64 * 1 + 0.8 * 2 + 1 * 4) / 2.44, rel=1e-6)


@dataclass(frozen=True)
class ParityCase:
    """Scopes that both libraries understand."""

    name: str
    targets: tuple[tuple[dict[str, Any], float], ...]
    ignored: dict[str, Any] | None = None


CASES = [
    ParityCase("all", (({"types": ["linear"]}, 0.5),)),
    ParityCase("two scopes", (({"patterns": [".*linear/0"]}, 0.3), ({"patterns": [".*linear/1"]}, 0.7))),
    ParityCase("ignored", (({"patterns": [".*"]}, 0.4),), {"patterns": [".*linear/0"]}),
    ParityCase("all and next to nothing", (({"patterns": [".*linear/0"]}, 1e-6), ({"patterns": [".*linear/1"]}, 1.0))),
]
# NNCF knows GPT-2's Conv1D as another kind of operation and sparsifies only its head.
SUPPORTED = ("llama", "qwen3", "gemma3", "phi3", "mistral", "gpt_neox", "opt", "bert")


def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def sparsify_with_nncf(model: Any, batches: list[Any], case: ParityCase) -> tuple[Any, dict[str, torch.Tensor]]:
    layers = {node: layer.name for layer in find_layers(model, trace_graph(model, batches[0])) for node in layer.nodes}
    targets = {NncfTargetScope(**rules): target for rules, target in case.targets}
    ignored = nncf.IgnoredScope(**case.ignored) if case.ignored else None
    sparse = nncf_sparsify_activations(model, nncf.Dataset(batches), targets, ignored)  # pyright: ignore[reportArgumentType]
    hooks = {name: hook for name, hook in get_hook_storage(sparse).named_hooks() if isinstance(hook, NncfSparsifier)}
    nodes = {name.removeprefix("pre_hooks.").rpartition("__")[0]: hook for name, hook in hooks.items()}
    return sparse, {layers[node]: hook.running_threshold for node, hook in nodes.items()}


def assert_parity(model: Any, batches: list[Any], case: ParityCase) -> None:
    ours = copy.deepcopy(model)
    theirs, expected = sparsify_with_nncf(model, batches, case)
    targets = {TargetScope(**rules): target for rules, target in case.targets}
    ignored = nncf.IgnoredScope(**case.ignored) if case.ignored else None
    sparsify_activations(ours, nncf.Dataset(batches), targets, ignored, algorithm="nncf")
    found = {name: sparsifier for name, sparsifier in named_sparsifiers(ours)}
    assert found.keys() == expected.keys()
    for name, sparsifier in found.items():
        assert torch.equal(sparsifier.threshold, expected[name].to(torch.float32)), name
    assert torch.equal(run(ours, batches[0]), run(theirs, batches[0]))


@pytest.mark.parametrize("name", SUPPORTED)
def test_thresholds_and_logits_are_nncfs_on_every_architecture(name: str, make_model: Any, batches: list[Any]) -> None:
    assert_parity(make_model(name), batches, CASES[0])


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_thresholds_and_logits_are_nncfs_for_every_scope(case: ParityCase, make_model: Any, batches: list[Any]) -> None:
    assert_parity(make_model("llama"), batches, case)


def test_thresholds_and_logits_are_nncfs_in_half_precision(make_model: Any, batches: list[Any]) -> None:
    assert_parity(make_model("llama", dtype=torch.float16), batches, CASES[0])


@pytest.mark.parametrize("mode", [nncf.CompressWeightsMode.INT8_SYM, nncf.CompressWeightsMode.INT8_ASYM], ids=str)
def test_thresholds_and_logits_are_nncfs_on_compressed_weights(
    mode: nncf.CompressWeightsMode, make_model: Any, batches: list[Any], compress: Any
) -> None:
    assert_parity(compress(make_model("llama"), mode), batches, CASES[0])


def test_batches_of_several_sizes_and_orders_give_nncfs_thresholds(make_model: Any, make_batches: Any) -> None:
    mixed = [*make_batches(2, batch_size=3, length=5), *make_batches(2, batch_size=1, length=20)]
    assert_parity(make_model("llama"), mixed, CASES[0])
    assert_parity(make_model("llama"), mixed[::-1], CASES[0])


SCRIPT = """
from {package} import TargetScope, sparsify_activations

sparse_model = sparsify_activations(
    model,
    nncf.Dataset(data, lambda tokens: {{"input_ids": tokens}}),
    {{
        TargetScope(names=["model/mlp/down_proj/linear/0", "model/mlp/down_proj/linear/1"]): 0.6,
        TargetScope(patterns=[".*up_proj.*", ".*gate_proj.*"]): 0.3,
    }},
    ignored_scope=nncf.IgnoredScope(names=["model/mlp/gate_proj/linear/1"]),
)
with torch.no_grad():
    logits = sparse_model(**example).logits
"""


def run_script(package: str, model: Any, batches: list[Any]) -> dict[str, Any]:
    names = {"model": model, "data": [b["input_ids"] for b in batches], "example": batches[0]}
    names |= {"nncf": nncf, "torch": torch}
    exec(SCRIPT.format(package=package), names)
    return names


def test_a_script_written_for_nncf_runs_with_its_import_changed(make_model: Any, make_batches: Any) -> None:
    # Long sequences, which make the default algorithm's quantile nearly the moving average.
    batches = make_batches(6, batch_size=4, length=48)
    theirs = run_script("nncf.experimental.torch.sparsify_activations", make_model("llama"), batches)
    ours = run_script("actsparse", make_model("llama"), batches)
    expected = {
        name.removeprefix("pre_hooks.").rpartition("__")[0]: hook.running_threshold.item()
        for name, hook in get_hook_storage(theirs["sparse_model"]).named_hooks()
    }
    layers = find_layers(make_model("llama"), trace_graph(make_model("llama"), batches[0]))
    nodes = {layer.name: layer.nodes[0] for layer in layers}
    found = {nodes[name]: s.threshold.item() for name, s in named_sparsifiers(ours["sparse_model"])}
    assert found == pytest.approx(expected, rel=0.05)
    difference = (ours["logits"] - theirs["logits"]).norm() / theirs["logits"].norm()
    assert difference.item() < 0.1
