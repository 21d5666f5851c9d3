"""Models from the hub, and what is said where there is none."""

from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import LlamaForCausalLM

from actsparse.errors import SourceError
from actsparse.models import hub, load_model


@pytest.mark.parametrize("name", ["bad name!", "-x", "nul\0l", "a" * 200])
def test_a_name_that_no_model_can_have_is_refused(name: str) -> None:
    with pytest.raises(SourceError, match="it is no hub id"):
        load_model(name)


def test_a_hub_that_cannot_be_reached_is_named_with_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        msg = "name or service not known"
        raise httpx.ConnectError(msg)

    def find_nothing(*_: object, local_files_only: bool, **__: object) -> None:
        assert local_files_only
        msg = "not in the cache"
        raise LocalEntryNotFoundError(msg)

    monkeypatch.setattr(hub.HfApi, "model_info", fail)
    monkeypatch.setattr(hub, "snapshot_download", find_nothing)
    with pytest.raises(SourceError, match="cannot reach the model hub for 'some/model'; `default`, a local folder"):
        load_model("some/model")


def test_a_hub_model_is_downloaded_and_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder))
    loaded = load_model("some/model")
    assert loaded.name == "some/model"
    assert isinstance(loaded.model, LlamaForCausalLM)
