"""
Hold our word perplexity against lm-evaluation-harness: the same model, the same pages, both numbers.

    python benchmarks/perplexity.py --pages 10 --text wiki.test.raw --json perplexity.json

The harness runs its own task `wikitext` (its YAML file, detokeniser and aggregation) on a local file of the pages.
"""

import argparse
import contextlib
import io
import json
import logging
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from actsparse.errors import ActsparseError
from actsparse.evaluation.word_perplexity import word_perplexity
from actsparse.texts import load_pages

MEASURES = ("word_perplexity", "byte_perplexity", "bits_per_byte")
TOLERANCE = 1e-4
PACKAGES = ("torch", "transformers", "lm-eval", "nncf")
TASK = "wikitext_local"
Result = TypeVar("Result")


def measure_with_harness(model: Any, tokenizer: Any, pages: tuple[str, ...], max_length: int) -> dict[str, float]:
    """
    Run the harness's `wikitext` task, with the hub's dataset replaced by a local file.

    :param model: The model.
    :param tokenizer: Its tokenizer.
    :param pages: The pages to evaluate on.
    :param max_length: The window in tokens.
    :return: The harness's value of each measure.
    """
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Both are decorated in ways that hide their parameters from a type checker.
    make_model: Any = HFLM
    evaluate: Any = lm_eval.evaluator.simple_evaluate
    harness_model = make_model(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1)
    # It draws a progress bar for every single window.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        write_task(Path(folder), pages)
        tasks = TaskManager(include_path=folder, include_defaults=False)
        results = evaluate(harness_model, tasks=[TASK], task_manager=tasks, bootstrap_iters=0)
    return {measure: results["results"][TASK][f"{measure},none"] for measure in MEASURES}


def write_task(folder: Path, pages: tuple[str, ...]) -> None:
    """
    Write the harness's own `wikitext` task with another source of pages.

    :param folder: Where to write the task and its data.
    :param pages: The pages.
    """
    import lm_eval

    data = folder / "pages.jsonl"
    data.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
    task = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / "wikitext" / "wikitext.yaml"),
        "task": TASK,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
    }
    # JSON is YAML.
    (folder / f"{TASK}.yaml").write_text(json.dumps(task), encoding="utf-8")


def compare(model: Any, tokenizer: Any, source: str, num_pages: int | None, max_length: int | None) -> dict[str, Any]:
    """
    Measure with both and describe the run.

    :param model: The model.
    :param tokenizer: Its tokenizer.
    :param source: The text source.
    :param num_pages: How many of its pages; None takes all.
    :param max_length: The window in tokens; None takes the default.
    :return: Everything that the JSON file records.
    """
    text = load_pages(source, num_pages=num_pages)
    ours, our_seconds = timed(lambda: word_perplexity(model, tokenizer, text.pages, max_length=max_length))
    harness, seconds = timed(lambda: measure_with_harness(model, tokenizer, text.pages, ours.max_length))
    differences = {measure: getattr(ours, measure) / harness[measure] - 1 for measure in MEASURES}
    return {
        "text": text.name,
        "text_sha256": text.sha256,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "actsparse": asdict(ours) | {"seconds": round(our_seconds, 2)},
        "lm_eval": harness | {"seconds": round(seconds, 2)},
        "relative_difference": differences,
        "tolerance": TOLERANCE,
        "is_equal": all(abs(difference) <= TOLERANCE for difference in differences.values()),
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
    }


def timed(run: Callable[[], Result]) -> tuple[Result, float]:
    """
    Time a call.

    :param run: What to call.
    :return: What it returned, and the seconds it took.
    """
    started = time.perf_counter()
    return run(), time.perf_counter() - started


def make_table(report: dict[str, Any]) -> Table:
    """
    Lay both results out side by side.

    :param report: What `compare` returned.
    :return: The table.
    """
    ours, harness = report["actsparse"], report["lm_eval"]
    size = f"{ours['num_pages']} pages, {ours['num_words']} words, {ours['num_tokens']} tokens"
    table = Table(title=f"{report['text']}: {size}, windows of {ours['max_length']}")
    for heading in ("measure", "actsparse", f"lm-eval {report['versions']['lm-eval']}", "relative difference"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for measure in MEASURES:
        difference = f"{report['relative_difference'][measure]:+.1e}"
        table.add_row(measure.replace("_", " "), f"{ours[measure]:.6f}", f"{harness[measure]:.6f}", difference)
    table.add_row("token perplexity", f"{ours['token_perplexity']:.6f}", "", "")
    table.add_row("seconds", f"{ours['seconds']:.1f}", f"{harness['seconds']:.1f}", "")
    return table


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """
    Read the command line.

    :param arguments: The arguments; None takes those of the process.
    :return: The options.
    """
    parser = argparse.ArgumentParser(description="Hold our word perplexity against lm-evaluation-harness.")
    parser.add_argument("--pages", type=int, help="how many pages (default: all)")
    parser.add_argument("--max-length", type=int, help="window in tokens (default: 2048, or the model's limit)")
    parser.add_argument("--text", default="default", help="text source: default, wikitext or a file")
    parser.add_argument("--model", default="default", help="hub id, folder, GGUF file or default")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """
    Run the comparison.

    :param arguments: The command line; None takes that of the process.
    :return: The exit code: 0 if both agree, 1 if not, 2 for a mistake on the command line.
    """
    from actsparse.models import load_model

    options = parse_arguments(arguments)
    try:
        loaded = load_model(options.model, dtype=torch.float32)
        report = compare(loaded.model, loaded.tokenizer, options.text, options.pages, options.max_length)
    except ActsparseError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    report = {"command": shlex.join(["python", *sys.orig_argv[1:]]), "model": options.model} | report
    Console().print(make_table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if report["is_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
