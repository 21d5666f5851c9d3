"""Loading is quiet, and settings come back."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from actsparse.errors import SourceError
from actsparse.models import load_model


def test_loading_is_quiet_and_restores_the_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_model(str(folder))
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_settings_are_restored_after_a_failure_too(folder: Path, truncate: Callable[[Path], None]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    truncate(folder / "model.safetensors")
    with pytest.raises(SourceError):
        load_model(str(folder))
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
