"""A torch model with an OpenVINO model's weights: what it computes, and the masks that are calibrated on it."""

from collections.abc import Callable
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from optimum.intel import OVModelForCausalLM

from actsparse import (
    TargetScope,
    load_thresholds,
    measure_sparsity,
    remove_sparsifiers,
    save_thresholds,
    sparsify_activations,
)
from actsparse.errors import ActsparseError, DatasetError
from actsparse.mask import Mask
from actsparse.openvino import accelerate, export_model
from actsparse.openvino.compression import compress_int4_aware
from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import find_linears
from actsparse.openvino.masks import masks_of
from actsparse.openvino.runner import Runner
from actsparse.openvino.twin import ScaledActivation, make_twin
from actsparse.openvino.weights import dequantise
from actsparse.torch.compression import compress_weights
from actsparse.torch.insertion import named_masks, named_sparsifiers

pytestmark = pytest.mark.slow

TARGET = 0.5


@pytest.fixture(scope="session")
def make_wrapped(export_folder: Any, make_openvino_model: Any) -> Callable[..., Any]:
    """Wrap a tiny model as optimum-intel does, with its configuration."""

    def make(architecture: str = "llama", mode: str | None = None) -> Any:
        wrapped = OVModelForCausalLM.from_pretrained(export_folder(architecture), compile=False)
        wrapped.model = make_openvino_model(architecture, mode)
        return wrapped

    return make


def logits_of(model: ov.Model, batch: Any) -> np.ndarray:
    return Runner(model).run(batch)["logits"].copy()


