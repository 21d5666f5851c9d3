"""Text files of every kind, the pages and rows that they hold, and every way in which they can be wrong."""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.errors import ActsparseError, SourceError
from actsparse.texts import Text, load_pages

DATA = Path(os.environ.get("ACTSPARSE_DATA", Path(__file__).parents[3] / "shared" / "data"))

WIKITEXT_LINES = [" ", " = First = ", " ", " a @-@ b ", " = = Part = = ", " = Second = ", " c , d "]
WIKITEXT_PAGES = (" = First = \n \n a @-@ b \n = = Part = = ", " = Second = \n c , d \n")
ARTICLES = '<doc id="1" title="A > B">\nA > B\n\nText.\n\n</doc>\n<doc id="2" title="C">\nC\n</doc>\n'


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@dataclass(frozen=True)
class FileCase:
    """A file's contents and the pages that it holds."""

    name: str
    content: str
    pages: tuple[str, ...]
    is_wikitext: bool


FILES = [
    FileCase("wiki.raw", "\n".join(WIKITEXT_LINES) + "\n", WIKITEXT_PAGES, True),
    FileCase("wiki.TOKENS", "\n".join(WIKITEXT_LINES) + "\n", WIKITEXT_PAGES, True),
    FileCase("wiki.txt", "\r\n".join(WIKITEXT_LINES) + "\r\n", WIKITEXT_PAGES, True),
    FileCase("part.tokens", " a @-@ b ", (" a @-@ b ",), True),
    FileCase("plain.txt", "\ufeffOne.\n\nTwo = 2\n", ("One.\n\nTwo = 2\n",), False),
    FileCase("articles.txt", ARTICLES, ("A > B\n\nText.", "C"), False),
    FileCase("cut.txt", ARTICLES + "<doc ", (ARTICLES + "<doc ",), False),
    FileCase("pages.jsonl", '{"page": "x", "text": "y"}\n\n{"content": "é\\n"}\n{"text": " "}\n', ("x", "é\n"), False),
    FileCase("wiki.jsonl", json.dumps({"page": WIKITEXT_PAGES[0]}), WIKITEXT_PAGES[:1], True),
]


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_a_file_gives_its_pages(tmp_path: Path, case: FileCase) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.content.encode())
    assert load_pages(str(path)) == Text(case.name, case.pages, case.is_wikitext)


def test_a_parquet_file_gives_a_page_a_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pages.parquet", {"id": [1, 2], "text": ["x\ny", "z"]})
    assert load_pages(path) == Text("pages.parquet", ("x\ny", "z"))


@pytest.mark.parametrize("ending", ["\n", ""])
def test_rows_that_are_lines_of_wikitext_give_its_articles(tmp_path: Path, ending: str) -> None:
    rows = [line + ending if line.strip() else "" for line in WIKITEXT_LINES]
    path = write_parquet(tmp_path / "lines.parquet", {"text": rows})
    assert load_pages(path) == Text("lines.parquet", WIKITEXT_PAGES, is_wikitext=True)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("lines", [WIKITEXT_LINES, ["One.", "", "Two."]], ids=["wikitext", "plain"])
def test_a_text_is_the_same_however_its_lines_end_and_whatever_holds_it(
    tmp_path: Path, lines: list[str], suffix: str
) -> None:
    def write(text: str) -> Path:
        path = tmp_path / f"text.{suffix}"
        if suffix == "parquet":
            return write_parquet(path, {"text": [text]})
        path.write_bytes((json.dumps({"text": text}) if suffix == "jsonl" else text).encode())
        return path

    expected = load_pages(write("\n".join(lines)))
    assert load_pages(write("\ufeff" + "\r\n".join(lines))) == expected
    assert "\r" not in "".join(expected.pages)


def test_lines_of_wikitext_may_end_as_windows_ends_them(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "lines.parquet", {"text": [f"{line}\r\n" for line in WIKITEXT_LINES]})
    assert load_pages(path) == Text("lines.parquet", WIKITEXT_PAGES, is_wikitext=True)


@pytest.mark.parametrize(
    ("folder", "name", "num_pages"),
    [("wikitext-2-raw", "wiki.test.raw", 62), ("wikitext-2-v1", "wiki.valid.tokens", 60)],
)
def test_wikitext_2_gives_its_articles(folder: str, name: str, num_pages: int) -> None:
    path = DATA / folder / name
    if not path.is_file():
        pytest.skip(f"{path} is absent; set ACTSPARSE_DATA to the folder with the evaluation data")
    text = load_pages(path)
    assert (len(text.pages), text.is_wikitext) == (num_pages, True)


def test_wikitext_2_read_line_by_line_gives_the_same_articles(tmp_path: Path) -> None:
    source = DATA / "wikitext-2-raw" / "wiki.test.raw"
    if not source.is_file():
        pytest.skip(f"{source} is absent; set ACTSPARSE_DATA to the folder with the evaluation data")
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    path = write_parquet(tmp_path / "test.parquet", {"text": [line if line.strip() else "" for line in lines]})
    assert load_pages(path).sha256 == load_pages(source).sha256


