"""References: written whole, read back, tolerances kept, and other files refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actsparse.commands.regression import reference as module
from actsparse.commands.regression.figures import CaseResult
from actsparse.commands.regression.reference import read_reference, write_reference
from actsparse.errors import OutputError, SourceError

MakeResult = Callable[..., CaseResult]


def accept(path: Path, result: CaseResult, reason: str = "because") -> None:
    before = read_reference(path) if path.exists() else None
    results = {result.name: (path.parent / "cases" / f"{result.name}.yaml", result)}
    write_reference(path, before, results, reason, {"commit": "c0ffee", "is_dirty": True})


def test_a_reference_is_read_as_it_was_written(make_result: MakeResult, tmp_path: Path) -> None:
    path, result = tmp_path / "reference.yaml", make_result()
    accept(path, result, "first: figures")
    found = read_reference(path)
    assert found.case_path("small") == tmp_path / "cases" / "small.yaml"
    assert found.read_result("small") == result
    assert found.cases["small"].figures["sparsity"].value == 0.5
    assert [(u.reason, u.cases, u.commit, u.is_dirty) for u in found.updates] == [
        ("first: figures", ("small",), "c0ffee", True)
    ]


def test_an_update_keeps_tolerances_and_other_cases_and_says_why(make_result: MakeResult, tmp_path: Path) -> None:
    path = tmp_path / "reference.yaml"
    accept(path, make_result(), "one")
    accept(path, make_result(name="other"), "two")
    path.write_text(path.read_text().replace("absolute: 0.01", "absolute: 0.25", 1))
    accept(path, make_result(1.0, sparsity=0.6), "three")
    found = read_reference(path)
    sparsity = found.cases["small"].figures["sparsity"]
    assert sparsity.value == 0.6
    assert sparsity.tolerance is not None
    assert sparsity.tolerance.absolute == 0.25
    assert found.read_result("other") == make_result(name="other")
    assert [update.reason for update in found.updates] == ["one", "two", "three"]
    # The windows of what was replaced are gone, the others are there.
    names = {case.result for case in found.cases.values()}
    assert {file.name for file in (tmp_path / "reference.results").iterdir()} == names


def test_an_update_that_is_cut_off_leaves_the_reference_as_it_was(
    make_result: MakeResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "reference.yaml"
    accept(path, make_result())
    before = path.read_bytes()

    def fail(*_: object) -> None:
        msg = "no space"
        raise OutputError(msg)

    monkeypatch.setattr(module, "write_yaml", fail)
    with pytest.raises(OutputError):
        accept(path, make_result(1.0))
    assert path.read_bytes() == before
    assert read_reference(path).read_result("small") == make_result()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format: 1", "format: 2", "this version of actsparse reads 1"),
        ("sparsity:", "sparsty:", "there is no figure 'sparsty'; nearest: sparsity"),
        ("absolute: 0.01", "absolute: -1", "0 or more"),
        ("absolute: 0.01", "absolute: 0.01\n          relative: 1", "one of absolute, relative and interval"),
        ("absolute: 0.01", "interval: 0.01", "sparsity is no figure of the loss"),
        ("absolute: 0.01", "absolut: 0.01", "nearest: absolute"),
        ("result: small-", "result: ../small-", "no name of a result's JSON file"),
        ("case: cases/small.yaml", "case: cases/big.yaml", "not named after its file"),
        ("value: 0.5", "value: .nan", "takes a number"),
    ],
)
def test_a_mistake_in_a_reference_is_told(
    make_result: MakeResult, tmp_path: Path, old: str, new: str, message: str
) -> None:
    path = tmp_path / "reference.yaml"
    accept(path, make_result())
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SourceError) as error:
        read_reference(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"null", b'{"name": 1}', b"\xff"])
def test_a_damaged_result_is_told(make_result: MakeResult, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "reference.yaml"
    accept(path, make_result())
    found = read_reference(path)
    (tmp_path / "reference.results" / found.cases["small"].result).write_bytes(data)
    with pytest.raises(SourceError, match="small-"):
        found.read_result("small")
    contents = make_result().to_dict()
    contents["windows"]["losses"]["dense"][0] = float("nan")
    (tmp_path / "reference.results" / found.cases["small"].result).write_text(json.dumps(contents))
    with pytest.raises(SourceError, match="finite"):
        found.read_result("small")