def require_equal(found: dict[str, Mask], expected: dict[str, Mask], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, mask in found.items():
        other = expected[name]
        assert (mask.roles, mask.is_of_rows) == (other.roles, other.is_of_rows)
        # Without a twin, a site is named after the first layer in OpenVINO's order.
        assert mask.site == other.site or mask.algorithm == "magnitude"
        assert (mask.algorithm, mask.gate_function) == (other.algorithm, other.gate_function)
        assert (mask.selection is None) == (other.selection is None)
        assert mask.selection is None or mask.selection["chosen"] == (other.selection or {})["chosen"]
        assert mask.allocation == pytest.approx(other.allocation, abs=2e-3)
        assert torch.allclose(mask.threshold, other.threshold, rtol=rtol), name


# ---- What it computes


# Of the tiny GPT-NeoX, NNCF compresses the only frequency of the rotary embedding too, to INT8.
@pytest.mark.parametrize("mode", [None, "INT8_SYM", "INT4_ASYM"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_a_twin_computes_what_the_openvino_model_does(
    architecture: str, mode: str | None, make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    if (architecture, mode) == ("gpt_neox", "INT4_ASYM"):
        pytest.skip("NNCF wants to cut the one frequency into groups")
    model, config = make_openvino_model(architecture, mode), make_model(architecture).config
    twin = make_twin(model, config, batches[0])
    with torch.no_grad():
        np.testing.assert_allclose(twin(**batches[1]).logits, logits_of(model, batches[1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "opt"])
def test_awqs_scales_are_in_the_twin(
    architecture: str, make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    model = compress_int4_aware(make_openvino_model(architecture), batches, group_size=16)
    twin = make_twin(model, make_model(architecture), batches[0])
    with torch.no_grad():
        np.testing.assert_allclose(twin(**batches[1]).logits, logits_of(model, batches[1]), rtol=1e-3, atol=1e-4)
    # In a gated network, the scale of down's inputs goes into up's weights; elsewhere it is an operation of its own.
    scaled = [module for module in twin.modules() if isinstance(module, ScaledActivation)]
    assert len(scaled) == (0 if architecture == "llama" else 2)


def test_norms_and_biases_are_those_of_the_openvino_model(
    make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    skeleton = make_model("gpt2")
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.add_(1)
    before = [parameter.clone() for parameter in skeleton.parameters()]
    twin = make_twin(make_openvino_model("gpt2"), make_model("gpt2").config, batches[0])
    expected = make_model("gpt2").state_dict()
    for name, found in twin.state_dict().items():
        assert torch.allclose(found, expected[name]), name
    # OpenVINO left out the norms' ones, which this model has not.
    with pytest.raises(ActsparseError, match="is no twin of the OpenVINO model: logits differ by"):
        make_twin(make_openvino_model("gpt2"), skeleton, batches[0])
    assert all(torch.equal(old, new) for old, new in zip(before, skeleton.parameters(), strict=True))


def test_a_copy_shares_what_it_can_and_leaves_the_torch_model_alone(
    make_model: Any, make_openvino_model: Any, batches: list[Any], snapshot: Any
) -> None:
    skeleton = sparsify_activations(make_model(), batches, TARGET)
    before = snapshot(skeleton)
    twin: Any = make_twin(make_openvino_model(), skeleton, batches[0])
    assert snapshot(skeleton) == before
    assert not named_masks(twin)
    assert twin.model.norm.weight.data_ptr() == skeleton.model.norm.weight.data_ptr()


def test_masks_of_the_openvino_model_are_left_out(
    make_model: Any, openvino_llama: ov.Model, batches: list[Any], picture: Any
) -> None:
    expected = logits_of(openvino_llama, batches[1])
    sparsify_activations(openvino_llama, batches, 0.9)
    before = picture(openvino_llama)
    twin = make_twin(openvino_llama, make_model().config, batches[0])
    assert picture(openvino_llama) == before
    with torch.no_grad():
        np.testing.assert_allclose(twin(**batches[1]).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", [None, "INT8_ASYM", "INT4_SYM"])
def test_a_weight_is_what_openvino_decompresses(mode: str | None, make_openvino_model: Any) -> None:
    for linear in find_linears(make_openvino_model("llama", mode)):
        weight = linear.node.input_value(linear.weight_port)
        graph = ov.Model([ops.result(ops.convert(weight, ov.Type.f32))], [], "weight")  # pyright: ignore[reportGeneralTypeIssues]
        expected = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
        np.testing.assert_allclose(dequantise(weight), expected, rtol=2e-3, atol=1e-6)


# ---- The masks that are calibrated on it


@pytest.mark.parametrize("algorithm", ["magnitude", "fisher", "magnitude+uniform+rows", "auto", "scap"])
def test_masks_of_a_dense_export_are_those_of_the_torch_model(
    algorithm: str, make_model: Any, make_wrapped: Any, make_batches: Any
) -> None:
    batches = make_batches(8)
    expected = sparsify_activations(make_model(), batches, TARGET, algorithm=algorithm)
    wrapped = make_wrapped()
    assert sparsify_activations(wrapped, batches, TARGET, algorithm=algorithm) is wrapped
    require_equal(masks_of(wrapped.model), named_masks(expected), rtol=1e-3)


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT4_ASYM"])
@pytest.mark.parametrize("algorithm", ["fisher", "auto"])
def test_masks_of_compressed_weights_are_those_of_the_twin(
    algorithm: str, mode: str, make_model: Any, make_wrapped: Any, make_batches: Any
) -> None:
    batches = make_batches(8)
    wrapped = make_wrapped(mode=mode)
    twin = sparsify_activations(
        make_twin(wrapped.model, make_model(), batches[0]), batches, TARGET, algorithm=algorithm
    )
    sparsify_activations(wrapped, batches, TARGET, algorithm=algorithm)
    require_equal(masks_of(wrapped.model), named_masks(twin), rtol=1e-5)
    with torch.no_grad():
        found = logits_of(wrapped.model, batches[0])
        np.testing.assert_allclose(found, twin(**batches[0]).logits, rtol=1e-2, atol=1e-2)
    dense = sparsify_activations(make_model(), batches, TARGET, algorithm=algorithm)
    assert any(s.threshold != named_masks(twin)[name].threshold for name, s in named_sparsifiers(dense))


def test_thresholds_behind_awqs_scales_are_those_that_openvino_needs(
    make_wrapped: Any, make_model: Any, batches: list[Any]
) -> None:
    wrapped = make_wrapped("phi3")
    wrapped.model = compress_int4_aware(wrapped.model, batches, group_size=16)
    sparsify_activations(wrapped, batches, TARGET, algorithm="fisher")
    report = measure_sparsity(wrapped, batches)
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(masks_of(wrapped.model)[layer.name].allocation, abs=0.03)


def test_scopes_existing_masks_and_every_form_of_a_batch_work_as_without_a_twin(
    make_wrapped: Any, make_model: Any, batches: list[Any], tmp_path: Any
) -> None:
    up, down = TargetScope(patterns=[r"__module\..*up_proj/.*"]), TargetScope(roles=("ffn.down",))
    named = TargetScope(patterns=[".*up_proj"])
    expected, wrapped = make_model(), make_wrapped()
    sparsify_activations(expected, batches, {named: 0.4})
    sparsify_activations(expected, batches, {down: 0.6}, algorithm="fisher", keep_existing=True)
    sparsify_activations(wrapped, batches, {up: 0.4})
    dataset = nncf.Dataset([batch["input_ids"].numpy() for batch in batches])
    sparsify_activations(wrapped, dataset, {down: 0.6}, algorithm="fisher", keep_existing=True)
    require_equal(masks_of(wrapped.model), named_masks(expected), rtol=1e-3)
    save_thresholds(wrapped, tmp_path / "thresholds.safetensors")
    loaded = load_thresholds(make_wrapped(), tmp_path / "thresholds.safetensors")
    require_equal(masks_of(loaded.model), named_masks(expected), rtol=1e-3)


def test_labels_are_what_gradients_are_of(make_wrapped: Any, make_model: Any, batches: list[Any]) -> None:
    labelled = [{**batch, "labels": batch["input_ids"].roll(3, 1)} for batch in batches]
    expected = sparsify_activations(make_model(), labelled, TARGET, algorithm="fisher")
    wrapped = sparsify_activations(make_wrapped(), labelled, TARGET, algorithm="fisher")
    require_equal(masks_of(wrapped.model), named_masks(expected), rtol=1e-3)


# ---- What is refused


def test_a_bare_model_is_refused_with_the_way_out(openvino_llama: ov.Model, batches: list[Any], picture: Any) -> None:
    before = picture(openvino_llama)
    with pytest.raises(ActsparseError, match=r"^auto measures .* give an OVModelForCausalLM.*load_causal_lm") as caught:
        sparsify_activations(openvino_llama, batches, TARGET, algorithm="auto")
    assert "\n" not in str(caught.value)
    assert picture(openvino_llama) == before


def test_another_architecture_is_refused_and_where_it_differs_is_named(
    make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    config = make_model("llama").config
    config.hidden_act = "relu"
    with pytest.raises(ActsparseError, match=r"what reaches model\.layers\.0\.mlp\.down_proj is the first to differ"):
        make_twin(make_openvino_model("llama"), config, batches[0])
    with pytest.raises(ActsparseError, match=r"does not show the weights of transformer\.wte\.weight"):
        make_twin(make_openvino_model("llama"), make_model("gpt2").config, batches[0])


def test_a_bias_that_openvino_has_merged_is_taken_from_the_torch_model(
    make_model: Any, tmp_path: Any, batches: list[Any]
) -> None:
    model = make_model("opt")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * name.endswith("q_proj.bias"))
    exported = ov.Core().read_model(export_model(model, tmp_path) / "openvino_model.xml")
    make_twin(exported, model, batches[0])
    # The conversion has multiplied it by what queries are scaled with, so that a configuration does not tell it.
    with pytest.raises(ActsparseError, match=r"what reaches .*layers\.0\.self_attn\.out_proj is the first to differ"):
        make_twin(exported, model.config, batches[0])


def test_compressed_torch_models_and_batches_without_tokens_are_refused(
    make_model: Any, make_wrapped: Any, compress: Any, batches: list[Any]
) -> None:
    wrapped = make_wrapped()
    with pytest.raises(ActsparseError, match="give it as it was before nncf.compress_weights"):
        make_twin(wrapped.model, compress(make_model()), batches[0])
    with pytest.raises(DatasetError, match="no input_ids"):
        sparsify_activations(wrapped, [{}], TARGET, algorithm="auto")
    with pytest.raises(DatasetError, match=r"cannot take a batch of the dataset \(input_ids: \(3,\)\)"):
        sparsify_activations(wrapped, [{"input_ids": torch.ones(3).long()}], TARGET, algorithm="auto")


def test_no_code_of_a_models_source_is_run(make_model: Any, openvino_llama: ov.Model, batches: list[Any]) -> None:
    config = make_model().config
    config.auto_map = {"AutoModelForCausalLM": "someone/model--modeling.Model"}
    config.__class__ = type("Foreign", (type(config),), {"model_type": "foreign"})
    with pytest.raises(ActsparseError, match="^no torch model can be made of this configuration: ") as caught:
        make_twin(openvino_llama, config, batches[0])
    assert "\n" not in str(caught.value)


# ---- Weights that torch has compressed itself


@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_int4_torch_models_are_calibrated_on_their_weights_exported_and_accelerated(
    mode: str, make_model: Any, make_batches: Any, tmp_path: Any
) -> None:
    batches = make_batches(8)
    model = compress_weights(make_model(), mode, batches[0], group_size=16)
    sparsify_activations(model, batches, 0.4, algorithm="auto")
    assert measure_sparsity(model, batches).sparsity == pytest.approx(0.4, abs=0.02)
    exported = ov.Core().read_model(export_model(model, tmp_path) / "openvino_model.xml")
    assert masks_of(exported) == named_masks(model)
    found = remove_sparsifiers(exported.clone())
    with torch.no_grad():
        expected = remove_sparsifiers(model)(**batches[0]).logits.numpy()
    # Torch decompresses in f16.
    np.testing.assert_allclose(logits_of(found, batches[0]), expected, atol=0.02)
    # What torch's weights are is what a twin reads of them.
    make_twin(found, make_model(), batches[0])
    done = accelerate(exported)
    layers = {layer for site in done.accelerated for layer in site.layers}
    # Rows are read by groups of 64, and the tiny model has groups of 16.
    assert layers | {layer for site in done.kept for layer in site.layers} >= named_calls(found).keys()
    assert all(name.endswith("up_proj") for site in done.kept for name in site.layers)