# ---- What can be wrong


@dataclass(frozen=True)
class BadCase:
    """A file that cannot be used, and what the error says of it."""

    name: str
    content: bytes
    message: str


BAD_FILES = [
    BadCase("empty.txt", b"", "contains no text"),
    BadCase("blank.raw", b" \n \n", "contains no text"),
    BadCase("empty.jsonl", b"", "contains no text"),
    BadCase("nul.txt", b"a\0b", "binary file"),
    BadCase("latin1.txt", "café".encode("latin-1"), r"not UTF-8 text \(at byte 3\)"),
    BadCase("notes.docx", b"x", r"not of a kind that can be read: \.txt, \.raw"),
    BadCase("broken.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3 of broken.jsonl is not JSON"),
    BadCase("deep.jsonl", b"[" * 100_000, "line 1 of deep.jsonl is not JSON"),
    BadCase("digits.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 of digits.jsonl is not JSON"),
    BadCase("list.jsonl", b'["a"]', "line 1 of list.jsonl is not a JSON object"),
    BadCase("column.jsonl", b'{"txt": "a"}', "none of the columns page, text, content; it has txt"),
    BadCase("number.jsonl", b'{"text": 1}', "'text' in line 1 of number.jsonl is of type int"),
    BadCase("surrogate.jsonl", b'{"text": "\\ud800"}', "page 1 of surrogate.jsonl contains a lone surrogate"),
    BadCase("text.parquet", b"not parquet", "text.parquet is not a readable Parquet file"),
    BadCase("magic.parquet", b"PAR1" + bytes(40) + b"PAR1", "magic.parquet is not a readable Parquet file"),
]


def assert_is_one_line(error: pytest.ExceptionInfo[ActsparseError]) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", BAD_FILES, ids=lambda case: case.name)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, case: BadCase) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.content)
    with pytest.raises(SourceError, match=case.message) as error:
        load_pages(str(path))
    assert_is_one_line(error)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"title": ["a"]}, "none of the columns page, text, content; it has title"),
        ({"text": [1]}, "'text' in row 1 of bad.parquet is of type int"),
        ({"text": ["a", None]}, "'text' in row 2 of bad.parquet is of type NoneType"),
        ({"text": pa.array([], pa.string())}, "contains no text"),
    ],
    ids=["no column", "numbers", "missing", "no rows"],
)
def test_a_parquet_file_without_text_is_refused(tmp_path: Path, columns: Any, message: str) -> None:
    path = write_parquet(tmp_path / "bad.parquet", columns)
    with pytest.raises(SourceError, match=message):
        load_pages(str(path))


def test_a_missing_file_is_answered_with_the_nearest_names(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text("x")
    (tmp_path / "wiki.test.zip").write_text("x")
    with pytest.raises(SourceError, match=r"no text source or file .*; nearest: [^,]*wiki\.test\.raw"):
        load_pages(str(tmp_path / "wiki.tst.raw"))
    with pytest.raises(SourceError, match="nearest: wikitext"):
        load_pages("wikitxt")


def test_a_folder_is_answered_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x")
    with pytest.raises(SourceError, match=r"is a folder; give a file of it: .*a\.jsonl"):
        load_pages(str(tmp_path))


@pytest.mark.parametrize("source", ["", "a\0b", "a" * 10_000, "no/such/folder/file.txt", "a\nb"])
def test_a_source_that_is_no_path_is_refused_in_one_line(source: str) -> None:
    with pytest.raises(SourceError) as error:
        load_pages(source)
    assert_is_one_line(error)


def load_bytes(suffix: str, content: bytes) -> Text | ActsparseError:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"fuzz{suffix}"
        path.write_bytes(content)
        try:
            return load_pages(str(path))
        except ActsparseError as error:
            return error


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".jsonl", ".parquet"])
@settings(deadline=None)
@given(content=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)))
def test_any_bytes_give_pages_or_an_error_of_ours(suffix: str, content: bytes) -> None:
    assert load_bytes(suffix, content)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["page", "text", "content", "id"]), JSON_VALUES) | JSON_VALUES, max_size=5
)


@settings(deadline=None)
@given(rows=ROWS)
def test_any_json_rows_give_pages_or_an_error_of_ours(rows: list[Any]) -> None:
    assert load_bytes(".jsonl", "\n".join(json.dumps(row) for row in rows).encode())


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_parquet_file_gives_pages_or_an_error_of_ours(data: st.DataObject) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["one page", "another"]}), sink)
    content = bytearray(sink.getvalue().to_pybytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    assert load_bytes(".parquet", bytes(content[: data.draw(st.integers(1, len(content)))]))
