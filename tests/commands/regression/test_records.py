"""The part of YAML that is read: no tags, anchors, repeated keys or depth; and nothing hangs."""

import contextlib
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsparse.commands.regression.records import MAX_BYTES, read_yaml, write_yaml
from actsparse.errors import SourceError

TEXT = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers(-(10**17), 10**17) | TEXT
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(SCALARS | FLOATS, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3))


@given(contents=st.dictionaries(TEXT, VALUES, max_size=5))
def test_what_is_written_is_read_back(contents, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "file.yaml"
    write_yaml(path, contents, "A file.")
    try:
        assert read_yaml(path) == contents
    except SourceError as error:
        assert "nested deeper" in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x", "an anchor is not accepted here"),
        ("a: *x", "an alias is not accepted here"),
        ("a: !!python/object/apply:os.system [ls]", "a tag is not accepted here"),
        ("a: !!int '1:1:1'", "a tag is not accepted here"),
        ("a: 1\na: 2", "the key 'a' stands twice"),
        ("? [1]\n: 2", "a key is not text"),
        ("a: " + "[" * 50 + "]" * 50, "nested deeper than 12 levels"),
        ("- 1", "holds no keys"),
        ("", "holds no keys"),
        ("a: 1\n--- \nb: 2", "another document"),
        ("a: 'b", "line 1"),
        ("a: \0", "no YAML"),
        ("a:\tb: c", "no YAML"),
    ],
)
def test_the_rest_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(SourceError) as error:
        read_yaml(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("on", "on"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"), ("0x10", "0x10"), ("1_0", "1_0"),
        ("null", None), ("", None), ("true", True), ("-3", -3), ("1e-3", 0.001), (".5", 0.5), (".inf", ".inf"),
        ("08", 8), ("-010", -10),
    ],
)  # fmt: skip
def test_values_are_what_they_look_like(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(f"a: {text}\n")
    found = read_yaml(tmp_path / "file.yaml")["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["08", "010", "1e5", "12e-3", "1_0", "no", "2026-01-01", "~", "", "0x1"])
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: Path) -> None:
    write_yaml(tmp_path / "file.yaml", {text: text}, "A file.")
    assert read_yaml(tmp_path / "file.yaml") == {text: text}


@pytest.mark.parametrize("unit", b"[|{a: |- |? |9|a: &a [*a]\n|!|'|a:\n |1:1|#".split(b"|"))
def test_no_file_takes_long(unit: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(b"a: " + unit * (20_000 // len(unit)))
    start = time.perf_counter()
    with contextlib.suppress(SourceError):
        read_yaml(path)
    assert time.perf_counter() - start < 20


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_bytes(b"a: " + b"x" * MAX_BYTES)
    with pytest.raises(SourceError, match="larger than 256 kB"):
        read_yaml(tmp_path / "file.yaml")
    with pytest.raises(SourceError, match="Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(SourceError, match="No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(SourceError, match="null byte"):
        read_yaml(tmp_path / "a\0b")
