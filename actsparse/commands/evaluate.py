"""`actsparse evaluate`: a model's word perplexity and, if it is masked, its sparsity."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from actsparse.backend import backend_of
from actsparse.commands.common import THRESHOLDS_NAME, compress, load_for_job, name_weights, validate_precision
from actsparse.console.report import Report, Row, sparsity_table
from actsparse.errors import ActsparseError, SourceError
from actsparse.evaluation.cost import Cost, evaluate_cost
from actsparse.models import LoadedModel, load_model
from actsparse.models.folder import is_openvino_folder
from actsparse.runtime.progress import Say
from actsparse.storage.files import kind_of
from actsparse.texts import load_pages
from actsparse.thresholds import load_thresholds, read_thresholds


@dataclass(frozen=True)
class EvaluateJob:
    """What `actsparse evaluate` is asked to do; see its help."""

    model: str
    text: str = "default"
    num_pages: int | None = None
    max_length: int | None = None
    thresholds: Path | None = None
    int8: str | None = None
    dtype: str = "fp32"
    tokenizer: str | None = None
    device: str = "cpu"
    max_memory: str | None = None

    def __post_init__(self) -> None:
        validate_precision(self.int8, self.dtype)


def run_evaluate(job: EvaluateJob, say: Say) -> tuple[dict[str, Any], list[Table]]:
    """
    Measure word perplexity and sparsity.

    :raises ActsparseError: If an input cannot be used.
    """
    text = load_pages(job.text, num_pages=job.num_pages)
    loaded, int8 = load_for_evaluation(job, say)
    say(f"evaluating on {text.name}")
    cost = evaluate_cost(loaded.model, loaded.tokenizer, text.pages, max_length=job.max_length)
    is_openvino = backend_of(loaded.model).name == "openvino"
    settings = {
        "model": job.model,
        "weights": "as the OpenVINO model has them" if is_openvino else name_weights(int8, job.dtype),
        "evaluation text": f"{text.name}: {cost.perplexity.num_words} words, {cost.perplexity.num_tokens} tokens, "
        f"windows of {cost.perplexity.max_length}",
    }
    if cost.sparsity is not None:
        settings["tokens masked"] = cost.sparsity.tokens
    report = Report("Word perplexity", (Row(_row_name(loaded.model, cost), cost),), settings)
    tables = [report.to_table()]
    if cost.sparsity is not None:
        tables.append(sparsity_table(cost.sparsity, "Sparsity on the evaluation text"))
    return report.to_dict(), tables


def load_for_evaluation(job: EvaluateJob, say: Say) -> tuple[LoadedModel, str | None]:
    """
    Load a model with the masks of a thresholds file, or of the folder that it is in.

    :return: The model, and how its weights are compressed to INT8.
    :raises ActsparseError: If one of them cannot be used.
    """
    name, thresholds, int8 = job.model, job.thresholds, job.int8
    if is_openvino_folder(Path(name)):
        return _load_openvino(job, say), None
    folder_file = Path(name) / THRESHOLDS_NAME
    if thresholds is None and kind_of(folder_file) == "file":
        thresholds = folder_file
        notes = read_thresholds(thresholds).notes
        int8 = int8 or notes.get("int8")
        if kind_of(Path(name) / "config.json") != "file":
            name = notes.get("source")
            if not isinstance(name, str):
                msg = f"{folder_file} does not say which model it belongs to; give the model and --thresholds"
                raise SourceError(msg)
        validate_precision(int8, job.dtype)
    elif thresholds is not None:
        read_thresholds(thresholds)
    say(f"loading {name}")
    loaded = load_for_job(name, job)
    example = loaded.tokenizer("An example input.", return_tensors="pt")
    model = compress(loaded.model, int8, {"input_ids": example["input_ids"]}, say)
    if thresholds is not None:
        load_thresholds(model, thresholds)
    return LoadedModel(model, loaded.tokenizer, name), int8


def _load_openvino(job: EvaluateJob, say: Say) -> LoadedModel:
    if job.thresholds is not None or job.int8 is not None:
        msg = (
            f"{job.model} holds an OpenVINO model, whose weights and masks are fixed: leave --thresholds and --int8 out"
        )
        raise ActsparseError(msg)
    say(f"loading {job.model}")
    return load_model(job.model, tokenizer=job.tokenizer)


def _row_name(model: Any, cost: Cost) -> str:
    if cost.sparsity is not None:
        return "sparse"
    if backend_of(model).name == "torch":
        return "dense"
    from actsparse.openvino.acceleration import is_accelerated

    return "accelerated" if is_accelerated(model.model) else "dense"
