"""Models in folders, and every way in which a folder can be unusable."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from actsparse.backend import backend_of, language_model
from actsparse.errors import SourceError
from actsparse.models import load_model
from actsparse.openvino import export_model


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def halve_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_weights_without_a_place_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(folder, lambda weights: weights.update(stranger=torch.ones(1)))
    with caplog.at_level(logging.WARNING, "actsparse"):
        load_model(str(folder))
    assert "1 weights that the model does not use, as stranger" in caplog.text


@dataclass(frozen=True)
class Damage:
    name: str
    damage: Callable[[Path], object]
    message: str


DAMAGES = [
    Damage("no config", lambda f: (f / "config.json").unlink(), "no config.json"),
    Damage("config no JSON", lambda f: (f / "config.json").write_text("{"), "valid JSON"),
    Damage("unknown type", lambda f: change_config(f, model_type="nosuch"), "nosuch"),
    Damage("wrong kind of value", lambda f: change_config(f, hidden_size="x"), "hidden_size"),
    Damage("own code", lambda f: change_config(f, model_type="x", auto_map={"AutoConfig": "c.C"}), "custom code"),
    Damage("base model", lambda f: change_config(f, architectures=["LlamaModel"]), "no causal language model"),
    Damage("no weights", lambda f: (f / "model.safetensors").unlink(), "safetensors.* but has none"),
    Damage("pickled weights", pickle_weights, "only pickled ones"),
    Damage("truncated weights", halve_weights, "damaged"),
    Damage("empty weights", lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    Damage("missing weight", lambda f: change_weights(f, lambda w: w.pop("lm_head.weight")), "lack 1 of .* lm_head"),
    Damage("other shape", lambda f: change_config(f, intermediate_size=48), r"is \(16, 32\) but should be \(16, 48\)"),
    Damage("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    Damage("garbage tokenizer", lambda f: (f / "tokenizer.json").write_text('{"x"'), "damaged"),
]


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.name)
def test_an_unusable_folder_is_refused_in_one_line(folder: Path, case: Damage) -> None:
    case.damage(folder)
    with pytest.raises(SourceError, match=case.message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


OTHER_MODELS = {
    "encoder": lambda: BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, kind: str, save: Callable[[PreTrainedModel, Path], Path]
) -> None:
    save(OTHER_MODELS[kind](), tmp_path)
    with pytest.raises(SourceError, match="no causal language model but (BertForMaskedLM|T5ForConditionalGeneration)"):
        load_model(str(tmp_path))


@pytest.fixture(scope="module")
def exported(
    make_llama: Callable[[], LlamaForCausalLM],
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with an OpenVINO model alone."""
    return export_model(make_llama(), tmp_path_factory.mktemp("exported") / "model", make_tokenizer())


def copy_of(exported: Path, folder: Path) -> Path:
    return Path(shutil.copytree(exported, folder, dirs_exist_ok=True))


def test_an_openvino_model_loads_with_its_tokenizer(exported: Path, make_llama: Callable[[], LlamaForCausalLM]) -> None:
    loaded = load_model(str(exported))
    assert (backend_of(loaded.model).name, loaded.name) == ("openvino", str(exported))
    assert loaded.tokenizer("a")["input_ids"] == [1]
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = make_llama().eval()(tokens).logits
    found = language_model(loaded.model)(input_ids=tokens).logits
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-3, rtol=0)


def test_of_two_models_in_a_folder_the_one_asked_for_is_loaded(folder: Path, exported: Path) -> None:
    copy_of(exported, folder)
    assert isinstance(load_model(str(folder), torch_only=True).model, LlamaForCausalLM)
    assert backend_of(load_model(str(folder)).model).name == "openvino"


OPENVINO_DAMAGES = [
    Damage("truncated", lambda f: (f / "openvino_model.xml").write_text("<?xml"), "cannot be loaded"),
    Damage("no weights", lambda f: (f / "openvino_model.bin").unlink(), "cannot be loaded"),
    Damage("no config", lambda f: (f / "config.json").unlink(), "cannot be loaded"),
    Damage("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    Damage("garbage tokenizer", lambda f: (f / "tokenizer.json").write_text("{"), "damaged"),
]


@pytest.mark.parametrize("case", OPENVINO_DAMAGES, ids=lambda case: case.name)
def test_an_unusable_openvino_folder_is_refused_in_one_line(exported: Path, tmp_path: Path, case: Damage) -> None:
    case.damage(copy_of(exported, tmp_path))
    with pytest.raises(SourceError, match=case.message) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_openvino_model_is_refused_where_torch_weights_are_wanted(exported: Path) -> None:
    with pytest.raises(SourceError, match="holds an OpenVINO model, and this takes torch weights"):
        load_model(str(exported), torch_only=True)


def test_an_openvino_model_is_not_spread_over_devices(exported: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(SourceError, match="which is loaded as a whole: --device auto is for torch models"):
        load_model(str(exported), device="auto")
