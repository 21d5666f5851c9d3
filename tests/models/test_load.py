"""Every name that a model may be asked for by."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from actsparse.errors import SourceError
from actsparse.models import load, load_model


def test_a_folder_loads_as_it_was_saved(folder: Path, make_llama: Callable[[], LlamaForCausalLM]) -> None:
    loaded = load_model(str(folder))
    tokens = torch.arange(8)[None]
    assert loaded.name == str(folder)
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer("a")["input_ids"] == [1]
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, make_llama().eval()(tokens).logits)


def test_the_dtype_is_the_one_asked_for(folder: Path) -> None:
    assert load_model(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", ["", " ", "./nosuch", "/nosuch", "~/nosuch", "~nosuchuser/x", "no/such/model", "nosuch/", "x.gguf", "a\\b"]
)
def test_a_path_where_nothing_lies_is_refused_without_asking_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "fetch_from_hub", lambda name: pytest.fail("the hub was asked"))
    with pytest.raises(SourceError, match="there is no model at"):
        load_model(name)
