"""
Build the tables and plots of README.md and docs/results.md from benchmarks/results.

    python benchmarks/report.py [--mark-stale]

A result is refused that was measured on other code than what is here; --mark-stale puts its commit beside it instead.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bars import Bar, join_rows
from matplotlib.figure import Figure as Plot
from rich.console import Console
from run import BENCHMARKS, CASE_RESULTS, DEMO, LONG, RESULTS, ROOT
from stale import find_reason, find_sources
from summary import make_choices, make_points, make_summary, read_results

from actsparse.commands.regression.figures import CaseResult
from actsparse.commands.regression.reference import read_result
from actsparse.errors import ActsparseError, SourceError, shorten_message

FRONT_PAGE = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
CHOICES_PAGE = ROOT / "docs" / "choosing.md"
CASES_PLOT = ROOT / "docs" / "figures" / "cases.png"
# What results are made of beside their own program and what it imports.
SOURCES = {
    "decode_speed": ("actsparse/commands/bench",),
    "demo": ("actsparse/commands/demo.py",),
    "dependency_ranges": ("pyproject.toml", "actsparse"),
    "fuzz": ("examples/regression",),
    "larger_than_memory": ("actsparse/commands/sparsify.py",),
    "planted_regression": ("examples/regression/default-50.yaml", "examples/regression/reference.yaml"),
}
# Of regression cases.
CASE_SOURCES = ("actsparse/commands/regression/child.py",)
# What the table of cases shows: a column, its figure, and how.
CASE_COLUMNS = {
    "sparsity": ("sparsity", "{0.value:.1%}"),
    "word perplexity": ("word_perplexity", "{0.value:.2f}"),
    "dense": ("dense_word_perplexity", "{0.value:.2f}"),
    "loss, nats a token (95%)": ("loss_increase", "{0.value:.3f} ({0.low:.3f} – {0.high:.3f})"),
    "NNCF's loss": ("nncf_loss_increase", "{0.value:.3f}"),
    "calibration over forward passes": ("calibration_ratio", "{0.value:.2f}"),
    "peak memory": ("peak_memory_mb", "{0.value:.0f} MB"),
    "decoding over dense": ("decode_ratio", "{0.value:.2f}"),
}


def read_bars() -> dict[str, dict[str, Any]]:
    """
    Read what the benchmarks with bars measured.

    :return: The JSON files' contents by name.
    :raises SourceError: If a file is damaged.
    """
    paths = {name: RESULTS / f"{name}.json" for name in (*BENCHMARKS, *LONG)}
    return {name: read_report(path) for name, path in paths.items() if path.is_file()}


def read_report(path: Path) -> dict[str, Any]:
    """
    Read what a benchmark wrote.

    :param path: Its JSON file.
    :return: The contents.
    :raises SourceError: If it is something else.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        judged_bars(report)
        describe_origin(report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path} is no result of a benchmark: {shorten_message(error)}"
        raise SourceError(msg) from None
    return report


def read_cases() -> dict[str, CaseResult]:
    """
    Read what the regression cases measured.

    :return: Their results by name.
    """
    return {path.stem: read_result(path) for path in sorted(CASE_RESULTS.glob("*.json"))}


