"""How many pages of a source are taken."""

import json
from pathlib import Path
from typing import Any

import pytest

from actsparse.errors import SourceError
from actsparse.texts import Text, load_pages


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_first_pages_can_be_taken_and_the_name_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pages.jsonl", [{"text": str(i)} for i in range(4)])
    assert load_pages(path, num_pages=2) == Text("pages.jsonl, first 2 of 4", ("0", "1"))
    assert load_pages(path, num_pages=4).name == "pages.jsonl"


@pytest.mark.parametrize("num_pages", [0, -1, 2.0, True, "3"])
def test_a_number_of_pages_that_is_no_positive_number_is_refused(tmp_path: Path, num_pages: Any) -> None:
    path = write_jsonl(tmp_path / "pages.jsonl", [{"text": "a"}])
    with pytest.raises(SourceError, match="num_pages is"):
        load_pages(path, num_pages=num_pages)


def test_more_pages_than_there_are_is_refused_with_how_many_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pages.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(SourceError, match=r"3 pages asked for, but pages\.jsonl has 2"):
        load_pages(path, num_pages=3)
