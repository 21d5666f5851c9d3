"""The thresholds file: what is written is read, and anything else is refused without touching the model."""

import copy
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from actsparse import (
    ActsparseError,
    TargetScope,
    load_thresholds,
    measure_sparsity,
    save_thresholds,
    sparsify_activations,
)
from actsparse.errors import OutputError, ThresholdsError
from actsparse.mask import LARGEST, Compensation
from actsparse.thresholds import fingerprint, read_thresholds
from actsparse.torch.insertion import insert_sparsifier, named_sparsifiers
from actsparse.torch.sparsifier import ActivationSparsifier

TARGETS = {TargetScope(roles=("ffn.up", "ffn.gate")): 0.4, TargetScope(roles=("ffn.down",)): 0.6}


@pytest.fixture(scope="module")
def masked(make_model: Any, make_batches: Any) -> nn.Module:
    return sparsify_activations(make_model("llama"), make_batches(), TARGETS)


@pytest.fixture(scope="module")
def file(masked: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("thresholds") / "thresholds.safetensors"
    save_thresholds(masked, path, calibration="random tokens")
    return path


def describe(model: nn.Module) -> list[Any]:
    return [
        (
            n,
            s.threshold.tolist(),
            s.target_sparsity,
            s.allocated_sparsity,
            s.tokens,
            s.algorithm,
            s.site,
            s.roles,
            s.is_active,
        )
        for n, s in named_sparsifiers(model)
    ]


def read_parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


@pytest.fixture
def pruned(make_model: Any) -> Callable[[torch.dtype], Any]:
    """A model whose last four channels between up and down have no weights, as where they were padded or pruned."""

    def make(dtype: torch.dtype) -> Any:
        model = make_model("llama", dtype=dtype)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.down_proj.weight[:, -4:] = 0
                layer.mlp.gate_proj.weight[-4:] = 0
                layer.mlp.up_proj.weight[-4:] = 0
        return model

    return make


# ---- Round trips


def test_a_loaded_model_is_the_saved_one(masked: nn.Module, file: Path, make_model: Any, batches: list[Any]) -> None:
    model = make_model("llama")
    assert load_thresholds(model, file) is model
    assert describe(model) == describe(masked)
    assert torch.equal(model(**batches[0]).logits, masked(**batches[0]).logits)


def test_a_path_may_be_text(file: Path, make_model: Any, masked: nn.Module) -> None:
    assert describe(load_thresholds(make_model("llama"), str(file))) == describe(masked)


def test_loading_replaces_the_masks_that_there_are(
    file: Path, make_model: Any, masked: nn.Module, batches: list[Any]
) -> None:
    model = sparsify_activations(make_model("llama"), batches[:1], 0.9, tokens="decode")
    assert describe(load_thresholds(model, file)) == describe(masked)


def test_the_file_is_small_and_holds_one_tensor_for_each_layer(file: Path, masked: nn.Module) -> None:
    tensors, metadata = read_parts(file)
    assert set(tensors) == {f"{n}.activation_sparsifier.threshold" for n, _ in named_sparsifiers(masked)}
    assert metadata["format"] == "actsparse.thresholds"
    assert file.stat().st_size < 8192
    notes = read_thresholds(file).notes
    assert notes["calibration"] == "random tokens"
    assert set(notes["versions"]) >= {"actsparse", "torch", "transformers", "nncf"}


def test_saving_what_was_loaded_gives_the_same_file(file: Path, make_model: Any, tmp_path: Path) -> None:
    save_thresholds(load_thresholds(make_model("llama"), file), tmp_path / "again", calibration="random tokens")
    # Not the same bytes: safetensors writes metadata in no fixed order.
    assert read_parts(tmp_path / "again") == read_parts(file)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_type_of_the_model_does_not_change_the_file(
    make_model: Any, batches: list[Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = sparsify_activations(make_model("llama", dtype=dtype), batches, 0.5)
    save_thresholds(model, tmp_path / "x")
    assert {tensor.dtype for tensor in read_parts(tmp_path / "x")[0].values()} == {torch.float32}
    twin = load_thresholds(make_model("llama", dtype=dtype), tmp_path / "x")
    assert torch.equal(twin(**batches[0]).logits, model(**batches[0]).logits)


def test_a_threshold_per_channel_and_one_that_masks_nothing_survive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    per_channel = ActivationSparsifier(0.5, channels=3, tokens="decode", roles=("ffn.in",), site="0", algorithm="x")
    per_channel.threshold.copy_(torch.tensor([0.0, -math.inf, 2.5]))
    insert_sparsifier(model, "0", per_channel)
    insert_sparsifier(model, "1", ActivationSparsifier(0.0))
    save_thresholds(model, tmp_path / "x")
    twin = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    assert describe(load_thresholds(twin, tmp_path / "x")) == describe(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "wina", "cett", "r-sparse"])
def test_channels_that_no_weight_reads_never_pass_and_survive(
    pruned: Any, batches: list[Any], tmp_path: Path, algorithm: str, dtype: torch.dtype
) -> None:
    model = sparsify_activations(pruned(dtype), batches, 0.5, algorithm=algorithm)
    save_thresholds(model, tmp_path / "x")
    twin = load_thresholds(pruned(dtype), tmp_path / "x")
    assert describe(twin) == describe(model)
    assert torch.equal(twin(**batches[0]).logits, model(**batches[0]).logits)
    closed = [s for _, s in named_sparsifiers(twin) if s.threshold.ndim and (s.threshold == LARGEST).any()]
    assert closed
    for sparsifier in closed:
        huge = torch.full((1, 1, sparsifier.threshold.numel()), 60000.0, dtype=dtype)
        assert torch.equal(sparsifier(huge)[0, 0] == 0, sparsifier.threshold == LARGEST)


def test_a_model_cast_after_calibration_is_saved(pruned: Any, batches: list[Any], tmp_path: Path) -> None:
    model = sparsify_activations(pruned(torch.float32), batches, 0.5, algorithm="wina").half()
    save_thresholds(model, tmp_path / "x")
    twin = load_thresholds(pruned(torch.float16), tmp_path / "x")
    assert torch.equal(twin(**batches[0]).logits, model(**batches[0]).logits)


def test_compression_and_masks_do_not_change_the_fingerprint(
    architecture: str, make_model: Any, batches: list[Any], compress: Any
) -> None:
    model = make_model(architecture)
    expected = fingerprint(model)
    assert fingerprint(sparsify_activations(copy.deepcopy(model), batches, 0.5)) == expected
    assert fingerprint(compress(model)) == expected
    assert fingerprint(sparsify_activations(model, batches, 0.5)) == expected


def test_models_of_other_shapes_have_other_fingerprints(make_model: Any) -> None:
    names = ("llama", "phi3", "gpt2", "gpt_neox", "opt", "bert")
    assert len({fingerprint(make_model(name)) for name in names}) == len(names)


# ---- What cannot be saved


def test_a_model_without_masks_is_refused(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(ThresholdsError, match="the model has no activation sparsifiers"):
        save_thresholds(llama, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("note", [object(), {1, 2}, b"bytes"], ids=lambda value: type(value).__name__)
def test_notes_that_are_not_json_are_refused(masked: nn.Module, tmp_path: Path, note: Any) -> None:
    with pytest.raises(ThresholdsError, match="the notes for a thresholds file must be JSON"):
        save_thresholds(masked, tmp_path / "x", note=note)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -1.0])
def test_a_threshold_that_would_not_be_read_is_not_written(tmp_path: Path, threshold: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    sparsifier = ActivationSparsifier(0.5)
    sparsifier.threshold.fill_(threshold)
    insert_sparsifier(model, "0", sparsifier)
    with pytest.raises(ThresholdsError, match="the mask of 0 cannot be saved: its threshold is neither a number from"):
        save_thresholds(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_compensation_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    sparsifier = ActivationSparsifier(0.5)
    sparsifier.set_compensation(Compensation(shift=torch.tensor(math.nan)))
    insert_sparsifier(model, "0", sparsifier)
    with pytest.raises(ThresholdsError, match="what compensates for what it leaves out is not finite"):
        save_thresholds(model, tmp_path / "x")


def test_a_write_that_fails_leaves_the_old_file(
    masked: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x"
    save_thresholds(masked, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OutputError, match="cannot write .*x: No space left on device"):
        save_thresholds(masked, path, more="notes")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# ---- What cannot be loaded


def test_a_file_of_format_3_says_what_was_allocated_as_its_target(file: Path, make_model: Any, tmp_path: Path) -> None:
    tensors, metadata = read_parts(file)
    layers = json.loads(metadata["layers"])
    for number, record in enumerate(layers.values()):
        del record["allocated_sparsity"]
        record["target_sparsity"] = number / 100
    save_file(tensors, tmp_path / "old", {**metadata, "format_version": "3", "layers": json.dumps(layers)})
    loaded = dict(named_sparsifiers(load_thresholds(make_model("llama"), tmp_path / "old")))
    wanted = {name: record["target_sparsity"] for name, record in layers.items()}
    assert {name: s.target_sparsity for name, s in loaded.items()} == wanted
    assert {name: s.allocated_sparsity for name, s in loaded.items()} == wanted


def test_what_was_asked_and_what_was_allocated_are_both_kept(
    make_model: Any, batches: list[Any], tmp_path: Path
) -> None:
    model = sparsify_activations(make_model("llama"), batches, 0.5, algorithm="magnitude+global")
    save_thresholds(model, tmp_path / "x")
    masks = read_thresholds(tmp_path / "x").masks
    assert {mask.target_sparsity for mask in masks.values()} == {0.5}
    assert len({mask.allocated_sparsity for mask in masks.values()}) > 2
    report = measure_sparsity(load_thresholds(make_model("llama"), tmp_path / "x"), batches)
    for layer in report.layers:
        assert (layer.target_sparsity, layer.allocated_sparsity) == (0.5, masks[layer.name].allocated_sparsity)
        assert report.to_dict()["by_layer"][layer.name]["allocated"] == layer.allocated_sparsity


@pytest.fixture(scope="module")
def refuse(make_model: Any, snapshot: Any) -> Callable[..., str]:
    """Load a file that must be refused in one line, into a masked model that must stay as it is."""
    model = make_model("llama")
    insert_sparsifier(model, "lm_head", ActivationSparsifier(0.1))
    before = snapshot(model)

    def check(path: Path) -> str:
        with pytest.raises(ThresholdsError) as caught:
            load_thresholds(model, path)
        assert len(str(caught.value).splitlines()) == 1
        assert snapshot(model) == before
        return str(caught.value)

    return check


def test_a_file_of_another_model_is_refused(file: Path, make_model: Any, snapshot: Any) -> None:
    model = make_model("phi3")
    before = snapshot(model)
    message = r"belongs to another model \(LlamaForCausalLM\): the Linear layers of Phi3ForCausalLM have other names"
    with pytest.raises(ThresholdsError, match=message):
        load_thresholds(model, file)
    assert snapshot(model) == before


def test_a_missing_file_and_a_folder_are_refused(refuse: Callable[..., str], tmp_path: Path) -> None:
    assert "there is no thresholds file" in refuse(tmp_path / "missing")
    assert "there is no thresholds file" in refuse(tmp_path)


def test_a_file_cut_at_any_length_is_refused(file: Path, refuse: Callable[..., str], tmp_path: Path) -> None:
    data = file.read_bytes()
    path = tmp_path / "cut"
    for length in sorted({*range(0, 24), *range(24, len(data), 211), *range(len(data) - 12, len(data))}):
        path.write_bytes(data[:length])
        assert "not a readable safetensors file" in refuse(path)


@dataclass(frozen=True)
class DamageCase:
    """A change to a file's tensors and metadata, and what the error says of it."""

    name: str
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], Any]
    message: str


UP = "model.layers.1.mlp.up_proj"
KEY = f"{UP}.activation_sparsifier.threshold"
DISAGREE = "is damaged: its thresholds and its metadata do not agree"
FOREIGN = "is a safetensors file, but not one of actsparse's thresholds files"


def change_record(metadata: dict[str, str], **changes: Any) -> None:
    layers = json.loads(metadata["layers"])
    layers[UP] |= changes
    metadata["layers"] = json.dumps(layers)


def rename_layer(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors[KEY.replace("up_proj", "uq_proj")] = tensors.pop(KEY)
    metadata["layers"] = metadata["layers"].replace(f'"{UP}": ', f'"{UP.replace("up_proj", "uq_proj")}": ')


def set_threshold(*values: float, dtype: torch.dtype = torch.float32) -> Callable[..., Any]:
    value = torch.tensor(values[0] if len(values) == 1 else values, dtype=dtype)
    return lambda tensors, metadata: tensors.update({KEY: value})


DAMAGES = [
    DamageCase("other format", lambda t, m: m.update(format="pt"), FOREIGN),
    DamageCase("no metadata", lambda t, m: m.clear(), FOREIGN),
    DamageCase("newer", lambda t, m: m.update(format_version="5"), "has format version 5; this .* up to 4: upgrade it"),
    DamageCase("allocation", lambda t, m: change_record(m, allocated_sparsity=1.5), DISAGREE),
    DamageCase("no version", lambda t, m: m.pop("format_version"), "is damaged: its format version is ''"),
    DamageCase("word as version", lambda t, m: m.update(format_version="one"), "its format version is 'one'"),
    DamageCase("odd digit", lambda t, m: m.update(format_version="²"), "its format version is '²'"),
    DamageCase("endless version", lambda t, m: m.update(format_version="9" * 5000), "format version is '9{20}'"),
    DamageCase("no layers", lambda t, m: m.pop("layers"), DISAGREE),
    DamageCase("layers not JSON", lambda t, m: m.update(layers="{"), DISAGREE),
    DamageCase("layers a list", lambda t, m: m.update(layers="[]"), DISAGREE),
    DamageCase("layers too deep", lambda t, m: m.update(layers="[" * 100_000), DISAGREE),
    DamageCase("no notes", lambda t, m: m.pop("notes"), DISAGREE),
    DamageCase("notes a list", lambda t, m: m.update(notes="[]"), DISAGREE),
    DamageCase("threshold too many", lambda t, m: t.update(stranger=torch.zeros(())), DISAGREE),
    DamageCase("threshold too few", lambda t, m: t.pop(KEY), DISAGREE),
    DamageCase("no thresholds", lambda t, m: (t.clear(), m.update(layers="{}")), DISAGREE),
    DamageCase("target 2", lambda t, m: change_record(m, target_sparsity=2), DISAGREE),
    DamageCase("target NaN", lambda t, m: change_record(m, target_sparsity=math.nan), DISAGREE),
    DamageCase("target a word", lambda t, m: change_record(m, target_sparsity="half"), DISAGREE),
    DamageCase("tokens unknown", lambda t, m: change_record(m, tokens="some"), DISAGREE),
    DamageCase("tokens a list", lambda t, m: change_record(m, tokens=["all"]), DISAGREE),
    DamageCase("roles a number", lambda t, m: change_record(m, roles=3), DISAGREE),
    DamageCase("roles of numbers", lambda t, m: change_record(m, roles=[3]), DISAGREE),
    DamageCase("site a number", lambda t, m: change_record(m, site=3), DISAGREE),
    DamageCase("field unknown", lambda t, m: change_record(m, stranger=1), DISAGREE),
    DamageCase("NaN", set_threshold(math.nan), DISAGREE),
    DamageCase("infinity", set_threshold(math.inf), DISAGREE),
    DamageCase("negative", set_threshold(-1.0), DISAGREE),
    DamageCase("integers", set_threshold(1, dtype=torch.int64), DISAGREE),
    DamageCase("half precision", set_threshold(1.0, dtype=torch.float16), DISAGREE),
    DamageCase("two dimensions", lambda t, m: t.update({KEY: torch.zeros(2, 2)}), DISAGREE),
    DamageCase("no entries", lambda t, m: t.update({KEY: torch.zeros(0)}), DISAGREE),
    DamageCase(
        "wrong channels", set_threshold(0.1, 0.2), rf"no Linear layer {UP} of the model takes thresholds of shape \[2\]"
    ),
    DamageCase("unknown layer", rename_layer, "no Linear layer model.layers.1.mlp.uq_proj of the model takes"),
    DamageCase("other fingerprint", lambda t, m: m.update(fingerprint="0" * 64), "belongs to another model"),
    DamageCase("no fingerprint", lambda t, m: m.pop("fingerprint"), DISAGREE),
]


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.name)
def test_a_damaged_file_is_refused(case: DamageCase, file: Path, refuse: Callable[..., str], tmp_path: Path) -> None:
    tensors, metadata = read_parts(file)
    case.change(tensors, metadata)
    save_file(tensors, tmp_path / "x", metadata)
    message = refuse(tmp_path / "x")
    assert re.search(case.message, message), message


def test_a_models_own_weights_are_refused(refuse: Callable[..., str], make_model: Any, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    assert FOREIGN in refuse(tmp_path / "model.safetensors")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_other_bytes_are_refused_or_read(data: st.DataObject, file: Path, tmp_path: Path) -> None:
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = bytearray(data.draw(st.binary(max_size=200)))
    else:
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzz"
    path.write_bytes(content)
    try:
        read_thresholds(path)
    except ActsparseError as error:
        assert isinstance(error, ThresholdsError)
        assert len(str(error).splitlines()) == 1
