"""Masks on a model: they survive whatever is done to models, and come off without a trace."""

import copy
import inspect
import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import actsparse
from actsparse import TargetScope, load_thresholds, remove_sparsifiers, save_thresholds, sparsify_activations
from actsparse.torch.insertion import (
    CHILD,
    insert_sparsifier,
    intercept_outputs,
    mask_input,
    named_masks,
    named_sparsifiers,
    record_calls,
    suspend_sparsifiers,
    watch_gradient,
)
from actsparse.torch.sparsifier import ActivationSparsifier

INT8_MODES = [nncf.CompressWeightsMode.INT8_SYM, nncf.CompressWeightsMode.INT8_ASYM]
MLP = {TargetScope(roles=("ffn.gate", "ffn.up")): 0.4, TargetScope(roles=("ffn.down",)): 0.6}


class Feedforward(nn.Module):
    """A gated network, small enough to be exported in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down_proj = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def make_input(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed))


def make_masked_feedforward(target: float = 0.5) -> Feedforward:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Feedforward().eval()
    return sparsify_activations(model, [make_input(1)], target)  # pyright: ignore[reportReturnType]


def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def thresholds_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: sparsifier.threshold for name, sparsifier in named_sparsifiers(model)}


@pytest.fixture
def masked(llama: Any, batches: list[Any]) -> Any:
    return sparsify_activations(llama, batches, MLP)


# ---- Where masks are


def test_a_mask_changes_what_the_model_says(masked: Any, make_model: Any, batches: list[Any]) -> None:
    assert not torch.equal(run(masked, batches[0]), run(make_model("llama"), batches[0]))


def test_state_keys_are_the_dense_ones_and_one_threshold_for_each_layer(masked: Any, make_model: Any) -> None:
    dense = make_model("llama").state_dict()
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")]
    assert masked.state_dict().keys() - dense.keys() == {f"{name}.activation_sparsifier.threshold" for name in names}
    assert [name for name, _ in named_sparsifiers(masked)] == names
    assert all(torch.equal(masked.state_dict()[name], value) for name, value in dense.items())


def test_the_hook_is_one_module_level_function(masked: Any) -> None:
    hooks = [h for _, m in masked.named_modules() for h in m._forward_pre_hooks.values()]
    assert len(hooks) == 6
    assert set(hooks) == {mask_input}


def test_a_mask_has_its_layers_mode(llama: Any, batches: list[Any]) -> None:
    llama.model.layers[1].train()
    sparsify_activations(llama, batches, MLP)
    modes = {name: (s.training, llama.get_submodule(name).training) for name, s in named_sparsifiers(llama)}
    assert all(ours == theirs for ours, theirs in modes.values())
    assert len(set(modes.values())) == 2


def test_only_one_file_registers_hooks() -> None:
    folder = Path(inspect.getfile(actsparse)).parent
    files = {path.name for path in folder.rglob("*.py") if "_hook(" in path.read_text(encoding="utf-8")}
    assert files == {"insertion.py"}


def test_an_input_by_keyword_is_masked_too() -> None:
    model, x = make_masked_feedforward(), make_input()
    assert model.up_proj(input=x).equal(model.up_proj(x))


class ByKeyword(nn.Module):
    """A gated network whose layers are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()

    def forward(self, x: torch.Tensor, *, is_by_keyword: bool = True) -> torch.Tensor:
        if is_by_keyword:
            return self.down(input=self.act(input=self.gate(input=x)) * self.up(input=x))
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("algorithm", ["magnitude", "magnitude+uniform+rows", "wina", "scap"])
def test_a_model_that_calls_its_layers_by_keyword_is_masked_as_any_other(algorithm: str) -> None:
    data = [{"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    by_keyword = sparsify_activations(ByKeyword(), data, 0.5, algorithm=algorithm)
    positional = [x | {"is_by_keyword": False} for x in data]
    by_position = sparsify_activations(ByKeyword(), positional, 0.5, algorithm=algorithm)
    assert named_masks(by_keyword) == named_masks(by_position)
    assert by_keyword(**data[0]).equal(by_position(**positional[0]))


def test_a_mask_of_earlier_versions_whose_hook_knew_no_keywords_still_runs() -> None:
    model, x = make_masked_feedforward(), make_input()
    expected = model.up_proj(x)
    model.up_proj._forward_pre_hooks_with_kwargs.clear()
    assert model.up_proj(x).equal(expected)


def test_inserting_again_replaces_the_mask_and_adds_no_hook() -> None:
    layer = nn.Linear(4, 4)
    first, second = ActivationSparsifier(0.1), ActivationSparsifier(0.2)
    insert_sparsifier(layer, "", first)
    insert_sparsifier(layer, "", second)
    assert layer.get_submodule(CHILD) is second
    assert len(layer._forward_pre_hooks) == 1


def test_masks_are_suspended_and_outputs_intercepted_for_a_while_only() -> None:
    model = make_masked_feedforward()
    sparsifiers = dict(named_sparsifiers(model))
    seen: list[str] = []

    def see(name: str, x: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return torch.zeros_like(x)

    x = make_input()
    expected, dense = model(x), Feedforward()
    dense.load_state_dict(remove_sparsifiers(copy.deepcopy(model)).state_dict())
    with pytest.raises(KeyboardInterrupt), suspend_sparsifiers(sparsifiers.values()):
        assert torch.equal(model(x), dense(x))
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), intercept_outputs(sparsifiers, see):
        assert not model(x).any()
        raise KeyboardInterrupt
    assert seen == ["gate_proj", "up_proj", "down_proj"]
    assert torch.equal(model(x), expected)
    assert not any(s._forward_hooks for s in sparsifiers.values())


# ---- What masks survive


def test_a_deep_copy_has_thresholds_of_its_own(masked: Any, batches: list[Any]) -> None:
    expected = run(masked, batches[0])
    twin = copy.deepcopy(masked)
    assert torch.equal(run(twin, batches[0]), expected)
    for threshold in thresholds_of(twin).values():
        threshold.fill_(-torch.inf)
    assert torch.equal(run(masked, batches[0]), expected)
    assert torch.equal(run(twin, batches[0]), run(remove_sparsifiers(masked), batches[0]))


def test_a_pickle_is_masked_too(masked: Any, batches: list[Any]) -> None:
    twin = pickle.loads(pickle.dumps(masked))
    assert torch.equal(run(twin, batches[0]), run(masked, batches[0]))


def test_a_saved_and_loaded_module_is_masked_too(masked: Any, batches: list[Any]) -> None:
    file = io.BytesIO()
    torch.save(masked, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(run(twin, batches[0]), run(masked, batches[0]))


def test_a_state_dict_carries_the_thresholds(masked: Any, make_model: Any, batches: list[Any]) -> None:
    other = sparsify_activations(make_model("llama"), batches[:1], dict.fromkeys(MLP, 0.1))
    assert not torch.equal(run(other, batches[0]), run(masked, batches[0]))
    other.load_state_dict(masked.state_dict(), strict=True)
    assert torch.equal(run(other, batches[0]), run(masked, batches[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_thresholds_follow_the_models_type(masked: Any, batches: list[Any], dtype: torch.dtype) -> None:
    masked.to(dtype)
    assert {threshold.dtype for threshold in thresholds_of(masked).values()} == {dtype}
    masks: dict[str, float] = {}

    def see(name: str, x: torch.Tensor) -> torch.Tensor:
        masks[name] = (x == 0).double().mean().item()
        assert x.dtype == dtype
        return x

    with intercept_outputs(dict(named_sparsifiers(masked)), see):
        assert run(masked, batches[0]).dtype == dtype
    for name, share in masks.items():
        assert share == pytest.approx(0.6 if "down" in name else 0.4, abs=0.05)


def test_save_pretrained_leaves_the_dense_weights_under_their_names(
    masked: Any, make_model: Any, tmp_path: Path, batches: list[Any]
) -> None:
    make_model("llama").save_pretrained(tmp_path / "dense")
    masked.save_pretrained(tmp_path / "masked")
    dense, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "masked"))
    assert {name for name in saved if CHILD not in name} == dense.keys()
    assert all(torch.equal(saved[name], value) for name, value in dense.items())
    assert sum(CHILD in name for name in saved) == 6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "masked")
    assert torch.equal(run(loaded, batches[0]), run(make_model("llama"), batches[0]))


@pytest.mark.parametrize("mode", INT8_MODES, ids=str)
def test_masks_survive_compression_and_thresholds_do_not_change(
    mode: nncf.CompressWeightsMode, masked: Any, make_model: Any, batches: list[Any], compress: Any, tmp_path: Path
) -> None:
    before = {name: threshold.clone() for name, threshold in thresholds_of(masked).items()}
    save_thresholds(masked, tmp_path / "thresholds.safetensors")
    after = compress(masked, mode)
    assert thresholds_of(after).keys() == before.keys()
    assert all(torch.equal(threshold, before[name]) for name, threshold in thresholds_of(after).items())
    # The other order, with the same thresholds, is the same model.
    other = load_thresholds(compress(make_model("llama"), mode), tmp_path / "thresholds.safetensors")
    assert torch.equal(run(other, batches[0]), run(after, batches[0]))
    dense = compress(make_model("llama"), mode)
    assert not torch.equal(run(dense, batches[0]), run(after, batches[0]))
    assert torch.equal(run(dense, batches[0]), run(remove_sparsifiers(after), batches[0]))


@pytest.mark.parametrize("mode", INT8_MODES, ids=str)
def test_calibrating_the_compressed_model_gives_nearly_the_same_thresholds(
    mode: nncf.CompressWeightsMode, architecture: str, make_model: Any, batches: list[Any], compress: Any
) -> None:
    dense = sparsify_activations(make_model(architecture), batches, 0.5)
    compressed = sparsify_activations(compress(make_model(architecture), mode), batches, 0.5)
    expected = thresholds_of(dense)
    assert thresholds_of(compressed).keys() == expected.keys()
    for name, threshold in thresholds_of(compressed).items():
        assert threshold.item() == pytest.approx(expected[name].item(), rel=0.1), name


# ---- Taking masks off


@pytest.mark.parametrize("is_compressed", [False, True], ids=["dense", "INT8"])
def test_without_its_masks_a_model_is_what_it_was(
    is_compressed: bool, architecture: str, make_model: Any, batches: list[Any], compress: Any, snapshot: Any
) -> None:
    model = compress(make_model(architecture)) if is_compressed else make_model(architecture)
    before, logits = snapshot(model), run(model, batches[0])
    sparsify_activations(model, batches, 0.7)
    assert snapshot(model) != before
    assert remove_sparsifiers(model) is model
    assert snapshot(model) == before
    assert torch.equal(run(model, batches[0]), logits)


def test_other_hooks_stay(llama: Any, batches: list[Any]) -> None:
    calls: list[int] = []

    def count(module: nn.Module, args: Any) -> None:
        calls.append(1)

    handle = llama.model.layers[0].mlp.up_proj.register_forward_pre_hook(count)
    remove_sparsifiers(sparsify_activations(llama, batches, 0.5))
    calls.clear()
    run(llama, batches[0])
    assert calls == [1]
    handle.remove()


def test_removing_from_a_model_without_masks_does_nothing(llama: Any, snapshot: Callable[..., Any]) -> None:
    before = snapshot(llama)
    assert snapshot(remove_sparsifiers(llama)) == before


# ---- Exported graphs


def count_exported(program: torch.export.ExportedProgram) -> Counter[str]:
    return Counter(getattr(node.target, "__name__", str(node.target)).split(".")[0] for node in program.graph.nodes)


@pytest.mark.parametrize("is_strict", [False, True], ids=["not strict", "strict"])
def test_torch_export_reads_the_buffer_and_compares_with_it(is_strict: bool) -> None:
    model, x = make_masked_feedforward(), make_input()
    program = torch.export.export(model, (x,), strict=is_strict)
    counts = count_exported(program)
    assert (counts["abs"], counts["le"]) == (3, 3)
    assert counts["where"] + counts["masked_fill"] == 3
    keys = {f"{name}.activation_sparsifier.threshold" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(program.graph_signature.buffers) == keys
    assert torch.equal(program.module()(x), model(x))
    other = program.module()
    other.load_state_dict({**model.state_dict(), **dict.fromkeys(keys, torch.tensor(torch.inf))})
    assert not other(x).any()


def test_a_language_model_exports_with_its_masks(masked: Any, batches: list[Any]) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = masked

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    tokens = batches[0]["input_ids"]
    program = torch.export.export(Logits().eval(), (tokens,), strict=False)
    assert count_exported(program)["abs"] == 6
    assert torch.equal(program.module()(tokens), run(masked, batches[0]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_traced_model_reads_the_buffer() -> None:
    model, x = make_masked_feedforward(), make_input()
    traced: Any = torch.jit.trace(model, (x,))
    assert str(traced.inlined_graph).count("aten::le(") == 3
    assert torch.equal(traced(x), model(x))
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(traced, name).activation_sparsifier.threshold.fill_(torch.inf)
    assert not traced(x).any()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mode", [None, *INT8_MODES], ids=str)
def test_openvino_gets_the_comparison_and_the_same_outputs(mode: Any, compress: Any) -> None:
    model, x = make_masked_feedforward(), make_input()
    if mode is not None:
        model = nncf.compress_weights(model, mode=mode, dataset=nncf.Dataset([x]))
    with torch.no_grad():
        expected = model(x).numpy()
    converted = ov.convert_model(model, example_input=x)
    kinds = Counter(node.get_type_name() for node in converted.get_ops())
    # The two layers of a site read one threshold each; equal comparisons may be merged.
    assert all(2 <= kinds[kind] <= 3 for kind in ("Abs", "LessEqual", "Select")), kinds
    compiled = ov.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(x.numpy())[0]
    # INT8 kernels may quantise activations on the way.
    np.testing.assert_allclose(found, expected, atol=1e-3 if mode is None else 1e-2)


def test_a_compiled_graph_has_no_breaks_and_the_same_outputs() -> None:
    model, x = make_masked_feedforward(), make_input()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))


def test_a_watched_gradient_is_that_of_the_readers_alone():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    seen = []
    watched = watch_gradient(x, seen.append)
    (3 * watched + 5 * x).sum().backward()
    assert torch.equal(seen[0], torch.tensor([3.0, 3.0]))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor([8.0, 8.0]))


def test_recorded_calls_end_with_the_context():
    layer, calls = nn.Linear(2, 3), []
    with record_calls(layer, lambda args, kwargs, output: calls.append((args, kwargs, output.shape))):
        layer(input=torch.zeros(4, 2))
    layer(torch.zeros(5, 2))
    assert [shape for _, _, shape in calls] == [(4, 3)]
    assert calls[0][1]["input"].shape == (4, 2)
