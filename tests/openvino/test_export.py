"""A masked torch model arrives in OpenVINO with every mask, threshold and output."""

import copy
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from optimum.intel import OVModelForCausalLM
from torch import nn

from actsparse import TargetScope, remove_sparsifiers, sparsify_activations
from actsparse.backend import backend_of
from actsparse.errors import ActsparseError, OutputError
from actsparse.mask import Mask
from actsparse.openvino import accelerate, export_model, find_masks
from actsparse.openvino.layers import named_calls
from actsparse.openvino.linear import Linear
from actsparse.openvino.masks import masks_of
from actsparse.openvino.runner import Runner
from actsparse.torch.compression import compress_int8
from actsparse.torch.insertion import named_sparsifiers

pytestmark = pytest.mark.slow

# pyright cannot tell the overloads of its constructor apart.
make_graph: Any = ov.Model

DOWN = TargetScope(roles=("ffn.down",))


def read(folder: Path) -> ov.Model:
    return ov.Core().read_model(folder / "openvino_model.xml")


def logits_of(model: ov.Model, batch: Any) -> np.ndarray:
    return Runner(model).run(batch)["logits"].copy()


def expected_masks(model: nn.Module) -> dict[str, Mask]:
    return {name: s.to_mask(name) for name, s in named_sparsifiers(model)}


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "opt"])
def test_masks_thresholds_and_outputs_are_those_of_the_torch_model(
    architecture: str, make_model: Any, batches: list[Any], tmp_path: Path, snapshot: Any
) -> None:
    model = sparsify_activations(make_model(architecture), batches, 0.5)
    before = snapshot(model)
    assert export_model(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert snapshot(model) == before
    exported = read(tmp_path / "new" / "folder")
    assert masks_of(exported) == expected_masks(model)
    assert len(find_masks(exported)) == len({s.site for _, s in named_sparsifiers(model)})
    with torch.no_grad():
        np.testing.assert_allclose(logits_of(exported, batches[0]), model(**batches[0]).logits, atol=1e-3)


def dequantize(linear: Linear) -> torch.Tensor:
    """Compute a layer's weight as OpenVINO does, [out_features, in_features]."""
    weight = linear.node.input_value(linear.weight_port)
    values = ov.Core().compile_model(make_graph([weight], [], "weight"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(np.array(values([])[0]))
    return found if linear.is_weight_transposed else found.T


ASYM, SYM = nncf.CompressWeightsMode.INT8_ASYM, nncf.CompressWeightsMode.INT8_SYM


@pytest.mark.parametrize(
    ("mode", "is_masked_first", "dtype"),
    [
        *((mode, is_masked_first, torch.float32) for mode in (ASYM, SYM) for is_masked_first in (False, True)),
        (ASYM, False, torch.bfloat16),
        (SYM, True, torch.float16),
    ],
    ids=str,
)
def test_int8_weights_keep_their_masks(
    mode: nncf.CompressWeightsMode,
    is_masked_first: bool,
    dtype: torch.dtype,
    make_model: Any,
    batches: list[Any],
    compress: Any,
    tmp_path: Path,
) -> None:
    model = make_model(dtype=dtype)
    if is_masked_first:
        model = compress(sparsify_activations(model, batches, 0.5), mode)
    else:
        model = sparsify_activations(compress(model, mode), batches, 0.5)
    exported = read(export_model(model, tmp_path))
    assert masks_of(exported) == expected_masks(model)
    assert len(find_masks(exported)) == 8
    calls = {name: group[0] for name, group in named_calls(exported).items()}
    assert {call.constant.get_element_type().bitwidth for call in calls.values()} == {8}
    # torch rounds INT8 weights to fp16 and OpenVINO does not, and what is rounded otherwise may be masked otherwise: so
    # the reference is a dense torch model with OpenVINO's weights.
    reference = make_model(dtype=dtype).float()
    with torch.no_grad():
        for name, call in calls.items():
            reference.get_submodule(name).weight.copy_(dequantize(call))
        embedding = next(n for n in exported.get_ops() if n.get_friendly_name().endswith("embed_tokens.weight"))
        found = table = embedding.output(0)
        while table.get_node().get_type_name() != "Gather":
            found = table
            table = next(iter(table.get_target_inputs())).get_node().output(0)
        compiled = ov.Core().compile_model(make_graph([found], [], "table"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        reference.get_input_embeddings().weight.copy_(torch.from_numpy(np.array(compiled([])[0])))
        sparsify_activations(reference, batches[:1], 0.5)
        for name, s in named_sparsifiers(reference):
            s.threshold.copy_(masks_of(exported)[name].threshold)
        expected = reference(**batches[0]).logits
    np.testing.assert_allclose(logits_of(exported, batches[0]), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_16_bits_is_exported_and_computes_in_f32(
    dtype: torch.dtype, make_model: Any, batches: list[Any], tmp_path: Path, snapshot: Any
) -> None:
    model, wide = make_model(dtype=dtype), make_model(dtype=dtype).float()
    sparsify_activations(model, batches, 0.5)
    backend_of(wide).replace_masks(expected_masks(model))
    before, logits = snapshot(model), model(**batches[0]).logits
    exported = read(export_model(model, tmp_path))
    assert snapshot(model) == before
    assert model(**batches[0]).logits.equal(logits)
    assert masks_of(exported) == expected_masks(model)
    with torch.no_grad():
        np.testing.assert_allclose(logits_of(exported, batches[0]), wide(**batches[0]).logits, atol=2e-3)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_mixtures_of_experts_are_exported_and_accelerated(
    architecture: str, make_model: Any, make_batches: Any, tmp_path: Path
) -> None:
    batches = make_batches(4, batch_size=2, length=48)
    model = sparsify_activations(make_model(architecture), batches, 0.5)
    exported = read(export_model(model, tmp_path))
    assert masks_of(exported) == expected_masks(model)
    with torch.no_grad():
        np.testing.assert_allclose(logits_of(exported, batches[0]), model(**batches[0]).logits, atol=1e-3)
    compressed = read(export_model(compress_int8(model, "asym", batches[0]), tmp_path))
    expected = logits_of(compressed, batches[0])
    acceleration = accelerate(compressed, exact=True)
    assert not acceleration.kept
    assert {name for site in acceleration.masked for name in site.layers} == expected_masks(model).keys()
    np.testing.assert_allclose(logits_of(compressed, batches[0]), expected, atol=1e-3)


def test_experts_are_compressed_before_they_are_masked_too(make_model: Any, make_batches: Any, tmp_path: Path) -> None:
    batches = make_batches(4, batch_size=2, length=48)
    model = compress_int8(make_model("mixtral"), "asym", batches[0])
    exported = read(export_model(sparsify_activations(model, batches, 0.5), tmp_path))
    assert {
        call.constant.get_element_type().bitwidth for group in named_calls(exported).values() for call in group
    } == {8}


def test_optimum_loads_and_generates_what_torch_does(make_model: Any, batches: list[Any], tmp_path: Path) -> None:
    model = sparsify_activations(make_model(), batches, {DOWN: 0.5})
    loaded: Any = OVModelForCausalLM.from_pretrained(
        export_model(model, tmp_path), ov_config={"INFERENCE_PRECISION_HINT": "f32"}
    )
    assert masks_of(loaded.model) == expected_masks(model)
    prompt = batches[0]["input_ids"][:1, :4]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    assert loaded.generate(prompt, **settings).tolist() == model.generate(prompt, **settings).tolist()


def test_decode_masks_are_exported_as_such(make_model: Any, batches: list[Any], tmp_path: Path) -> None:
    model = sparsify_activations(make_model(), batches, 0.5, tokens="decode")
    exported = read(export_model(model, tmp_path))
    assert masks_of(exported) == expected_masks(model)
    one = {"input_ids": batches[0]["input_ids"][:, :1]}
    with torch.no_grad():
        for batch in (batches[0], one):
            np.testing.assert_allclose(logits_of(exported, batch), model(**batch).logits, atol=1e-3)


def test_masks_that_mask_nothing_are_left_out(make_model: Any, batches: list[Any], tmp_path: Path) -> None:
    model = sparsify_activations(make_model(), batches, {DOWN: 0.0})
    assert not find_masks(read(export_model(model, tmp_path)))


def test_an_export_replaces_an_earlier_one_and_leaves_nothing_else(
    make_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    model = sparsify_activations(make_model(), batches, 0.5)
    export_model(model, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.json", "generation_config.json", "openvino_model.bin", "openvino_model.xml"]
    export_model(remove_sparsifiers(model), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert not find_masks(read(tmp_path))


def test_a_model_that_optimum_cannot_export_is_refused(make_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ActsparseError, match="optimum-intel cannot export this Linear"):
        export_model(nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_refused(make_model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        export_model(make_model(), tmp_path / "file")


class Block(nn.Module):
    """A gated network, converted without optimum."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.5, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("mode", [None, nncf.CompressWeightsMode.INT8_ASYM], ids=["dense", "INT8"])
@pytest.mark.parametrize("how", ["traced", "exported"])
def test_openvinos_own_conversion_keeps_the_masks(mode: Any, how: str) -> None:
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))
    model: Any = nn.ModuleDict({"block": Block()})["block"]
    if mode is not None:
        model = nncf.compress_weights(model, mode=mode, dataset=nncf.Dataset([x]))
    sparsify_activations(model, [x], 0.5)
    with torch.no_grad():
        expected = model(x).numpy()
    source = copy.deepcopy(model) if how == "traced" else torch.export.export(model, (x,))
    converted = ov.convert_model(source, example_input=x if how == "traced" else None)
    masks = find_masks(converted)
    assert sum(len(mask.linears) for mask in masks) == 3
    thresholds = {s.threshold.item() for _, s in named_sparsifiers(model)}
    assert {mask.threshold.item() for mask in masks} == thresholds
    if how == "traced":
        assert masks_of(converted).keys() == {"gate", "up", "down"}
    found = next(iter(Runner(converted).run(x).values()))
    np.testing.assert_allclose(found, expected, atol=1e-3 if mode is None else 1e-2)


def test_whoever_has_loaded_an_earlier_export_keeps_it(make_model: Any, batches: list[Any], tmp_path: Path) -> None:
    loaded = ov.Core().read_model(export_model(make_model(), tmp_path) / "openvino_model.xml")
    before = logits_of(loaded, batches[0])
    export_model(sparsify_activations(make_model(), batches, 0.9), tmp_path)
    np.testing.assert_array_equal(logits_of(loaded, batches[0]), before)
