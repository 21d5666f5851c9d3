"""Masks of rows in OpenVINO models: found, moved, counted, and run as one operation."""

from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest

from actsparse import ActsparseError, load_thresholds, measure_sparsity, save_thresholds, sparsify_activations
from actsparse.openvino import accelerate, count_masks, export_model
from actsparse.openvino.acceleration import is_accelerated
from actsparse.openvino.graph_masks import find_masks, insert_mask, insert_row_mask, remove_masks
from actsparse.openvino.linear import Linear, find_linears
from actsparse.openvino.runner import EXACT
from actsparse.sparsify import remove_sparsifiers
from actsparse.torch.compression import compress_int8

pytestmark = pytest.mark.slow

make_graph: Any = ov.Model
FEATURES, HIDDEN = 128, 384


def make_network(
    mode: str | None, *, group_size: int = 0, masks: str = "gate up down", tokens: str = "all", activation: str = "silu"
) -> ov.Model:
    """Make down(f(gate(x)) * up(x)) with random weights, compressed and masked."""
    rng = np.random.default_rng(0)
    x = ops.parameter([1, -1, FEATURES], np.float32)

    def layer(name: str, source: Any, inputs: int, outputs: int) -> Any:
        weight = rng.normal(size=(outputs, inputs)) / inputs**0.5
        # Exact in f16, which weights that are not compressed are multiplied in.
        node = ops.matmul(source, ops.constant(weight.astype(np.float16).astype(np.float32)), False, True)
        node.set_friendly_name(name)
        return node

    functions = {"silu": ops.swish, "relu": ops.relu, "gelu_tanh": lambda y: ops.gelu(y, "tanh")}
    functions["relu_squared"] = lambda y: ops.power(ops.relu(y), np.float32(2))
    functions["relu_times_relu"] = lambda y: ops.multiply(z := ops.relu(y), z)
    gated = functions[activation](layer("gate", x, FEATURES, HIDDEN))
    hidden = ops.multiply(gated, layer("up", x, FEATURES, HIDDEN))
    model = make_graph([ops.result(layer("down", hidden, HIDDEN, 72))], [x], "network")
    if mode is not None:
        settings: dict[str, Any] = {"group_size": group_size, "all_layers": True} if group_size else {}
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode[mode], **settings)
    linears = layers_of(model)
    if "up" in masks:
        insert_row_mask(linears["up"], np.linspace(0.05, 0.4, HIDDEN), tokens)
    for name, threshold in (("gate", 0.5), ("down", 0.2)):
        if name in masks:
            insert_mask([linears[name]], threshold, tokens)
    return model


def layers_of(model: ov.Model) -> dict[str, Linear]:
    return {linear.name: linear for linear in find_linears(model)}


def run(model: ov.Model, x: np.ndarray) -> np.ndarray:
    return ov.Core().compile_model(model, "CPU", EXACT)([x])[0]


def inputs(length: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(1, length, FEATURES)).astype(np.float32)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def operations(model: ov.Model) -> list[str]:
    return sorted(
        x.get_type_name() for x in model.get_ops() if "Sparse" in x.get_type_name() or "Gated" in x.get_type_name()
    )


def test_a_mask_of_rows_is_found_and_removed() -> None:
    model = make_network(None)
    masks = {mask.linears[0].name: mask for mask in find_masks(model)}
    assert {name: mask.is_of_rows for name, mask in masks.items()} == {"gate": False, "up": True, "down": False}
    assert masks["up"].channels == HIDDEN
    assert masks["gate"].channels == FEATURES
    dense = run(make_network(None, masks=""), inputs(3))
    assert error(run(model, inputs(3)), dense) > 0.05
    assert remove_masks(model) == 3
    assert np.array_equal(run(model, inputs(3)), dense)
    assert count_masks(model) == 0


def test_a_mask_of_rows_zeroes_what_its_layer_is_multiplied_by() -> None:
    model = make_network(None, masks="up")
    (mask,) = find_masks(model)
    probe = make_graph([ops.result(mask.source), ops.result(mask.select)], model.get_parameters(), "probe")
    source, masked = ov.Core().compile_model(probe, "CPU", EXACT)([inputs(5)]).values()
    assert np.array_equal(masked, np.where(np.abs(source) <= mask.threshold, 0, source))


def test_a_layer_whose_output_is_no_factor_is_refused() -> None:
    model = make_network(None, masks="")
    with pytest.raises(ActsparseError, match="is not multiplied"):
        insert_row_mask(layers_of(model)["gate"], 0.1)