def find_stale(bars: dict[str, dict[str, Any]], cases: dict[str, CaseResult]) -> dict[str, str]:
    """
    Find the results that are not of the code that is here.

    :param bars: What the benchmarks measured.
    :param cases: What the cases measured.
    :return: The reason by name.
    """
    results: dict[str, tuple[Any, tuple[str, ...]]] = {}
    for name, report in bars.items():
        results[name] = (report["git"], (f"benchmarks/{name}.py", *SOURCES.get(name, ())))
    for name, case in cases.items():
        results[name] = (case.git, (f"benchmarks/cases/{name}.yaml", *CASE_SOURCES))
    demo = RESULTS / f"{DEMO}.json"
    if demo.is_file():
        results[DEMO] = (json.loads(demo.read_text(encoding="utf-8")).get("git"), SOURCES[DEMO])
    reasons = {
        name: find_reason(git, find_sources(*(ROOT / source for source in sources)))
        for name, (git, sources) in results.items()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def make_table(reports: dict[str, dict[str, Any]], stale: dict[str, str], *, only_missed: bool = False) -> str:
    """
    Turn results into a table of their bars.

    :param reports: The JSON files' contents by name.
    :param stale: Those that are marked.
    :param only_missed: Whether bars that are reached are left out.
    :return: Markdown.
    """
    shown = {name: [b for b in judged_bars(r) if not (only_missed and b.is_met)] for name, r in reports.items()}
    rows = [(mark(name, stale), *bar.cells) for name, bars in shown.items() for bar in bars]
    headings = ("benchmark", "figure", "bar", "measured", "result", "note")
    explained = explain_marks({name: reports[name] for name, bars in shown.items() if bars}, stale)
    return join_rows([headings, ("---",) * len(headings), *rows]) + explained


def judged_bars(report: dict[str, Any]) -> list[Bar]:
    """
    Read a result's figures that have something to reach.

    :param report: A JSON file's contents.
    :return: Its bars.
    """
    bars = [Bar(**{key: value for key, value in entry.items() if key != "is_met"}) for entry in report["bars"]]
    return [bar for bar in bars if bar.limit is not None]


def make_case_table(cases: dict[str, CaseResult], stale: dict[str, str]) -> str:
    """
    Turn the regression cases' results into a table.

    :param cases: The results by name.
    :param stale: Those that are marked.
    :return: Markdown.
    """
    lines = [("case", *CASE_COLUMNS), ("---", *("---:",) * len(CASE_COLUMNS))]
    for name, result in cases.items():
        cells = (
            form.format(result.figures[figure]) if figure in result.figures else "–"
            for figure, form in CASE_COLUMNS.values()
        )
        lines.append((mark(name, stale), *cells))
    return join_rows(lines) + explain_marks({name: {"git": result.git} for name, result in cases.items()}, stale)


def mark(name: str, stale: dict[str, str]) -> str:
    """
    Name a result, with a star where it is not of the code that is here.

    :param name: The result's name.
    :param stale: The results that are marked.
    :return: What the table shows.
    """
    return f"{name} \\*" if name in stale else name


def explain_marks(reports: dict[str, dict[str, Any]], stale: dict[str, str]) -> str:
    """
    Say which code the marked results are of.

    :param reports: What the table shows, with its `git`.
    :param stale: The results that are marked.
    :return: Markdown to put below the table; empty if none is marked.
    """
    marked = {name: report["git"].get("commit") or "unknown" for name, report in reports.items() if name in stale}
    commits = [f"{name} on {commit[:10]}" for name, commit in marked.items()]
    return f"\n\n\\* Measured on other code than what is here: {', '.join(commits)}." if commits else ""


def plot_cases(cases: dict[str, CaseResult], path: Path) -> None:
    """
    Draw what each case loses, beside NNCF's loss where that was measured.

    :param cases: The results by name.
    :param path: The PNG file to write.
    """
    plot = Plot(figsize=(7, 0.5 * len(cases) + 1.5), layout="constrained")
    panel = plot.subplots()
    for side, (figure, marker) in {"actsparse": ("loss_increase", "o"), "NNCF": ("nncf_loss_increase", "s")}.items():
        found = [(row, r.figures[figure]) for row, r in enumerate(cases.values()) if figure in r.figures]
        values = [f.value for _, f in found]
        errors = [[f.value - (f.low or 0) for _, f in found], [(f.high or 0) - f.value for _, f in found]]
        panel.errorbar(values, [row for row, _ in found], xerr=errors, fmt=marker, capsize=3, label=side)
    panel.set_yticks(range(len(cases)), list(cases))
    panel.set(xlabel="log(perplexity / dense perplexity), per token, with 95% intervals", ylim=(len(cases) - 0.5, -0.5))
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    plot.savefig(path, dpi=120)


def describe_origin(report: dict[str, Any]) -> str:
    """
    Say in one line which code ran on which machine.

    :param report: A JSON file's contents.
    :return: Markdown.
    """
    versions, machine, git = report["versions"], report["machine"], report["git"]
    commit = (git["commit"] or "unknown")[:10] + (", changed since" if git["is_dirty"] else "")
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "nncf", "transformers"))
    threads = f"{machine['threads']} of {machine['cores']} cores"
    return f"`{report['command']}`: commit {commit}; {packages}; {machine['processor']}, {threads}"


def describe_case_origin(result: CaseResult) -> dict[str, Any]:
    """
    Put together what `describe_origin` wants of a regression case.

    :param result: The case's result.
    :return: As a benchmark's JSON file has it.
    """
    command = f"python benchmarks/run.py benchmarks/cases/{result.name}.yaml"
    return {"command": command, "git": result.git, **{k: result.environment[k] for k in ("versions", "machine")}}


def write_tables(bars: dict[str, dict[str, Any]], cases: dict[str, CaseResult], stale: dict[str, str]) -> None:
    """
    Rewrite the generated parts of the front page and the page of results.

    :param bars: What the benchmarks measured.
    :param cases: What the cases measured.
    :param stale: The results that are marked.
    """
    results = read_results(RESULTS)
    summary = make_summary(results)
    if summary:
        replace_part(FRONT_PAGE, "summary", summary)
    choices = make_choices(results)
    if choices:
        replace_part(CHOICES_PAGE, "choices", choices)
        replace_part(CHOICES_PAGE, "points", make_points(results))
    origins = "\n".join(f"- {describe_origin(report)}" for report in bars.values())
    replace_part(PAGE, "missed", make_table(bars, stale, only_missed=True))
    replace_part(PAGE, "results", f"{make_table(bars, stale)}\n\n{origins}")
    if cases:
        origins = "\n".join(f"- {describe_origin(describe_case_origin(result))}" for result in cases.values())
        replace_part(PAGE, "cases", f"{make_case_table(cases, stale)}\n\n{origins}")
        plot_cases(cases, CASES_PLOT)
    demo = RESULTS / f"{DEMO}.md"
    if demo.is_file():
        _, _, table = demo.read_text(encoding="utf-8").partition("\n\n")
        replace_part(PAGE, DEMO, table.strip() + ("\n- stale: " + stale[DEMO] if DEMO in stale else ""))


def replace_part(path: Path, name: str, contents: str) -> None:
    """
    Replace what stands between two markers of a Markdown file.

    :param path: The file.
    :param name: The markers' name.
    :param contents: What shall stand there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{contents}\n\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Build the tables and plots.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0, or 2 if a result is stale or damaged; nothing is then written.
    """
    parser = argparse.ArgumentParser(description="Build the documentation's tables and plots from the results.")
    parser.add_argument("--mark-stale", action="store_true", help="mark stale results instead of refusing them")
    options = parser.parse_args(arguments)
    try:
        bars, cases = read_bars(), read_cases()
    except ActsparseError as error:
        parser.error(str(error))
    stale = find_stale(bars, cases)
    for name, reason in stale.items():
        Console(stderr=True).print(f"stale: {name} {reason}", markup=False, highlight=False, soft_wrap=True)
    if stale and not options.mark_stale:
        parser.error(f"{len(stale)} results are stale: run them again, or mark them with --mark-stale")
    write_tables(bars, cases, stale)
    return 0


if __name__ == "__main__":
    sys.exit(main())
