"""The packaged texts."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from actsparse.texts import Text, load_pages


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Of the first articles, 3 has a hundred words; of the last quarter, 9 and 11 have; 10 is a stub.
    lengths = {3: 150, 9: 98, 11: 200}
    articles = "".join(
        f'<doc id="{i}" title="T{i}">\nT{i}\n\nText{" word" * lengths.get(i, 1)}.\n\n</doc>\n' for i in range(12)
    )
    (tmp_path / "wiki.utf8").write_text(articles)
    (tmp_path / "c4.utf8").write_text("One document.\nAnother = document =\n")
    module = ModuleType("actsparse.storage.assets")
    setattr(module, "fetch_text", lambda name: tmp_path / f"{name}.utf8")  # noqa: B010
    monkeypatch.setitem(sys.modules, "actsparse.storage.assets", module)


@pytest.mark.usefixtures("assets")
def test_the_default_to_evaluate_on_is_the_last_quarter_of_wikipedia_without_its_stubs() -> None:
    text = load_pages("default")
    assert text.name == "packaged Wikipedia, 2 held-out articles of 100 words or more"
    assert [page.split()[0] for page in text.pages] == ["T9", "T11"]
    assert load_pages("default", num_pages=1).pages == text.pages[:1]


@pytest.mark.usefixtures("assets")
def test_the_default_to_train_on_holds_nothing_that_is_evaluated_on() -> None:
    text = load_pages("default", purpose="training")
    assert [page.split()[0] for page in text.pages] == ["One", "Another", "T3"]
    assert not set(text.pages) & set(load_pages("default").pages)


@pytest.mark.usefixtures("assets")
def test_the_default_to_calibrate_with_is_c4_one_document_a_line() -> None:
    text = load_pages("default-calibration")
    assert text == Text("packaged C4, 2 documents", ("One document.", "Another = document ="))
    assert load_pages("default", purpose="calibration") == text
