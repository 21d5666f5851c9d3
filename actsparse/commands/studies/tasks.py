"""Downstream tasks of lm-evaluation-harness, on a masked model and on the same model without its masks."""

import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from actsparse.backend import backend_of
from actsparse.commands.common import name_weights
from actsparse.commands.evaluate import EvaluateJob, load_for_evaluation
from actsparse.console.report import make_caption, percent
from actsparse.errors import ActsparseError, nearest, shorten_message
from actsparse.evaluation.sparsity import count_zeros
from actsparse.runtime.environment import describe_environment
from actsparse.runtime.progress import Say, shows_progress
from actsparse.sparsity_report import SparsityReport
from actsparse.storage.files import kind_of
from actsparse.torch.insertion import named_sparsifiers, suspend_sparsifiers

# The tasks of two papers' tables, by the harness's names; the data comes from the hub.
GROUPS = {
    # Sparsing Law (arXiv 2411.02335): commonsense and reading by likelihood, the rest by generation.
    "sparsing-law-choice": ("piqa", "social_iqa", "hellaswag", "winogrande", "copa", "boolq", "agieval"),
    "sparsing-law-generation": ("humaneval", "mbpp", "lambada_openai", "tydiqa_goldp", "gsm8k", "mmlu", "bbh"),
    # Achieving Sparse Activation in Small Language Models (arXiv 2406.06562) asks TruthfulQA's questions.
    "truthfulqa-choice": ("truthfulqa_mc1", "truthfulqa_mc2"),
}


@dataclass(frozen=True)
class TasksJob:
    """What `actsparse tasks` is asked to do; see its help."""

    model: str
    tasks: tuple[str, ...]
    include: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    batch: int = 8
    thresholds: Path | None = None
    int8: str | None = None
    dtype: str = "fp32"
    uses_chat_template: bool = False
    runs_generated_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks:
            msg = f"--tasks needs the name of a task, or of a group: {', '.join(GROUPS)}"
            raise ActsparseError(msg)
        if self.limit is not None and not 0 < self.limit < math.inf:
            msg = f"--limit is {self.limit}; it is a number of examples, or a share of them below 1"
            raise ActsparseError(msg)
        if self.batch < 1 or (self.num_fewshot is not None and self.num_fewshot < 0):
            msg = "--batch must be at least 1, and --fewshot at least 0"
            raise ActsparseError(msg)
        if self.include is not None and kind_of(self.include) != "folder":
            msg = f"--include {self.include} is no folder of task files"
            raise ActsparseError(msg)

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks, groups spelt out."""
        return tuple(dict.fromkeys(name for task in self.tasks for name in GROUPS.get(task, (task,))))


@dataclass(frozen=True)
class TaskScore:
    """
    One metric of one task.

    :param standard_error: Of the difference, example by example; None for a metric that is no mean over examples.
    """

    task: str
    metric: str
    examples: int
    dense: float
    sparse: float
    standard_error: float | None

    @property
    def difference(self) -> float:
        """Sparse less dense."""
        return self.sparse - self.dense


@dataclass(frozen=True)
class TaskReport:
    """The scores of all tasks."""

    scores: tuple[TaskScore, ...]
    sparsity: SparsityReport
    settings: dict[str, Any]

    def to_table(self) -> Table:
        """Draw the report for a terminal."""
        caption = make_caption(self.settings)
        caption += f"\nsparsity on these texts: {percent(self.sparsity.sparsity)}"
        table = Table(title="Tasks, dense and sparse", caption=caption, caption_justify="left")
        for column in ("task", "metric", "examples", "dense", "sparse", "difference", "± (standard error)"):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        for score in self.scores:
            error = "–" if score.standard_error is None else f"{score.standard_error:.4f}"
            cells = (f"{score.dense:.4f}", f"{score.sparse:.4f}", f"{score.difference:+.4f}", error)
            table.add_row(score.task, score.metric, str(score.examples), *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Turn the report into what JSON can hold."""
        scores = [{**asdict(score), "difference": score.difference} for score in self.scores]
        return {
            "settings": self.settings,
            "scores": scores,
            "sparsity": self.sparsity.to_dict(),
            "environment": describe_environment(),
        }


