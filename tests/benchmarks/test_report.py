"""What the benchmarks share: verdicts, exit codes, JSON files and the tables made of them."""

import importlib
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from actsparse.commands.regression.case import read_case
from actsparse.commands.regression.figures import DENSE, SPARSE, CaseResult, Windows, loss_figures
from actsparse.errors import SourceError
from actsparse.runtime.environment import describe_machine, read_git_state

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = ("bars", "command", "run", "stale", "real_models", "llama_cpp", "peers", "summary", "report")


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
    assert benchmarks.bars.Bar("figure", measured, limit, is_minimum).is_met is expected


@pytest.mark.parametrize(("measured", "code"), [(1.0, 0), (2.0, 1)])
def test_a_benchmark_exits_by_its_bars_and_writes_where_its_numbers_come_from(
    benchmarks: Any, tmp_path: Path, measured: float, code: int
) -> None:
    bar = benchmarks.bars.Bar("figure", measured, 1.5, unit="s")
    path = tmp_path / "result.json"
    arguments = ["--json", str(path), "--batches", "2"]
    parser = benchmarks.command.make_parser("A benchmark.")
    measurement = benchmarks.bars.Measurement((bar,), {"model": "tiny"}, {"seconds": [measured]})
    assert benchmarks.command.run_benchmark("name", parser, lambda _: measurement, arguments) == code
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["is_met"] is (code == 0)
    assert report["command"] == "python benchmarks/name.py --batches 2"
    assert report["samples"] == {"seconds": [measured]}
    assert {"torch", "nncf", "transformers", "actsparse"} <= report["versions"].keys()
    assert {"commit", "committed_at", "is_dirty"} == report["git"].keys()
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


def write_result(benchmarks: Any, path: Path, git: dict[str, Any]) -> None:
    bars = (
        benchmarks.bars.Bar("ratio", 1.234, 1.3, unit="×", note="a note"),
        benchmarks.bars.Bar("too high", 2.0, 1.0),
        benchmarks.bars.Bar("beside", 2.0),
    )
    command = "python benchmarks/parity.py"
    contents = benchmarks.bars.describe_run("parity", command, benchmarks.bars.Measurement(bars, {}), git)
    benchmarks.bars.write_json(path, contents)


