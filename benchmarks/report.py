"""
Build the tables and plots of README.md and benchmarks/README.md from benchmarks/results.

    python benchmarks/report.py [--mark-stale]

A result is refused that was measured on other code than what is here; --mark-stale puts its commit beside it instead.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bars import Bar
from matplotlib.figure import Figure as Plot
from rich.console import Console
from run import BENCHMARKS, CASE_RESULTS, DEMO, FOLDER, RESULTS, ROOT
from stale import find_reason

from actsparse.errors import ActsparseError
from actsparse.regression.figures import CaseResult, Figure
from actsparse.regression.reference import read_result

README = FOLDER / "README.md"
FRONT_PAGE = ROOT / "README.md"
CASES_PLOT = ROOT / "docs" / "figures" / "cases.png"
# What every benchmark measures, beside its own file.
CODE = "actsparse"
CASE_COLUMNS = (
    "case",
    "sparsity",
    "word perplexity",
    "dense",
    "loss, nats a token (95%)",
    "NNCF's loss",
    "calibration over forward passes",
    "peak memory",
    "decoding over dense",
)


def read_bars() -> dict[str, dict[str, Any]]:
    """
    Read what the benchmarks with bars measured.

    :return: The JSON files' contents by name.
    """
    paths = {name: RESULTS / f"{name}.json" for name in BENCHMARKS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


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
    reasons = {name: find_reason(report["git"], (CODE, f"benchmarks/{name}.py")) for name, report in bars.items()}
    reasons |= {
        name: find_reason(result.git, (CODE, f"benchmarks/cases/{name}.yaml")) for name, result in cases.items()
    }
    demo = RESULTS / f"{DEMO}.json"
    if demo.is_file():
        reasons[DEMO] = find_reason(json.loads(demo.read_text(encoding="utf-8")).get("git"), (CODE,))
    return {name: reason for name, reason in reasons.items() if reason is not None}


def make_table(reports: dict[str, dict[str, Any]], stale: dict[str, str], *, has_notes: bool) -> str:
    """
    Turn results into a table of their bars.

    :param reports: The JSON files' contents by name.
    :param stale: Those that are marked.
    :param has_notes: Whether the table has a column for notes.
    :return: Markdown.
    """
    headings = ("benchmark", "figure", "bar", "measured", "result", "note")[: 6 if has_notes else 5]
    lines = [headings, ("---",) * len(headings)]
    for name, report in reports.items():
        for entry in report["bars"]:
            bar = Bar(**{key: value for key, value in entry.items() if key != "is_met"})
            if bar.limit is not None:
                lines.append((mark(name, report["git"], stale), *bar.cells)[: len(headings)])
    return join_rows(lines)


def make_case_table(cases: dict[str, CaseResult], stale: dict[str, str]) -> str:
    """
    Turn the regression cases' results into a table.

    :param cases: The results by name.
    :param stale: Those that are marked.
    :return: Markdown.
    """
    lines = [CASE_COLUMNS, ("---", *("---:",) * (len(CASE_COLUMNS) - 1))]
    for name, result in cases.items():
        figures = result.figures
        loss = figures["loss_increase"]
        lines.append((
            mark(name, result.git, stale),
            show(figures.get("sparsity"), "{:.1%}"),
            show(figures.get("word_perplexity"), "{:.2f}"),
            show(figures.get("dense_word_perplexity"), "{:.2f}"),
            f"{loss.value:.3f} ({loss.low:.3f} – {loss.high:.3f})",
            show(figures.get("nncf_loss_increase"), "{:.3f}"),
            show(figures.get("calibration_ratio"), "{:.2f}"),
            show(figures.get("peak_memory_mb"), "{:.0f} MB"),
            show(figures.get("decode_ratio"), "{:.2f}"),
        ))  # fmt: skip
    return join_rows(lines)


def mark(name: str, git: dict[str, Any], stale: dict[str, str]) -> str:
    """
    Name a result, with its commit where that is not what is here.

    :param name: The result's name.
    :param git: Which code it measured.
    :param stale: The results that are marked.
    :return: What the table shows.
    """
    return f"{name} (stale: {(git.get('commit') or 'unknown')[:10]})" if name in stale else name


def show(figure: Figure | None, form: str) -> str:
    """
    Format a figure.

    :param figure: The figure, or None where there is none.
    :param form: How.
    :return: The text.
    """
    return "–" if figure is None else form.format(figure.value)


def join_rows(lines: Sequence[tuple[str, ...]]) -> str:
    """
    Write rows as Markdown.

    :param lines: The rows.
    :return: The table.
    """
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


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
    Rewrite the generated parts of both README files.

    :param bars: What the benchmarks measured.
    :param cases: What the cases measured.
    :param stale: The results that are marked.
    """
    origins = "\n".join(f"- {describe_origin(report)}" for report in bars.values())
    replace_part(README, "results", f"{make_table(bars, stale, has_notes=True)}\n\n{origins}")
    replace_part(FRONT_PAGE, "results", make_table(bars, stale, has_notes=False))
    if cases:
        origins = "\n".join(f"- {describe_origin(describe_case_origin(result))}" for result in cases.values())
        replace_part(README, "cases", f"{make_case_table(cases, stale)}\n\n{origins}")
        replace_part(FRONT_PAGE, "cases", make_case_table(cases, stale))
        plot_cases(cases, CASES_PLOT)
    demo = RESULTS / f"{DEMO}.md"
    if demo.is_file():
        _, _, table = demo.read_text(encoding="utf-8").partition("\n\n")
        replace_part(FRONT_PAGE, DEMO, table.strip() + ("\n- stale: " + stale[DEMO] if DEMO in stale else ""))


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
    parser = argparse.ArgumentParser(description="Build the README files' tables and plots from the results.")
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
