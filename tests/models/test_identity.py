"""What tells a model from another one of its name."""

import json
import os
from pathlib import Path

import pytest

from actsparse.models.identity import model_identity
from actsparse.storage import assets


def test_a_folder_is_another_model_when_a_file_of_it_is_replaced(folder: Path) -> None:
    before = model_identity(str(folder))
    assert model_identity(str(folder)) == before
    assert json.loads(json.dumps(before)) == before
    # Results may be written into the model's own folder.
    for name in ("thresholds.safetensors", "report.json", "sweep.json", "README.md"):
        (folder / name).write_text("a result")
    assert model_identity(str(folder)) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        # As large as it was: a later training of the same model.
        os.utime(folder / name, ns=(0, 1))
        after = model_identity(str(folder))
        assert after != before
        before = after
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert model_identity(str(folder)) != before


def test_a_file_and_the_default_have_an_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("weights")
    before = model_identity(str(file))
    monkeypatch.chdir(tmp_path)
    assert model_identity("./model.gguf") == before
    file.write_text("other weights")
    assert model_identity(str(file)) != before
    assert model_identity("default") == assets.MODEL_PACKAGE.members[0].sha256