@pytest.fixture
def pages(benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Results and pages of their own; the former are made by the tests."""
    page, front_page = tmp_path / "results.md", tmp_path / "FRONT.md"
    for path, names in ((page, ("missed", "results", "cases")), (front_page, ("summary",))):
        parts = [f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->" for name in names]
        path.write_text("\n".join(["before", *parts, "after", ""]), encoding="utf-8")
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks.report, "CASE_RESULTS", tmp_path / "cases")
    monkeypatch.setattr(benchmarks.report, "CASES_PLOT", tmp_path / "cases.png")
    monkeypatch.setattr(benchmarks.report, "PAGE", page)
    monkeypatch.setattr(benchmarks.report, "FRONT_PAGE", front_page)
    return page, front_page


def test_the_page_of_results_lists_bars_and_cases(
    benchmarks: Any, pages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, front_page = pages
    write_result(benchmarks, tmp_path / "parity.json", {"commit": "c0ffee" * 7, "is_dirty": False})
    (tmp_path / "cases").mkdir()
    windows = Windows(100, (50.0, 50.0), {DENSE: (100.0, 110.0), SPARSE: (120.0, 130.0), "nncf": (125.0, 140.0)})
    environment = {
        "versions": benchmarks.bars.describe_run("", "", benchmarks.bars.Measurement((), {}), {})["versions"]
    }
    environment |= {"machine": describe_machine()}
    git = {"commit": "c0ffee" * 7, "is_dirty": False}
    case = CaseResult("half", {}, loss_figures(windows), {}, windows, git=git, environment=environment)
    benchmarks.bars.write_json(tmp_path / "cases" / "half.json", case.to_dict())
    monkeypatch.setattr(benchmarks.report, "find_reason", lambda *_: None)
    for _ in range(2):
        assert benchmarks.report.main([]) == 0
        text = page.read_text(encoding="utf-8")
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert "| parity | ratio | ≤ 1.30× | 1.23× | pass | a note |" in text
        assert "| half | – | 12.18 | 8.17 | 0.400 (0.400 – 0.400) | 0.550 | – | – | – |" in text
        assert "beside" not in text
        assert "old" not in text
        missed = text.partition("<!-- missed: end -->")[0]
        assert "| parity | too high | ≤ 1.00 | 2.00 | fail | |\n" in missed
        assert "parity | ratio" not in missed
        # Nothing was timed: the front page stays as it is.
        assert "\nold\n" in front_page.read_text(encoding="utf-8")
    assert (tmp_path / "cases.png").read_bytes().startswith(b"\x89PNG")


def test_the_front_page_puts_speed_beside_loss(benchmarks: Any, pages: tuple[Path, Path], tmp_path: Path) -> None:
    rounds = [
        {
            "llama.cpp/plain": {"decode": 12.0, "prompt": 40.0},
            "OpenVINO dense/f32": {"decode": 18.0 + more, "prompt": 24.0},
            "OpenVINO dense/bf16": {"decode": 20.0, "prompt": 16.0},
            "accelerated 50%/f32": {"decode": 10.0, "prompt": 20.0},
        }
        for more in (0.0, 5.0, 0.0)
    ]
    case = {"sparsities": {"accelerated 50%": 0.523}, "rounds": rounds}
    machine = {"processor": "Abacus", "threads": 2, "cores": 4}
    peers = {
        "samples": {"default-int8": case, "default-int4": case},
        "machine": machine,
        "settings": {"llama.cpp": {"on": {"plain": []}, "left out": ["AMX"]}},
    }
    losses = {"magnitude": (0.4, 0.6), "auto": (0.2,)}
    frontier = [
        {"algorithm": name, "sparsity": 0.5, "loss_increase": x} for name, draws in losses.items() for x in draws
    ]
    point = {"target": 0.5, "measured_sparsity": 0.504, "decode_speedup": 2.08, "ttft_ratio": {"128": 0.875}}
    figures = {"2 sequences, speed-up": 1.12, "first token after 8, over dense": 0.98, "peak memory over dense": 0.6}
    decode_speed = {
        "samples": {"1b, all 50%": [point, point | {"target": 0.05}]},
        "bars": [{"name": f"1b, all 50%: {name}", "measured": figure} for name, figure in figures.items()],
    }
    benchmarks.bars.write_json(tmp_path / "peers.json", peers)
    benchmarks.bars.write_json(tmp_path / "frontier.json", {"samples": {"all": frontier}})
    benchmarks.bars.write_json(tmp_path / "decode_speed.json", decode_speed)
    # The demo's row: 50 nats more on 100 tokens, and the decoding of its own masks.
    rows = [
        {"name": "fp32", "negative_log_likelihood": 300.0, "num_tokens": 100},
        {"name": "INT8_ASYM + sparse, mix", "negative_log_likelihood": 350.0, "sparsity": {"sparsity": 0.377}},
    ]
    decoding = {"rows": [{"name": "dense", "speedup": 1.0}, {"name": "mix, accelerated", "speedup": 1.25}]}
    benchmarks.bars.write_json(tmp_path / "demo.json", {"rows": rows, "decoding": decoding})
    text = benchmarks.summary.make_summary(benchmarks.summary.read_results(tmp_path))
    lines = text.splitlines()
    assert lines[2:7] == [
        "| SmolLM2-135M | INT8 | 50% (52.3%) | 1.80× | 1.20× | 1.25 | 0.500 (+65%) | 0.200 (+22%) |",
        "| SmolLM2-135M | INT4 | 50% (52.3%) | 1.80× | 1.20× | 1.25 | – | – |",
        "| … `make demo` | INT8 | mix = 37.7% | 1.25× | – | – | 0.500 (+65%) | – |",
        "| 1.1B Llama, random | INT8 | 50% (50.4%) | 2.08× | – | 0.88 | – | – |",
        "",
    ]
    assert "dense: 1.12 with 2. Its first tokens take 0.98 to 0.98 of dense's time, the process 0.60 of" in text
    assert lines[-1].startswith(
        "Decoding: Abacus with AMX, 2 threads of 4 cores; llama.cpp with Q8_0 and Q4_0 weights, without"
    )
    # What was timed on other code is told on the page of results alone.
    front_page = pages[1]
    benchmarks.report.replace_part(front_page, "summary", text)
    assert front_page.read_text(encoding="utf-8") == (
        f"before\n<!-- summary: begin -->\n\n{text}\n\n<!-- summary: end -->\nafter\n"
    )


def test_stale_results_are_refused_or_marked(
    benchmarks: Any, pages: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = pages[0].read_bytes()
    write_result(benchmarks, tmp_path / "parity.json", {"commit": "c0ffee" * 7, "is_dirty": False})
    with pytest.raises(SystemExit) as error:
        benchmarks.report.main([])
    assert error.value.code == 2
    assert "stale: parity was measured on c0ffeec0ff, which this checkout does not have" in capsys.readouterr().err
    assert pages[0].read_bytes() == before
    assert benchmarks.report.main(["--mark-stale"]) == 0
    text = pages[0].read_text(encoding="utf-8")
    assert "| parity \\* | ratio |" in text
    assert "\n\\* Measured on other code than what is here: parity on c0ffeec0ff.\n" in text
    (tmp_path / "parity.json").write_text('{"bars": [{}]}', encoding="utf-8")
    with pytest.raises(SystemExit):
        benchmarks.report.main(["--mark-stale"])
    assert "parity.json is no result of a benchmark" in capsys.readouterr().err


def test_a_result_is_stale_when_what_it_measured_changed(
    benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "--quiet")
    for name in ("measured.py", "other.py"):
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    state = read_git_state(tmp_path)
    assert state == {"commit": git("rev-parse", "HEAD"), "committed_at": state["committed_at"], "is_dirty": False}
    monkeypatch.setattr(benchmarks.stale, "ROOT", tmp_path)
    find_reason = benchmarks.stale.find_reason
    (tmp_path / "other.py").write_text("2\n")
    assert find_reason(state, ("measured.py",)) is None
    assert read_git_state(tmp_path)["is_dirty"] is True
    assert read_git_state(tmp_path, (tmp_path / "other.py", Path("/elsewhere")))["is_dirty"] is False
    assert "with changes that are in no commit" in find_reason(state | {"is_dirty": True}, ("measured.py",))
    assert "does not say which commit" in find_reason(None, ("measured.py",))
    (tmp_path / "measured.py").write_text("2\n")
    assert "and measured.py changed since" in find_reason(state, ("measured.py",))
    git("commit", "--quiet", "-am", "second")
    assert "and measured.py changed since" in find_reason(state, ("measured.py",))
    assert find_reason(read_git_state(tmp_path), ("measured.py",)) is None
    (tmp_path / "new.py").write_text("1\n")
    assert "and new.py changed since" in find_reason(read_git_state(tmp_path) | {"is_dirty": False}, (".",))


def test_a_case_is_run_and_its_result_kept(
    benchmarks: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(path: Path, git: dict[str, Any]) -> CaseResult:
        windows = Windows(1, (1.0,), {DENSE: (1.0,), SPARSE: (1.0,)})
        return CaseResult(path.stem, {}, loss_figures(windows), {}, windows, git=git)

    case = files / "kept.yaml"
    case.write_text("model: model\nsparsity: 0.5\n")
    monkeypatch.setattr(benchmarks.run, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmarks.run, "CASE_RESULTS", tmp_path / "cases")
    monkeypatch.setattr(benchmarks.run, "measure_apart", measure)
    with pytest.raises(SystemExit):
        benchmarks.run.main([str(case)])
    assert "kept is not in" in capsys.readouterr().err
    monkeypatch.setattr(benchmarks.run, "CASES", files)
    assert benchmarks.run.main([str(case)]) == 0
    kept = json.loads((tmp_path / "cases" / "kept.json").read_text(encoding="utf-8"))
    assert kept["name"] == "kept"
    assert kept["git"] == benchmarks.bars.read_git_state()

    def end_early(path: Path, git: dict[str, Any]) -> CaseResult:
        msg = "it ended with code -9"
        raise RuntimeError(msg)

    monkeypatch.setattr(benchmarks.run, "measure_apart", end_early)
    assert benchmarks.run.main([str(case), str(case)]) == 70
    assert capsys.readouterr().err.count("error: it ended with code -9") == 2
    with pytest.raises(SystemExit) as error:
        benchmarks.run.main(["no-such-benchmark"])
    assert error.value.code == 2
    assert "no-such-benchmark" in capsys.readouterr().err


def test_the_readme_names_every_benchmark_and_the_pages_have_every_table(benchmarks: Any) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in benchmarks.run.BENCHMARKS:
        assert (FOLDER / f"{name}.py").is_file()
        assert f"`python benchmarks/{name}.py`" in readme
    assert {read_case(path).model for path in benchmarks.run.find_cases()} == {"default"}
    tables = {
        benchmarks.report.PAGE: ("demo", "missed", "results", "cases"),
        benchmarks.report.FRONT_PAGE: ("summary",),
    }
    for path, parts in tables.items():
        text = path.read_text(encoding="utf-8")
        for part in parts:
            assert text.count(f"<!-- {part}: begin -->") == text.count(f"<!-- {part}: end -->") == 1


def test_a_benchmark_that_is_killed_has_failed(benchmarks: Any) -> None:
    assert benchmarks.run.run_program("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 137


def test_a_result_depends_on_the_modules_that_the_program_imports(benchmarks: Any) -> None:
    names = {path.name for path in benchmarks.stale.find_sources(FOLDER / "recovery.py")}
    assert names == {"recovery.py", "frontier.py", "real_models.py", "workload.py"}
