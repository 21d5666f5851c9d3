"""The main job on the embedded default: dense, sparse, INT8 and sparse, uniform; what each one costs."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actsparse.compression import compress_int8
from actsparse.evaluation.cost import Cost, evaluate_cost
from actsparse.files import prepare_folder, write_bytes
from actsparse.models import load_model
from actsparse.plot import plot_sparsity_by_layer
from actsparse.report import Report, Row, write_json
from actsparse.scopes.target_scope import TargetScope
from actsparse.sparsify import sparsify_activations
from actsparse.texts import describe_batches, load_pages, token_batches
from actsparse.thresholds import save_thresholds

# The setting of NNCF's documentation, by role instead of by name.
FFN_TARGETS = {TargetScope(roles=("ffn.up", "ffn.gate")): 0.3, TargetScope(roles=("ffn.down",)): 0.5}
FFN_NAME = "up/gate 30% + down 50%"
UNIFORM_TARGET = 0.4
CALIBRATION_BATCHES, CALIBRATION_LENGTH = 32, 256


def run_demo(
    out: Path,
    *,
    model_name: str = "default",
    text_name: str = "default",
    calibration_name: str = "default",
    num_pages: int | None = None,
    max_length: int | None = None,
    num_batches: int = CALIBRATION_BATCHES,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """
    Sparsify a model four ways, measure each, and write the report.

    :param out: Folder for report.json, report.md, thresholds.safetensors and sparsity_by_layer.png.
    :param model_name: The model, as for `load_model`.
    :param text_name: The evaluation text, as for `load_pages`.
    :param calibration_name: The calibration text.
    :param num_pages: How many pages to evaluate on; None takes all.
    :param max_length: The evaluation window in tokens; None takes 2048 or the model's own limit.
    :param num_batches: Calibration batches of 256 tokens.
    :param say: Told what happens next.
    :return: The report.
    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    prepare_folder(out)
    text = load_pages(text_name, num_pages=num_pages)
    calibration = load_pages(calibration_name, purpose="calibration")
    say(f"loading the {model_name} model")
    loaded = load_model(model_name, dtype=torch.float32)
    model, tokenizer = loaded.model, loaded.tokenizer
    batches = token_batches(tokenizer, calibration, num_batches=num_batches, length=CALIBRATION_LENGTH)

    def measure(name: str) -> Cost:
        say(f"evaluating {name}")
        return evaluate_cost(model, tokenizer, text.pages, max_length=max_length)

    rows = [Row("fp32", measure("fp32"))]
    for name, targets in (
        (f"sparse, uniform {UNIFORM_TARGET:.0%}", UNIFORM_TARGET),
        (f"sparse, {FFN_NAME}", FFN_TARGETS),
    ):
        say(f"calibrating {name}")
        seconds = _sparsify(model, batches, targets)
        rows.append(Row(name, measure(name), seconds))
    save_thresholds(model, out / "thresholds.safetensors", calibration=calibration.name, source=model_name)
    say("compressing the weights to INT8_ASYM")
    # The masks stay; the weights below them change, so this is the last row to be measured.
    model = compress_int8(model, "asym", batches[0])
    name = f"INT8_ASYM + sparse, {FFN_NAME}"
    rows.append(Row(name, measure(name)))
    rows = [rows[0], rows[2], rows[3], rows[1]]

    perplexity = rows[0].cost.perplexity
    report = Report(
        "What activation sparsity costs",
        tuple(rows),
        {
            "model": model_name,
            "evaluation text": f"{text.name}: {perplexity.num_pages} pages, {perplexity.num_words} words, "
            f"{perplexity.num_tokens} tokens, windows of {perplexity.max_length}",
            "calibration text": f"{calibration.name}: {describe_batches(loaded.tokenizer, batches)}",
            "algorithm": "magnitude",
            "tokens masked": "all",
        },
    )
    write_report(report, out, report.to_dict())
    return report


def write_report(report: Report, out: Path, contents: dict[str, Any]) -> None:
    """
    Write a report's JSON, Markdown and plot.

    :param report: The report.
    :param out: An existing folder.
    :param contents: What the JSON shall hold: the report's own figures, with more where there is more.
    :raises OutputError: If one of the files cannot be written.
    """
    write_json(out / "report.json", contents)
    write_bytes(out / "report.md", report.to_markdown().encode())
    reports = {row.name: row.cost.sparsity for row in report.rows if row.cost.sparsity is not None}
    plot_sparsity_by_layer(reports, out / "sparsity_by_layer.png")


def _sparsify(model: nn.Module, batches: list[Any], targets: Mapping[TargetScope, float] | float) -> float:
    start = time.perf_counter()
    sparsify_activations(model, batches, targets)
    return time.perf_counter() - start
