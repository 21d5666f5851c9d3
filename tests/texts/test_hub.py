"""WikiText-2 from the hub, and what is said where there is none."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from actsparse.errors import SourceError
from actsparse.texts import load_pages

WIKITEXT_LINES = [" ", " = First = ", " ", " a @-@ b ", " = = Part = = ", " = Second = ", " c , d "]
WIKITEXT_PAGES = (" = First = \n \n a @-@ b \n = = Part = = ", " = Second = \n c , d \n")
ARTICLES = '<doc id="1" title="A > B">\nA > B\n\nText.\n\n</doc>\n<doc id="2" title="C">\nC\n</doc>\n'


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = pytest.importorskip("datasets.config")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refuse(*args: Any, **kwargs: Any) -> None:
        msg = "no network"
        raise ConnectionError(msg)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))


@pytest.mark.usefixtures("no_hub")
def test_without_a_network_the_hub_is_refused_soon_and_in_one_line(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import config

    before = config.HF_HUB_OFFLINE
    started = time.monotonic()
    with pytest.raises(SourceError, match="does not answer, and there is no copy in the cache") as error:
        load_pages("wikitext")
    assert time.monotonic() - started < 10
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert before == config.HF_HUB_OFFLINE


def test_without_the_datasets_package_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r"pip install 'actsparse\[hub\]'"):
        load_pages("wikitext")


@pytest.mark.usefixtures("no_hub")
def test_the_hub_gives_the_test_split_to_evaluate_and_the_train_split_to_calibrate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def load(repository: str, name: str, split: str) -> list[dict[str, str]]:
        if repository.startswith("EleutherAI"):
            raise DatasetNotFoundError(repository)
        return [{"text": line.replace("First", split) + "\n" if line.strip() else ""} for line in WIKITEXT_LINES]

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = load_pages("wikitext", num_pages=1)
    assert text.name == "wikitext-2-raw test (hub), first 1 of 2"
    assert text.pages == (WIKITEXT_PAGES[0].replace("First", "test"),)
    text = load_pages("wikitext", purpose="calibration")
    assert text.name == "wikitext-2-raw train (hub)"
    assert text.pages[0].startswith(" = train = ")