@pytest.mark.parametrize("length", [1, 6, 70])
@pytest.mark.parametrize(
    ("mode", "group_size"),
    [(None, 0), ("INT8_ASYM", 0), ("INT8_SYM", 0), ("INT4_ASYM", 64), ("INT4_SYM", 128)],
)
def test_the_operation_equals_the_portable_graph(mode: str | None, group_size: int, length: int) -> None:
    x = inputs(length)
    expected = run(make_network(mode, group_size=group_size), x)
    for exact, bound in ((True, 2e-6), (False, 0.05)):
        model = make_network(mode, group_size=group_size)
        done = accelerate(model, exact=exact)
        assert [(site.operation, site.layers) for site in done.accelerated] == [
            ("GatedFeedForward", ("gate", "up", "down"))
        ]
        assert not done.kept
        assert is_accelerated(model)
        assert error(run(model, x), expected) < bound


@pytest.mark.parametrize("activation", ["relu", "relu_squared", "relu_times_relu", "gelu_tanh"])
@pytest.mark.parametrize("masks", ["up", "gate up", "up down"])
def test_what_has_no_mask_of_its_own_runs_dense(masks: str, activation: str) -> None:
    expected = run(make_network("INT8_ASYM", masks=masks, activation=activation), inputs(4))
    model = make_network("INT8_ASYM", masks=masks, activation=activation)
    accelerate(model, exact=True)
    assert operations(model) == ["GatedFeedForward"]
    assert error(run(model, inputs(4)), expected) < 2e-6


def test_decode_masks_let_prompts_pass() -> None:
    dense, decode = make_network("INT8_ASYM", masks=""), make_network("INT8_ASYM", tokens="decode")
    assert not accelerate(decode, exact=True).kept
    assert error(run(decode, inputs(5)), run(dense, inputs(5))) < 2e-6
    assert error(run(decode, inputs(1)), run(make_network("INT8_ASYM"), inputs(1))) < 2e-6


def test_groups_that_no_line_holds_keep_the_layer_with_a_reason() -> None:
    model = make_network("INT4_ASYM", group_size=32, masks="gate up")
    expected = run(make_network("INT4_ASYM", group_size=32, masks="gate up"), inputs(3))
    done = accelerate(model, exact=True)
    assert [site.layers for site in done.kept] == [("up",)]
    assert "no multiple of 64" in done.kept[0].reason
    assert operations(model) == ["SparseLinear"]
    assert error(run(model, inputs(3)), expected) < 2e-6


@pytest.fixture
def masked(make_model: Any, make_batches: Any) -> Any:
    batches = make_batches(2, batch_size=1, length=24)
    for batch in batches:
        batch["attention_mask"] = batch["input_ids"] * 0 + 1
    model = compress_int8(make_model(), "asym", batches[0])
    return sparsify_activations(model, batches, 0.5, algorithm="auto"), batches


def test_masks_move_between_torch_and_openvino(masked: Any, tmp_path: Path) -> None:
    model, batches = masked
    save_thresholds(model, tmp_path / "torch")
    folder = export_model(model, tmp_path / "exported")
    converted = ov.Core().read_model(folder / "openvino_model.xml")
    ours, theirs = measure_sparsity(model, batches), measure_sparsity(converted, batches)
    assert {layer.name for layer in theirs.layers} == {layer.name for layer in ours.layers}
    for layer in theirs.layers:
        same = next(x for x in ours.layers if x.name == layer.name)
        assert layer.sparsity == pytest.approx(same.sparsity, abs=0.05), layer.name
        assert (layer.roles, layer.target_sparsity, layer.site) == (same.roles, same.target_sparsity, same.site)
    save_thresholds(converted, tmp_path / "openvino")
    remove_masks(converted)
    load_thresholds(converted, tmp_path / "torch")
    loaded = {linear.module_name: mask.is_of_rows for mask in find_masks(converted) for linear in mask.linears}
    assert loaded == {layer.name: "up_proj" in layer.name for layer in ours.layers}
    remove_sparsifiers(model)
    load_thresholds(model, tmp_path / "openvino")
    assert measure_sparsity(model, batches).to_dict() == ours.to_dict()
    done = accelerate(converted)
    assert sum(site.operation == "GatedFeedForward" for site in done.accelerated) == 2
    assert not done.kept


def test_rows_are_calibrated_on_the_torch_model(masked: Any, make_openvino_model: Any, picture: Any) -> None:
    _, batches = masked
    model = make_openvino_model("llama", "INT8_ASYM")
    before = picture(model)
    with pytest.raises(ActsparseError, match="calibrate the torch model, save_thresholds, and load_thresholds here"):
        sparsify_activations(model, batches, 0.5, algorithm="auto")
    assert picture(model) == before
