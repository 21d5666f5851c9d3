"""WikiText pages and detokenisation, held against lm-evaluation-harness."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.texts.wikitext import detokenize, is_heading, split_pages

DATA = Path(os.environ.get("ACTSPARSE_DATA", Path(__file__).parents[3] / "shared" / "data"))

# Text dense in what the rules look at; plain random text would almost never meet them.
PIECES = st.sampled_from(
    [
        *" \n\t\"'()[]{}=/°N1s.,:;!?@-",
        "a",
        " @-@ ",
        " @,@ ",
        " @.@ ",
        " ' ",
        "= = = =",
        " N ",
        "/' 5/",
        "\x1c",
        "\u3000",
        "é",
    ]
)
WIKITEXT = st.one_of(st.lists(PIECES, max_size=60).map("".join), st.text(max_size=200))


@pytest.fixture(scope="module")
def raw_text() -> str:
    path = DATA / "wikitext-2-raw" / "wiki.test.raw"
    if not path.is_file():
        pytest.skip(f"{path} is absent; set ACTSPARSE_DATA to the folder with the evaluation data")
    return path.read_text(encoding="utf-8")


def harness_detokenize(page: str) -> str:
    preprocess = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    return preprocess.wikitext_detokenizer({"page": page})


def test_the_raw_test_file_has_62_pages_that_start_with_their_title(raw_text: str) -> None:
    pages = split_pages(raw_text)
    assert len(pages) == 62
    assert all(is_heading(page.split("\n")[0]) for page in pages)
    assert pages[0].startswith(" = Robert Boulter = \n")


def test_splitting_loses_nothing_but_blank_pages(raw_text: str) -> None:
    assert " \n" + "\n".join(split_pages(raw_text)) == raw_text


def test_every_page_detokenizes_as_in_the_harness(raw_text: str) -> None:
    for page in split_pages(raw_text):
        assert detokenize(page) == harness_detokenize(page)


@settings(deadline=None)
@given(WIKITEXT)
def test_any_text_detokenizes_as_in_the_harness(text: str) -> None:
    assert detokenize(text) == harness_detokenize(text)


@settings(deadline=None)
@given(WIKITEXT)
def test_splitting_any_text_keeps_every_line_that_is_not_blank(text: str) -> None:
    lines = "\n".join(split_pages(text)).split("\n")
    assert [line for line in lines if line.strip()] == [line for line in text.split("\n") if line.strip()]


def test_many_unclosed_brackets_take_linear_time() -> None:
    text = "( " * 200_000
    assert detokenize(text) == text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" = Robert Boulter = ", True),
        ("= Title =", True),
        (" = = Career = = ", False),
        (" = = = 2000 – 2005 = = = ", False),
        (" = = = = Deeper = = = = ", False),
        ("x = 1 =", False),
        ("", False),
        ("=", False),
    ],
)
def test_only_titles_of_articles_are_headings(line: str, expected: bool) -> None:
    assert is_heading(line) is expected


def test_text_without_titles_is_one_page_and_blank_text_is_none() -> None:
    assert split_pages("a\nb") == ["a\nb"]
    assert split_pages(" \n\n ") == []


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("a well @-@ known 1 @,@ 000 or 3 @.@ 5", "a well-known 1,000 or 3.5"),
        ('He said ( softly ) : " no " .\n', 'He said (softly): "no" .\n'),
        (" = = Career = = \n \n Robert 's", " == Career ==\n\nRobert's"),
    ],
    ids=["numbers", "brackets", "headings"],
)
def test_examples_worked_by_hand(page: str, expected: str) -> None:
    assert detokenize(page) == expected
