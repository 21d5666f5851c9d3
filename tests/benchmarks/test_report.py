"""What the benchmarks share: verdicts, exit codes, JSON files and the table in their README."""

import importlib
import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from actsparse.errors import SourceError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("report", "command", "run_all")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield Namespace(**{name: importlib.import_module(name) for name in MODULES})
    for name in MODULES:
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("measured", "limit", "is_minimum", "expected"),
    [
        (1.0, 1.3, False, True),
        (1.3, 1.3, False, True),
        (1.4, 1.3, False, False),
        (4.0, 4.0, True, True),
        (3.9, 4.0, True, False),
        (math.nan, 1.0, False, False),
        (math.nan, 1.0, True, False),
        (9.0, None, False, None),
    ],
)
def test_a_bar_is_met_at_its_limit_and_never_by_nan(
    benchmarks: Any, measured: float, limit: float | None, is_minimum: bool, expected: bool | None
) -> None:
    assert benchmarks.report.Bar("figure", measured, limit, is_minimum).is_met is expected


@pytest.mark.parametrize(("measured", "code"), [(1.0, 0), (2.0, 1)])
def test_a_benchmark_exits_by_its_bars_and_writes_where_its_numbers_come_from(
    benchmarks: Any, tmp_path: Path, measured: float, code: int
) -> None:
    bar = benchmarks.report.Bar("figure", measured, 1.5, unit="s")
    path = tmp_path / "result.json"
    arguments = ["--json", str(path), "--batches", "2"]
    parser = benchmarks.command.make_parser("A benchmark.")
    measurement = benchmarks.report.Measurement((bar,), {"model": "tiny"}, {"seconds": [measured]})
    assert benchmarks.command.run_benchmark("name", parser, lambda _: measurement, arguments) == code
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["is_met"] is (code == 0)
    assert report["command"] == "python benchmarks/name.py --batches 2"
    assert report["samples"] == {"seconds": [measured]}
    assert {"torch", "nncf", "transformers", "actsparse"} <= report["versions"].keys()
    assert {"commit", "is_dirty"} == report["git"].keys()
    assert {"processor", "cores", "threads"} <= report["machine"].keys()


def test_a_mistake_of_the_user_is_one_line_and_code_2(benchmarks: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: Namespace) -> Any:
        msg = "no such text"
        raise SourceError(msg)

    assert benchmarks.command.run_benchmark("name", benchmarks.command.make_parser(""), fail, []) == 2
    assert capsys.readouterr().err == "error: no such text\n"


@pytest.mark.parametrize("arguments", [["--batches", "0"], ["--length", "x"], ["--json", "no/such/folder/x.json"]])
def test_wrong_options_exit_with_code_2(benchmarks: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        benchmarks.command.run_benchmark("name", benchmarks.command.make_parser(""), pytest.fail, arguments)
    assert error.value.code == 2


def test_the_readme_table_lists_the_bars_of_the_results(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all, report = benchmarks.run_all, benchmarks.report
    bars = (report.Bar("ratio", 1.234, 1.3, unit="×", note="a note"), report.Bar("beside", 2.0))
    contents = report.describe_run("parity", "python benchmarks/parity.py", report.Measurement(bars, {}))
    report.write_json(tmp_path / "parity.json", contents)
    readme = tmp_path / "README.md"
    front_page = tmp_path / "FRONT.md"
    for path in (readme, front_page):
        path.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(run_all, "RESULTS", tmp_path)
    monkeypatch.setattr(run_all, "README", readme)
    monkeypatch.setattr(run_all, "FRONT_PAGE", front_page)
    for _ in range(2):
        assert run_all.main(["--table"]) == 0
        text = readme.read_text(encoding="utf-8")
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "| parity | ratio | ≤ 1.30× | 1.23× | pass | a note |" in text
        assert "beside" not in text
        assert "old" not in text
        assert "| parity | ratio | ≤ 1.30× | 1.23× | pass |\n" in front_page.read_text(encoding="utf-8")


def test_the_readme_names_every_benchmark(benchmarks: Any) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    front_page = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for name in benchmarks.run_all.BENCHMARKS:
        assert (FOLDER / f"{name}.py").is_file()
        assert f"`python benchmarks/{name}.py`" in readme
    for part, text in (("results", readme), ("results", front_page), ("demo", front_page)):
        assert text.count(f"<!-- {part}: begin -->") == text.count(f"<!-- {part}: end -->") == 1