def run_tasks(job: TasksJob, say: Say) -> TaskReport:
    """
    Run the harness twice.

    :raises ActsparseError: If the harness is not installed or does not know a task, a task's data cannot be had, or the
        model has no masks.
    """
    evaluate, make_model, manager = _load_harness(job.include)
    _require_known(job.names, manager)
    thresholds = {"thresholds": job.thresholds, "int8": job.int8, "dtype": job.dtype}
    loaded, int8 = load_for_evaluation(EvaluateJob(job.model, **thresholds), say)
    model: Any = loaded.model
    if backend_of(model).name == "openvino":
        msg = f"{job.model} holds an OpenVINO model, whose masks cannot be switched off: give that of the torch model"
        raise ActsparseError(msg)
    sparsifiers = [sparsifier for _, sparsifier in named_sparsifiers(model)]
    if not sparsifiers:
        msg = f"{job.model} has no masks: give a folder that sparsify wrote, or --thresholds FILE"
        raise ActsparseError(msg)
    options = {
        "tasks": list(job.names),
        "num_fewshot": job.num_fewshot,
        "limit": job.limit,
        "apply_chat_template": job.uses_chat_template,
        "confirm_run_unsafe_code": job.runs_generated_code,
        "task_manager": manager,
        "log_samples": True,
        "bootstrap_iters": 0,
    }

    def run() -> Mapping[str, Any]:
        # Its progress bars are for terminals.
        with _without_git(), nullcontext() if shows_progress() else redirect_stderr(io.StringIO()):
            harness_model = make_model(pretrained=model, tokenizer=loaded.tokenizer, batch_size=job.batch, device="cpu")
            return evaluate(model=harness_model, **options)

    try:
        say("running the tasks dense")
        with suspend_sparsifiers(sparsifiers):
            dense = run()
        say("running the tasks sparse")
        with count_zeros(model) as counter:
            sparse = run()
    except Exception as error:
        # The harness and the tasks' own code raise whatever they like: a dataset that cannot be had, above all.
        msg = f"the harness failed on {', '.join(job.names)}: {shorten_message(error)}"
        raise ActsparseError(msg) from error
    settings = {
        "model": job.model,
        "weights": name_weights(int8, job.dtype),
        "examples": "all" if job.limit is None else f"--limit {job.limit:g}",
        "few-shot examples": "each task's own" if job.num_fewshot is None else job.num_fewshot,
    }
    return TaskReport(tuple(compare_results(dense, sparse)), counter.report(), settings)


def compare_results(dense: Mapping[str, Any], sparse: Mapping[str, Any]) -> Iterable[TaskScore]:
    """Pair what the harness says of two models."""
    for task, figures in dense["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            other = sparse["results"].get(task, {}).get(key)
            if metric.endswith("_stderr") or not _is_number(value) or not _is_number(other) or not kind:
                continue
            before, after = (_by_example(side, task, metric, kind) for side in (dense, sparse))
            error = None
            if len(before) == len(after) > 1:
                difference = np.array([after[i] - before[i] for i in before if i in after])
                error = float(difference.std(ddof=1) / math.sqrt(len(difference)))
            name = metric if kind == "none" else f"{metric} ({kind})"
            examples = len(before) or int(figures.get("sample_len", 0))
            yield TaskScore(task, name, examples, float(value), float(other), error)


def _by_example(results: Mapping[str, Any], task: str, metric: str, kind: str) -> dict[Any, float]:
    samples = [s for s in results.get("samples", {}).get(task, []) if s.get("filter", "none") == kind]
    return {s["doc_id"]: float(s[metric]) for s in samples if _is_number(s.get(metric))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _load_harness(include: Path | None) -> tuple[Any, Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        msg = "tasks need lm-evaluation-harness, which is not installed: pip install 'actsparse[eval]'"
        raise ActsparseError(msg) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        manager = _find_tasks(include)
    except Exception as error:  # what is wrong with a task file is told in many ways
        msg = f"the task files in {include} cannot be read: {shorten_message(error)}"
        raise ActsparseError(msg) from None
    return lm_eval.simple_evaluate, HFLM, manager


@cache
def _find_tasks(include: Path | None) -> Any:
    """Read thousands of task files, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include) if include else None)


@contextmanager
def _without_git() -> Iterator[None]:
    """Keep the harness from asking git for a commit, which complains where a user's folder is no repository."""
    from lm_eval import evaluator

    ask = evaluator.get_git_commit_hash
    try:
        evaluator.get_git_commit_hash = lambda: None
        yield
    finally:
        evaluator.get_git_commit_hash = ask


def _require_known(names: Iterable[str], manager: Any) -> None:
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            msg = f"the harness knows no task {name!r}; nearest: {nearest(name, [*GROUPS, *sorted(known)])}"
            raise ActsparseError(msg)
