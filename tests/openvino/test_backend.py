"""Sparsifying OpenVINO models: the layers, thresholds and errors of the torch models that they come from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nncf
import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from nncf.experimental.torch.sparsify_activations import TargetScope as NncfTargetScope
from optimum.intel import OVModelForCausalLM

from actsparse import ScopeError, TargetScope, measure_sparsity, remove_sparsifiers, sparsify_activations
from actsparse.backend import backend_of, find_openvino_model
from actsparse.errors import ActsparseError, DatasetError
from actsparse.openvino import count_masks, find_masks
from actsparse.openvino.masks import masks_of
from actsparse.openvino.runner import Runner
from actsparse.torch.insertion import named_sparsifiers

pytestmark = pytest.mark.slow

ARCHITECTURES = ("llama", "qwen3", "phi3", "mistral", "gpt2", "gpt_neox", "opt")
DOWN = TargetScope(roles=("ffn.down",))
GATE_AND_UP = TargetScope(roles=("ffn.gate", "ffn.up"))


def thresholds_of(model: ov.Model) -> dict[str, float]:
    return {name: mask.threshold.item() for name, mask in masks_of(model).items()}


def targets_of(model: ov.Model) -> dict[str, Any]:
    return {name: mask.allocation for name, mask in masks_of(model).items()}


def logits_of(model: ov.Model, batch: Any) -> np.ndarray:
    return Runner(model).run(batch)["logits"].copy()


# ---- The torch backend's layers and thresholds


@pytest.mark.parametrize("algorithm", ["magnitude", "nncf"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layers_roles_thresholds_and_outputs_are_those_of_torch(
    architecture: str, algorithm: str, make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    torch_model = sparsify_activations(make_model(architecture), batches, 0.5, algorithm=algorithm)
    model = make_openvino_model(architecture)
    assert sparsify_activations(model, batches, 0.5, algorithm=algorithm) is model
    expected, found = dict(named_sparsifiers(torch_model)), masks_of(model)
    assert found.keys() == expected.keys()
    for name, mask in found.items():
        assert mask.roles == expected[name].roles
        assert mask.threshold.item() == pytest.approx(expected[name].threshold.item(), rel=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(logits_of(model, batches[0]), torch_model(**batches[0]).logits, atol=1e-3)


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT8_SYM", "INT4_ASYM", "INT4_SYM"])
def test_compressed_models_are_calibrated_on_what_they_compute(
    mode: str, make_openvino_model: Any, batches: list[Any]
) -> None:
    model = sparsify_activations(make_openvino_model("llama", mode), batches, 0.5)
    assert len(masks_of(model)) == 14
    assert measure_sparsity(model, batches).sparsity == pytest.approx(0.5, abs=0.02)


def test_different_targets_of_one_site_give_one_mask_each(openvino_llama: ov.Model, batches: list[Any]) -> None:
    q, kv = TargetScope(patterns=[".*q_proj"]), TargetScope(patterns=[".*(k|v)_proj"])
    sparsify_activations(openvino_llama, batches, {q: 0.3, kv: 0.6})
    assert sorted(len(mask.linears) for mask in find_masks(openvino_llama)) == [1, 1, 2, 2]
    assert sorted(set(targets_of(openvino_llama).values())) == [0.3, 0.6]
    thresholds = thresholds_of(openvino_llama)
    assert thresholds["model.layers.0.self_attn.q_proj"] < thresholds["model.layers.0.self_attn.k_proj"]
    assert thresholds["model.layers.0.self_attn.v_proj"] == thresholds["model.layers.0.self_attn.k_proj"]


def test_layers_of_one_site_share_a_mask(openvino_llama: ov.Model, batches: list[Any]) -> None:
    sparsify_activations(openvino_llama, batches, 0.5)
    assert sorted(len(mask.linears) for mask in find_masks(openvino_llama)) == [1, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    "make",
    [
        lambda ids: ids,
        lambda ids: (ids,),
        lambda ids: ids.numpy(),
        lambda ids: {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape)},
    ],
    ids=["tensor", "tuple", "numpy", "dict"],
)
def test_batches_may_be_given_in_any_form(
    make: Callable[[torch.Tensor], Any], make_openvino_model: Any, batches: list[Any]
) -> None:
    expected = sparsify_activations(make_openvino_model(), batches, {DOWN: 0.5})
    dataset = nncf.Dataset([make(batch["input_ids"]) for batch in batches])
    model = sparsify_activations(make_openvino_model(), dataset, {DOWN: 0.5})
    assert thresholds_of(model) == thresholds_of(expected)


def test_an_iterator_is_read_once_in_order(make_openvino_model: Any, batches: list[Any]) -> None:
    expected = sparsify_activations(make_openvino_model(), batches, {DOWN: 0.5}, algorithm="nncf")
    model = sparsify_activations(make_openvino_model(), iter(batches), {DOWN: 0.5}, algorithm="nncf")
    assert thresholds_of(model) == thresholds_of(expected)


# ---- Scopes


@dataclass(frozen=True)
class ScopeCase:
    """A scope and the layers that it matches."""

    name: str
    scope: Any
    layers: tuple[str, ...]


UP = tuple(f"model.layers.{i}.mlp.up_proj" for i in (0, 1))
CASES = [
    ScopeCase("module name", TargetScope(names=[UP[1]]), UP[1:]),
    ScopeCase("node name", TargetScope(names=[f"__module.{UP[0]}/aten::linear/MatMul"]), UP[:1]),
    ScopeCase("pattern of module names", TargetScope(patterns=[r"model\.layers\.1\..*up_proj"]), UP[1:]),
    ScopeCase("pattern of node names", TargetScope(patterns=[r"__module\..*up_proj/.*/MatMul"]), UP),
    ScopeCase("role", TargetScope(roles=("ffn.up",)), UP),
    ScopeCase("NNCF's scope", NncfTargetScope(patterns=[".*up_proj.*"]), UP),
    ScopeCase(
        "subgraph",
        TargetScope(
            subgraphs=[
                nncf.Subgraph(
                    inputs=[f"__module.{UP[0]}/aten::linear/MatMul"],
                    outputs=["__module.model.layers.0.mlp/aten::mul/Multiply"],
                )
            ]
        ),
        UP[:1],
    ),
    ScopeCase("unvalidated", TargetScope(names=[UP[0], "no such layer"], validate=False), UP[:1]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_scope_matches(case: ScopeCase, openvino_llama: ov.Model, batches: list[Any]) -> None:
    sparsify_activations(openvino_llama, batches[:1], {case.scope: 0.5})
    assert tuple(masks_of(openvino_llama)) == case.layers


def test_types_are_those_of_openvino_and_the_ignored_scope_is_left_out(
    openvino_llama: ov.Model, batches: list[Any]
) -> None:
    ignored = nncf.IgnoredScope(patterns=[".*self_attn.*", "lm_head"])
    sparsify_activations(openvino_llama, batches[:1], {TargetScope(types=["MatMul"]): 0.5}, ignored)
    assert {name.split(".")[3] for name in masks_of(openvino_llama)} == {"mlp"}
    assert len(masks_of(openvino_llama)) == 6


def test_the_head_can_be_named(openvino_llama: ov.Model, batches: list[Any]) -> None:
    sparsify_activations(openvino_llama, batches[:1], {TargetScope(names=["lm_head"]): 0.5})
    assert list(masks_of(openvino_llama)) == ["lm_head"]


@dataclass(frozen=True)
class ErrorCase:
    """A call that fails, and what it says."""

    name: str
    targets: Any
    error: type[Exception]
    message: str
    dataset: Any = None
    settings: Any = ()


def broken_batches() -> Any:
    yield from ()
    msg = "broken reader"
    raise RuntimeError(msg)


ERRORS = [
    ErrorCase("no such name", {TargetScope(names=["model.layers.7.mlp.up_proj"]): 0.5}, ScopeError, "layers.*up_proj"),
    ErrorCase("no such pattern", {TargetScope(patterns=["up_proj"]): 0.5}, ScopeError, "matches nothing"),
    ErrorCase("no such role", {TargetScope(roles=("ffn.in",)): 0.5}, ScopeError, "roles found: attention.out"),
    ErrorCase("no Linear", {TargetScope(types=["Swish"]): 0.5}, ScopeError, "matches no Linear layer"),
    ErrorCase("matched twice", {DOWN: 0.5, TargetScope(patterns=[".*down_proj.*"]): 0.4}, ScopeError, "multiple items"),
    ErrorCase("above one", {DOWN: 1.1}, ScopeError, "range"),
    ErrorCase("not a number", {DOWN: float("nan")}, ScopeError, "range"),
    ErrorCase("empty dataset", {DOWN: 0.5}, DatasetError, "empty", dataset=[]),
    ErrorCase("no dataset", {DOWN: 0.5}, DatasetError, "not int", dataset=3),
    ErrorCase(
        "unknown input",
        {DOWN: 0.5},
        DatasetError,
        r"batch 0 .*pixels.*no input pixels",
        dataset=[{"pixels": torch.ones(1, 2)}],
    ),
    ErrorCase("missing input", {DOWN: 0.5}, DatasetError, "no input_ids", dataset=[{}]),
    ErrorCase("wrong rank", {DOWN: 0.5}, DatasetError, "batch 0", dataset=[{"input_ids": torch.ones(3)}]),
    ErrorCase("broken batch", {DOWN: 0.5}, RuntimeError, "broken reader", dataset=broken_batches),
    ErrorCase("algorithm", {DOWN: 0.5}, ActsparseError, "unknown algorithm", settings=(("algorithm", "magic"),)),
    ErrorCase("tokens", {DOWN: 0.5}, ActsparseError, "tokens must be", settings=(("tokens", "some"),)),
]


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: case.name)
def test_a_failed_call_leaves_the_model_as_it_was(
    case: ErrorCase, openvino_llama: ov.Model, batches: list[Any], picture: Any
) -> None:
    sparsify_activations(openvino_llama, batches[:1], {GATE_AND_UP: 0.5})
    before = picture(openvino_llama)
    dataset: Any = batches if case.dataset is None else case.dataset() if callable(case.dataset) else case.dataset
    with pytest.raises(case.error, match=case.message):
        sparsify_activations(openvino_llama, dataset, case.targets, **dict(case.settings))
    assert picture(openvino_llama) == before


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["NaN", "infinity"])
def test_activations_that_are_no_numbers_name_the_layer(
    value: float, openvino_llama: ov.Model, batches: list[Any], picture: Any
) -> None:
    node = next(
        n for n in openvino_llama.get_ops() if n.get_friendly_name().endswith("layers.1.mlp/aten::mul/Multiply")
    )
    broken = ops.add(node.output(0), ops.constant(value, dtype=np.float32))
    broken.set_friendly_name("broken")
    for reader in [r for r in node.output(0).get_target_inputs() if r.get_node().get_friendly_name() != "broken"]:
        reader.replace_source_output(broken.output(0))
    before = picture(openvino_llama)
    with pytest.raises(
        DatasetError, match="NaN or infinite entries in the input of layer model.layers.1.mlp.down_proj"
    ):
        sparsify_activations(openvino_llama, batches, {DOWN: 0.5})
    assert picture(openvino_llama) == before


# ---- Calls after calls


def test_a_second_call_replaces_the_masks(make_openvino_model: Any, batches: list[Any]) -> None:
    expected = sparsify_activations(make_openvino_model(), batches, {DOWN: 0.3})
    model = sparsify_activations(make_openvino_model(), batches, 0.9)
    sparsify_activations(model, batches, {DOWN: 0.3})
    assert thresholds_of(model) == thresholds_of(expected)
    assert targets_of(model) == targets_of(expected)


def test_existing_masks_can_be_kept_and_act_while_others_are_calibrated(
    make_model: Any, make_openvino_model: Any, batches: list[Any]
) -> None:
    models = make_model("llama"), make_openvino_model()
    for model in models:
        sparsify_activations(model, batches, {GATE_AND_UP: 0.5})
        sparsify_activations(model, batches, {DOWN: 0.4}, keep_existing=True)
    expected = {name: s.threshold.item() for name, s in named_sparsifiers(models[0])}
    assert thresholds_of(models[1]) == pytest.approx(expected, rel=1e-4)
    assert sorted(set(targets_of(models[1]).values())) == [0.4, 0.5]


def test_target_0_masks_nothing(openvino_llama: ov.Model, batches: list[Any], picture: Any) -> None:
    before = picture(openvino_llama)
    sparsify_activations(openvino_llama, batches, {DOWN: 0.0})
    assert count_masks(openvino_llama) == 0
    assert picture(openvino_llama)[:2] == before[:2]


def test_removing_the_masks_restores_the_graph(openvino_llama: ov.Model, batches: list[Any], picture: Any) -> None:
    before = picture(openvino_llama)
    sparsify_activations(openvino_llama, batches, 0.5)
    assert remove_sparsifiers(openvino_llama) is openvino_llama
    assert picture(openvino_llama)[:2] == before[:2]


def test_masks_and_what_is_known_of_them_survive_saving(
    openvino_llama: ov.Model, batches: list[Any], tmp_path: Any
) -> None:
    sparsify_activations(openvino_llama, batches, {DOWN: 0.5}, algorithm="nncf")
    ov.save_model(openvino_llama, tmp_path / "model.xml", compress_to_fp16=False)
    loaded = masks_of(ov.Core().read_model(tmp_path / "model.xml"))
    assert loaded == masks_of(openvino_llama)
    assert all(mask.algorithm == "nncf" for mask in loaded.values())


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT4_SYM"])
def test_masks_survive_compression(mode: str, openvino_llama: ov.Model, batches: list[Any]) -> None:
    sparsify_activations(openvino_llama, batches, 0.5)
    before = masks_of(openvino_llama)
    settings: dict[str, Any] = {} if mode.startswith("INT8") else {"group_size": 16}
    compressed = nncf.compress_weights(openvino_llama, mode=nncf.CompressWeightsMode[mode], **settings)
    assert masks_of(compressed) == before


# ---- Single new tokens


def test_decode_masks_act_on_single_tokens_only(make_openvino_model: Any, batches: list[Any]) -> None:
    dense, sparse = make_openvino_model(), make_openvino_model()
    decode = sparsify_activations(make_openvino_model(), batches, 0.5, tokens="decode")
    sparsify_activations(sparse, batches, 0.5)
    assert thresholds_of(decode) == thresholds_of(sparse)
    assert {mask.tokens for mask in find_masks(decode)} == {"decode"}
    one = {"input_ids": batches[0]["input_ids"][:, :1]}
    np.testing.assert_array_equal(logits_of(decode, batches[0]), logits_of(dense, batches[0]))
    np.testing.assert_array_equal(logits_of(decode, one), logits_of(sparse, one))
    assert np.abs(logits_of(decode, one) - logits_of(dense, one)).max() > 0.01


@pytest.mark.parametrize("algorithm", ["wina", "weight-norm+global", "magnitude+global"])
def test_scores_without_gradients_are_those_of_torch(
    algorithm: str, make_model: Any, make_openvino_model: Any, make_batches: Any
) -> None:
    batches = make_batches()
    torch_model = sparsify_activations(make_model("llama"), batches, 0.5, algorithm=algorithm)
    model = sparsify_activations(make_openvino_model("llama"), batches, 0.5, algorithm=algorithm)
    masks = masks_of(model)
    assert masks.keys() == dict(named_sparsifiers(torch_model)).keys()
    for name, sparsifier in named_sparsifiers(torch_model):
        mask = masks[name]
        assert (mask.algorithm, mask.target_sparsity) == (algorithm, 0.5)
        assert mask.allocation == pytest.approx(sparsifier.allocated_sparsity, abs=1e-3)
        assert torch.allclose(mask.threshold, sparsifier.threshold, rtol=0.01), name
    report = measure_sparsity(model, batches)
    assert report.sparsity == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("algorithm", ["fisher", "measured+global", "teal"])
def test_what_openvino_cannot_measure_is_refused_with_the_way_out(
    algorithm: str, openvino_llama: Any, batches: Any, picture: Any
) -> None:
    before = picture(openvino_llama)
    with pytest.raises(
        ActsparseError, match="OVModelForCausalLM.*calibrate the torch model, save_thresholds, and load_thresholds"
    ):
        sparsify_activations(openvino_llama, batches, 0.5, algorithm=algorithm)
    assert picture(openvino_llama) == before


# ---- The door


def test_a_model_is_itself_and_optimums_is_what_it_wraps(openvino_llama: ov.Model, export_folder: Any) -> None:
    assert find_openvino_model(openvino_llama) is openvino_llama
    wrapped: Any = OVModelForCausalLM.from_pretrained(export_folder("llama"))
    assert find_openvino_model(wrapped) is wrapped.model


def test_masks_make_optimums_model_compile_anew(export_folder: Any) -> None:
    wrapped: Any = OVModelForCausalLM.from_pretrained(export_folder("llama"))
    backend_of(wrapped).replace_masks({})
    assert wrapped.request is None
