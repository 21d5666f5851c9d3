"""The main job on the embedded default: what sparsity costs alone, with INT8 and uniform, and how fast it decodes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from actsparse.commands.bench.decoding import DecodingReport, compare_decoding
from actsparse.commands.common import THRESHOLDS_NAME, read_batches, write_report
from actsparse.console.report import Report, Row
from actsparse.errors import ActsparseError
from actsparse.evaluation.cost import Cost, evaluate_cost
from actsparse.models import load_model
from actsparse.runtime.distributed import count_processes
from actsparse.runtime.progress import Say
from actsparse.scopes.target_scope import TargetScope
from actsparse.sparsify import sparsify_activations
from actsparse.storage.files import prepare_folder
from actsparse.texts import Text, describe_batches, load_pages
from actsparse.thresholds import save_thresholds
from actsparse.torch.compression import compress_int8

# The setting of NNCF's documentation, by role instead of by name.
FFN_TARGETS = {TargetScope(roles=("ffn.up", "ffn.gate")): 0.3, TargetScope(roles=("ffn.down",)): 0.5}
FFN_NAME = "up/gate 30% + down 50%"
UNIFORM_TARGET = 0.4
ACCELERATED_TARGET = 0.5


@dataclass(frozen=True)
class Demo:
    """
    What the demo found.

    :param decoding: How fast it decodes with OpenVINO; or why that was not timed.
    """

    report: Report
    decoding: DecodingReport | str

    @property
    def results(self) -> tuple[Any, Any]:
        """A table of the costs; another one of the decoding, or a line that says why there is none."""
        if isinstance(self.decoding, str):
            return self.report.to_table(), f"decoding was not timed: {self.decoding}"
        return self.report.to_table(), self.decoding.to_table()

    def to_dict(self) -> dict[str, Any]:
        """Turn both into what JSON can hold."""
        decoding = {"reason": self.decoding} if isinstance(self.decoding, str) else self.decoding.to_dict()
        return {**self.report.to_dict(), "decoding": decoding}

    def to_markdown(self) -> str:
        """Write what stands below the report's own Markdown."""
        if isinstance(self.decoding, str):
            return f"Decoding was not timed: {self.decoding}.\n"
        return f"How fast it decodes on this machine:\n\n{self.decoding.to_markdown()}"


@dataclass(frozen=True)
class DemoJob:
    """What `actsparse demo` is asked to do; see its help."""

    out: Path
    model: str = "default"
    text: str = "default"
    calibration: str = "default"
    num_pages: int | None = None
    max_length: int | None = None
    num_batches: int = 32
    fast: bool = False

    def load_texts(self) -> tuple[Text, Text]:
        """Load the evaluation text, a few pages where it is the default or has to be fast, and the calibration text."""
        pages = self.num_pages
        if pages is None and (self.fast or self.text == "default"):
            pages = 4 if self.fast else 16
        return load_pages(self.text, num_pages=pages), load_pages(self.calibration, purpose="calibration")


def run_demo(job: DemoJob, say: Say) -> Demo:
    """
    Sparsify a model four ways, measure each, time its decoding where there is a compiler, and write the report.

    :param job: What to do; its folder gets report.json, report.md, thresholds.safetensors and sparsity_by_layer.png.
    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    prepare_folder(job.out)
    text, calibration = job.load_texts()
    say(f"loading the {job.model} model")
    loaded = load_model(job.model, torch_only=True)
    model, tokenizer = loaded.model, loaded.tokenizer
    batches = read_batches(loaded, calibration, 8 if job.fast else job.num_batches)

    def measure(name: str) -> Cost:
        say(f"evaluating {name}")
        return evaluate_cost(model, tokenizer, text.pages, max_length=job.max_length)

    rows = [Row("fp32", measure("fp32"))]
    for name, targets in (
        (f"sparse, uniform {UNIFORM_TARGET:.0%}", UNIFORM_TARGET),
        (f"sparse, {FFN_NAME}", FFN_TARGETS),
    ):
        say(f"calibrating {name}")
        seconds = _sparsify(model, batches, targets)
        rows.append(Row(name, measure(name), seconds))
    save_thresholds(model, job.out / THRESHOLDS_NAME, calibration=calibration.name, source=job.model)
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
            "model": job.model,
            "evaluation text": f"{text.name}: {perplexity.num_pages} pages, {perplexity.num_words} words, "
            f"{perplexity.num_tokens} tokens, windows of {perplexity.max_length}",
            "calibration text": f"{calibration.name}: {describe_batches(loaded.tokenizer, batches)}",
            "algorithm": "magnitude",
            "tokens masked": "all",
        },
    )
    # What has been measured is not lost where the timing is cut short.
    write_report(report, job.out, report.to_dict())
    found = Demo(report, _time_decoding(job.model, job.out / THRESHOLDS_NAME, text, calibration, say))
    write_report(report, job.out, found.to_dict(), found.to_markdown())
    return found


def _time_decoding(model: str, thresholds: Path, text: Text, calibration: Text, say: Say) -> DecodingReport | str:
    if count_processes() > 1:
        return "one process does that, without a launcher"
    targets = {
        f"{FFN_NAME}, accelerated": thresholds,
        f"uniform {ACCELERATED_TARGET:.0%}, accelerated": ACCELERATED_TARGET,
    }
    try:
        return compare_decoding(model, targets, text, calibration, say)
    except ActsparseError as error:
        return str(error)


def _sparsify(model: nn.Module, batches: list[Any], targets: Mapping[TargetScope, float] | float) -> float:
    start = time.perf_counter()
    sparsify_activations(model, batches, targets)
    return time.perf_counter() - start
