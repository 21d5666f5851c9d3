"""What the benchmarks share: verdicts, exit codes, JSON files and the tables made of them."""

import importlib
import json
import math
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Checkout:
    folder: Path
    stale: Any

    def git(self, *arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=True).stdout.strip()

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True, parents=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def sources(self, *roots: str) -> list[str]:
        return [str(x.relative_to(self.folder)) for x in self.stale.find_sources(*(self.folder / r for r in roots))]

    def reason(self, git: dict[str, Any] | None, *roots: str) -> str | None:
        return self.stale.find_reason(git, self.stale.find_sources(*(self.folder / root for root in roots)))


@pytest.fixture
def checkout(benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """A checkout with a small package and two programs, in place of this one."""
    monkeypatch.setattr(benchmarks.stale, "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks.stale, "FOLDER", tmp_path / "benchmarks")
    found = Checkout(tmp_path, benchmarks.stale)
    found.git("init", "--quiet")
    for name, text in FILES.items():
        found.write(name, text)
    found.git("add", ".")
    found.git("commit", "--quiet", "-m", "first")
    return found


FILES = {
    "actsparse/__init__.py": "from actsparse.sparse import mask as mask\n",
    "actsparse/sparse/__init__.py": "from actsparse.sparse.masks import mask as mask\nRATE = 1\n",
    "actsparse/sparse/masks.py": '"""Masks."""\nimport actsparse.tools\n\ndef mask(x):\n    "Mask."\n    return x\n',
    "actsparse/tools.py": "LIMIT = 1\n\ndef tool():\n    from actsparse import late\n    return late\n",
    "actsparse/late.py": "WHEN = 1\n",
    "actsparse/child.py": "WHO = 1\n",
    "actsparse/other.py": "WHAT = 1\n",
    "benchmarks/one.py": "import tools\nfrom actsparse import mask\nfrom beside import run\nprint(mask, run)\n",
    "benchmarks/beside.py": 'COMMAND = ["-m", "actsparse.child"]\n\ndef run():\n    return COMMAND\n',
    "benchmarks/two.py": "import torch\nfrom actsparse.sparse import RATE\n",
    "cases/one.yaml": "sparsity: 0.5\n",
}


def test_a_result_is_made_of_what_its_program_imports(checkout: Checkout) -> None:
    package = ["actsparse/child.py", "actsparse/late.py", "actsparse/sparse/masks.py", "actsparse/tools.py"]
    assert checkout.sources("benchmarks/one.py") == [*package, "benchmarks/beside.py", "benchmarks/one.py"]
    # What a package itself defines, it also imports.
    assert checkout.sources("benchmarks/two.py") == [
        "actsparse/late.py",
        "actsparse/sparse/__init__.py",
        "actsparse/sparse/masks.py",
        "actsparse/tools.py",
        "benchmarks/two.py",
    ]
    assert checkout.sources("cases", "actsparse/other.py") == ["actsparse/other.py", "cases/one.yaml"]


def test_a_result_is_stale_when_what_it_is_made_of_changed(checkout: Checkout) -> None:
    state = read_git_state(checkout.folder)
    short = checkout.git("rev-parse", "HEAD")[:10]
    checkout.write("actsparse/other.py", "WHAT = 2\n")
    assert checkout.reason(state, "benchmarks/one.py", "cases") is None
    assert read_git_state(checkout.folder)["is_dirty"] is True
    unrelated = (checkout.folder / "actsparse" / "other.py", Path("/elsewhere"))
    assert read_git_state(checkout.folder, unrelated)["is_dirty"] is False
    dirty = checkout.reason(state | {"is_dirty": True}, "benchmarks/one.py")
    assert dirty == f"was measured on {short} with changes that are in no commit"
    assert checkout.reason(None, "benchmarks/one.py") == "does not say which commit was measured"
    unknown = checkout.reason(state | {"commit": "c0ffee" * 7}, "benchmarks/one.py")
    assert unknown == "was measured on c0ffeec0ff, which this checkout does not have"
    for name, text in (("actsparse/tools.py", "LIMIT = 2\n"), ("cases/one.yaml", "sparsity: 0.6\n")):
        before = (checkout.folder / name).read_text(encoding="utf-8")
        checkout.write(name, text)
        expected = f"was measured on {short}, and {name} changed since"
        assert checkout.reason(state, "benchmarks/one.py", "cases") == expected
        checkout.git("commit", "--quiet", "-am", name)
        assert checkout.reason(state, "benchmarks/one.py", "cases") == expected
        assert checkout.reason(read_git_state(checkout.folder), "benchmarks/one.py", "cases") is None
        checkout.write(name, before)
    checkout.write("actsparse/late.py", "WHEN = 2\n")
    checkout.write("benchmarks/one.py", "from actsparse.new import x\nfrom actsparse import late\nprint(x)\n")
    checkout.write("actsparse/new.py", "x = 1\n")
    assert checkout.reason(state, "benchmarks/one.py") == (
        f"was measured on {short}, and actsparse/late.py and 2 more changed since"
    )


def test_code_that_moves_and_words_about_it_change_no_result(checkout: Checkout) -> None:
    state = read_git_state(checkout.folder)
    checkout.git("mv", "actsparse/sparse/masks.py", "actsparse/moved.py")
    text = '"""Other words."""\nimport actsparse.parts\n\n# A remark.\ndef mask(x):\n    "Words."\n    return  x\n'
    checkout.write("actsparse/moved.py", text)
    checkout.write("actsparse/sparse/__init__.py", "from actsparse.moved import mask as mask\nRATE = 1\n")
    # A module taken apart.
    checkout.git("mv", "actsparse/tools.py", "actsparse/parts.py")
    limit, _, tool = FILES["actsparse/tools.py"].partition("\n\n")
    checkout.write("actsparse/parts.py", f"from actsparse.limits import LIMIT\n{tool}")
    checkout.write("actsparse/limits.py", limit)
    assert {"actsparse/moved.py", "actsparse/parts.py", "actsparse/limits.py"} <= {
        *checkout.sources("benchmarks/one.py")
    }
    assert checkout.reason(state, "benchmarks/one.py", "benchmarks/two.py") is None
    checkout.write("actsparse/moved.py", text.replace("return  x", "return -x"))
    assert "actsparse/moved.py changed since" in (checkout.reason(state, "benchmarks/one.py") or "")


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
    sources = benchmarks.stale.find_sources(FOLDER / "recovery.py")
    names = {path.name for path in sources if path.parent == FOLDER}
    assert names == {"recovery.py", "frontier.py", "real_models.py", "workload.py"}
    found = {str(path.relative_to(FOLDER.parent)) for path in benchmarks.stale.find_sources(FOLDER / "kernel_speed.py")}
    assert {"actsparse/openvino/acceleration.py", "actsparse/openvino/extension/kernels.cc"} <= found
    assert not {path for path in found if path.startswith(("actsparse/recovery", "actsparse/algorithms"))}
    sources = [source for paths in benchmarks.report.SOURCES.values() for source in paths]
    for source in (*sources, *benchmarks.report.CASE_SOURCES):
        assert (FOLDER.parent / source).exists(), source


def test_the_fastest_of_each_kind_within_a_budget_are_chosen_from(benchmarks: Any) -> None:
    def point(name: str, group: str, loss: float, milliseconds: float, *, is_dense: bool = True) -> dict[str, Any]:
        return {
            "name": name,
            "group": group,
            "loss_increase": loss,
            "decode_ms": milliseconds,
            "is_dense": is_dense,
            "loss_increase_interval": [loss - 0.001, loss + 0.001],
            "measured_sparsity": 0.0 if is_dense else 0.2,
            "first_token_ms": 50.0,
            "disk": 100e6,
            "peak": None,
        }

    points = [
        point("int8, dense", "OpenVINO int8", 0.001, 10.0),
        point("int4, dense", "OpenVINO int4", 0.2, 5.0),
        point("llama.cpp Q8_0", "llama.cpp", 0.001, 8.0),
        point("int8, auto 20.0%", "int8", 0.002, 7.0, is_dense=False),
        point("int8, auto 50.0%", "int8", 0.09, 4.0, is_dense=False),
    ]
    assert [benchmarks.summary.kind_of_point(x) for x in points[:4:2]] == ["OpenVINO", "llama.cpp"]
    results = {"pareto": {"samples": {"qwen": points}}}
    table = benchmarks.summary.make_choices(results)
    everything = benchmarks.summary.make_points(results)
    assert "| int8, auto 20.0% | 20.0% | 0.0020 (0.0010 to 0.0030) | 143 | 50 | 100 | – |" in everything
    rows = [row for row in table.splitlines() if row.startswith("| Qwen")]
    first, last = rows[0], rows[-1]
    assert "int8, dense: 100 tokens/s, +0.1% | Q8_0: 125 tokens/s, +0.1% | int8, auto 20.0%: 143" in first
    assert first.endswith("| 1.14× |")
    assert "int4, dense: 200" in last
    assert last.endswith("| 1.25× |")
    assert benchmarks.summary.make_choices({}) == ""
