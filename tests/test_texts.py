"""Text sources: every kind of file, the hub, the packaged texts, and every way in which they can be wrong."""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from actsparse.errors import ActsparseError, DatasetError, SourceError
from actsparse.texts import Text, load_pages, token_batches

DATA = Path(os.environ.get("ACTSPARSE_DATA", Path(__file__).parents[2] / "shared" / "data"))

WIKITEXT_LINES = [" ", " = First = ", " ", " a @-@ b ", " = = Part = = ", " = Second = ", " c , d "]
WIKITEXT_PAGES = (" = First = \n \n a @-@ b \n = = Part = = ", " = Second = \n c , d \n")
ARTICLES = '<doc id="1" title="A > B">\nA > B\n\nText.\n\n</doc>\n<doc id="2" title="C">\nC\n</doc>\n'


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(num_words: int = 100, *, adds_bos: bool = False) -> Any:
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3, "a-b": 4} | {f"w{i}": 5 + i for i in range(num_words)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


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


def test_the_first_pages_can_be_taken_and_the_name_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pages.jsonl", [{"text": str(i)} for i in range(4)])
    assert load_pages(path, num_pages=2) == Text("pages.jsonl, first 2 of 4", ("0", "1"))
    assert load_pages(path, num_pages=4).name == "pages.jsonl"


def test_the_hash_depends_on_the_pages_only() -> None:
    assert Text("one", ("a", "b")).sha256 == Text("other", ("a", "b"), is_wikitext=True).sha256
    hashes = {Text("one", pages).sha256 for pages in [("a", "b"), ("ab",), ("b", "a"), ("a",)]}
    assert len(hashes) == 4


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


@pytest.mark.parametrize("num_pages", [0, -1, 2.0, True, "3"])
def test_a_number_of_pages_that_is_no_positive_number_is_refused(tmp_path: Path, num_pages: Any) -> None:
    path = write_jsonl(tmp_path / "pages.jsonl", [{"text": "a"}])
    with pytest.raises(SourceError, match="num_pages is"):
        load_pages(path, num_pages=num_pages)


def test_more_pages_than_there_are_is_refused_with_how_many_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pages.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(SourceError, match=r"3 pages asked for, but pages\.jsonl has 2"):
        load_pages(path, num_pages=3)


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


# ---- The hub and the packaged texts


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
    assert_is_one_line(error)
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


@pytest.fixture
def assets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Of the last quarter, articles 9 and 11 have a hundred words; 10 is a stub.
    lengths = {9: 98, 11: 200}
    articles = "".join(
        f'<doc id="{i}" title="T{i}">\nT{i}\n\nText{" word" * lengths.get(i, 1)}.\n\n</doc>\n' for i in range(12)
    )
    (tmp_path / "wiki.utf8").write_text(articles)
    (tmp_path / "c4.utf8").write_text("One document.\nAnother = document =\n")
    module = ModuleType("actsparse.assets")
    setattr(module, "fetch_text", lambda name: tmp_path / f"{name}.utf8")  # noqa: B010
    monkeypatch.setitem(sys.modules, "actsparse.assets", module)


@pytest.mark.usefixtures("assets")
def test_the_default_to_evaluate_on_is_the_last_quarter_of_wikipedia_without_its_stubs() -> None:
    text = load_pages("default")
    assert text.name == "packaged Wikipedia, 2 held-out articles of 100 words or more"
    assert [page.split()[0] for page in text.pages] == ["T9", "T11"]
    assert load_pages("default", num_pages=1).pages == text.pages[:1]


@pytest.mark.usefixtures("assets")
def test_the_default_to_calibrate_with_is_c4_one_document_a_line() -> None:
    text = load_pages("default-calibration")
    assert text == Text("packaged C4, 2 documents", ("One document.", "Another = document ="))
    assert load_pages("default", purpose="calibration") == text


# ---- Batches


def test_batches_are_consecutive_windows_over_all_pages() -> None:
    tokenizer = make_tokenizer()
    text = Text("words", tuple(f"w{3 * i} w{3 * i + 1} w{3 * i + 2}" for i in range(10)))
    batches = token_batches(tokenizer, text, num_batches=3, length=4, batch_size=2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4)] * 3
    assert torch.cat([batch["input_ids"].flatten() for batch in batches]).tolist() == list(range(5, 29))
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)
    assert all(bool(batch["attention_mask"].all()) for batch in batches)


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it() -> None:
    tokenizer, text = make_tokenizer(adds_bos=True), Text("words", ("w0 w1 w2 w3 w4",))
    batches = token_batches(tokenizer, text, num_batches=2, length=3)
    assert [batch["input_ids"].tolist() for batch in batches] == [[[0, 5, 6]], [[0, 7, 8]]]


def test_only_wikitext_is_detokenised() -> None:
    tokenizer = make_tokenizer()
    wikitext = token_batches(tokenizer, Text("t", ("a @-@ b",), is_wikitext=True), num_batches=1, length=1)
    assert wikitext[0]["input_ids"].tolist() == [[4]]
    plain = token_batches(tokenizer, Text("t", ("a @-@ b",)), num_batches=1, length=3)
    assert plain[0]["input_ids"].tolist() == [[3, 2, 2]]


def test_a_text_that_is_too_short_is_refused_with_how_many_batches_it_gives() -> None:
    text = Text("short.txt", ("w0 w1 w2 w3 w4 w5 w6",))
    with pytest.raises(DatasetError, match=r"short\.txt is too short: its 7 tokens make 3 batches of 1 x 2 .*not 4"):
        token_batches(make_tokenizer(), text, num_batches=4, length=2)


@pytest.mark.parametrize("name", ["num_batches", "length", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_of_batches_that_are_not_positive_are_refused(name: str, value: Any) -> None:
    numbers: dict[str, Any] = {"num_batches": 1, "length": 1, "batch_size": 1} | {name: value}
    with pytest.raises(DatasetError, match=f"{name} is {value}"):
        token_batches(make_tokenizer(), Text("t", ("w0 w1",)), **numbers)


def test_a_window_without_room_for_text_is_refused() -> None:
    with pytest.raises(DatasetError, match="no room"):
        token_batches(make_tokenizer(adds_bos=True), Text("t", ("w0",)), num_batches=1, length=1)
