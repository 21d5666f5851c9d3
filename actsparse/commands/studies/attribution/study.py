"""The measurements of an attribution study: what is there is read, the rest is generated."""

import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from actsparse.algorithms import MeasurementCache
from actsparse.commands.common import DTYPES, point_key, read_batches
from actsparse.commands.studies.attribution.curves import Curves, require_sacrebleu
from actsparse.commands.studies.attribution.decoding import Decoding
from actsparse.commands.studies.attribution.job import AttributionJob, Line
from actsparse.commands.studies.attribution.masks import STATIC, Masks, calibrate_static, oracle_masks, static_masks
from actsparse.commands.studies.attribution.metrics import INTEGRATED
from actsparse.commands.studies.attribution.prompts import encode_questions
from actsparse.commands.studies.attribution.recording import Advance, Recording, record
from actsparse.commands.studies.attribution.replay import replay
from actsparse.commands.studies.units import UnitLayer, find_units
from actsparse.console.report import read_json, write_json
from actsparse.models import load_model
from actsparse.models.identity import model_identity
from actsparse.runtime.environment import describe_environment
from actsparse.runtime.progress import Say, progress_bar
from actsparse.storage.files import prepare_folder
from actsparse.texts import Text, load_pages
from actsparse.texts.questions import load_questions
from actsparse.torch.measurements.probe import without_parameter_gradients
from actsparse.torch.running import evaluation_mode

Thresholds = dict[str, torch.Tensor]
# What was measured of some questions: a row for each ratio, and with what.
Figures = dict[str, Any]
# The ratios still to be measured of each curve.
ToDo = dict[Line, list[float]]


def run_attribution(job: AttributionJob, say: Say) -> Curves:
    """
    Measure what has not been measured before.

    :return: The curves; also written to the folder as attribution.json, .csv, .png and .pdf.
    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    require_sacrebleu()
    questions = load_questions(job.questions, number=job.number)
    for folder in (job.out, job.out / "points", job.out / "thresholds"):
        prepare_folder(folder)
    start = time.perf_counter()
    chunks = [questions[i : i + job.batch] for i in range(0, len(questions), job.batch)]
    points = Study(job, say).measure(chunks)
    curves = Curves.of(points, job.ratios, _describe(job, questions))
    curves.write(job.out)
    say(f"{len(questions)} questions in {time.perf_counter() - start:.0f} s")
    return curves


class Study:
    """A job with its model, which is loaded when it is first needed."""

    def __init__(self, job: AttributionJob, say: Say) -> None:
        self._job = job
        self._say = say
        self._cache = MeasurementCache()

    @cached_property
    def _loaded(self) -> Any:
        self._say(f"loading {self._job.model}")
        loaded = load_model(self._job.model, dtype=DTYPES[self._job.dtype], torch_only=True)
        loaded.model.to(self._job.device)  # type: ignore[arg-type]
        return loaded

    @cached_property
    def _layers(self) -> dict[str, UnitLayer]:
        return find_units(
            self._loaded.model, {"input_ids": torch.ones(1, 4, dtype=torch.long, device=self._job.device)}
        )

    @cached_property
    def _text(self) -> Text:
        return load_pages(self._job.calibration, purpose="calibration")

    @cached_property
    def _identity(self) -> Any:
        return model_identity(self._job.model)

    def _key(self, line: Line, *rest: Any) -> str:
        text = self._text.sha256 if line.mode == STATIC else None
        return point_key(self._identity, self._job.settings(line), text, *rest)

    @cached_property
    def _batches(self) -> list[Any]:
        return read_batches(self._loaded, self._text, self._job.num_batches)

    def path(self, questions: Sequence[str], line: Line) -> Path:
        """Name the file of a curve's figures for some questions."""
        return self._job.out / "points" / f"{line}-{self._key(line, list(questions))}.json"

    def measure(self, chunks: Sequence[Sequence[str]]) -> dict[Line, list[Figures]]:
        """Measure what has not been measured before, each curve written as soon as it is known."""
        missing = [(chunk, todo) for chunk in chunks if (todo := self._find_missing(chunk))]
        if missing:
            self._measure(missing)
        else:
            self._say("everything has been measured before")
        return {line: [read_figures(self.path(chunk, line)) for chunk in chunks] for line in self._job.lines}

    def _find_missing(self, questions: Sequence[str]) -> ToDo:
        todo = {}
        for line in self._job.lines:
            there = {row["ratio"] for row in read_figures(self.path(questions, line))["rows"]}
            ratios = [ratio for ratio in self._job.ratios if ratio not in there]
            if ratios:
                todo[line] = ratios
        return todo

    def _measure(self, missing: Sequence[tuple[Sequence[str], ToDo]]) -> None:
        job, layers = self._job, self._layers
        wanted = {(line, ratio) for _, todo in missing for line in todo for ratio in todo[line] if line.mode == STATIC}
        thresholds = {(line, ratio): self._calibrate(line, ratio) for line, ratio in sorted(wanted)}
        self._say(f"asking {job.model} {sum(len(questions) for questions, _ in missing)} questions")
        bar = progress_bar("attribution", total=sum(self._count_steps(todo) for _, todo in missing), unit="steps")
        with bar as advance, evaluation_mode(self._loaded.model), without_parameter_gradients(self._loaded.model):
            for questions, todo in missing:
                prompts = encode_questions(self._loaded.tokenizer, questions, job.prompt)
                decoding = Decoding.begin(self._loaded.model, list(layers), prompts)
                ig_steps = job.ig_steps if any(line.metric == INTEGRATED for line in todo) else None
                recording = record(decoding, ends=self._ends, most=job.max_tokens, ig_steps=ig_steps, advance=advance)
                # Texts that ended early took fewer steps than were counted.
                advance(self._count_steps(todo) // job.max_tokens * (job.max_tokens - len(recording.labels)))
                dense = {
                    "references": self._decode(recording.labels, recording),
                    "tokens": recording.is_label.sum(0).tolist(),
                }
                for line, ratios in todo.items():
                    rows = read_figures(self.path(questions, line))["rows"]
                    for ratio in ratios:
                        masks = self._mask(recording, line, ratio, thresholds.get((line, ratio), {}))
                        rows.append({"ratio": ratio, **dense, **self._replay(decoding, recording, masks, advance)})
                    environment = describe_environment() | {"device": job.device}
                    write_json(self.path(questions, line), {"rows": rows, "environment": environment})

    def _count_steps(self, todo: ToDo) -> int:
        recorded = 1 + (len(self._layers) if any(line.metric == INTEGRATED for line in todo) else 0)
        return self._job.max_tokens * (recorded + sum(map(len, todo.values())))

    def _mask(self, recording: Recording, line: Line, ratio: float, thresholds: Thresholds) -> Masks:
        if line.mode == STATIC:
            return static_masks(thresholds)
        return oracle_masks(recording, self._layers, line.metric, line.where, ratio)

    def _replay(self, decoding: Decoding, recording: Recording, masks: Masks, advance: Advance) -> dict[str, Any]:
        found = replay(decoding, recording, self._layers, masks, advance)
        return {
            "sparsity": found.sparsity,
            "answers": self._decode(found.tokens, recording),
            "divergence": found.divergence.tolist(),
            "agreement": found.agreement.tolist(),
        }

    def _calibrate(self, line: Line, ratio: float) -> Thresholds:
        if ratio == 0:
            return {}
        name = f"{line.metric}-{line.where}-{ratio:g}-{self._key(line)}.safetensors"
        path = self._job.out / "thresholds" / name
        if not path.is_file():
            self._say(f"calibrating {line.metric} at {ratio:g}")
        return calibrate_static(self._loaded.model, self._batches, line.metric, line.where, ratio, self._cache, path)

    @cached_property
    def _ends(self) -> list[int]:
        ends = getattr(self._loaded.model.generation_config, "eos_token_id", None)
        ends = self._loaded.tokenizer.eos_token_id if ends is None else ends
        return [ends] if isinstance(ends, int) else list(ends or [])

    def _decode(self, tokens: torch.Tensor, recording: Recording) -> list[str]:
        """Cut each text where it ends, or where the dense model's does, whichever comes first."""
        texts = []
        for column, is_label in zip(tokens.T.tolist(), recording.is_label.T.tolist(), strict=True):
            ids = column[: sum(is_label)]
            end = next((i for i, token in enumerate(ids) if token in self._ends), len(ids))
            texts.append(self._loaded.tokenizer.decode(ids[:end], skip_special_tokens=True).strip())
        return texts


def read_figures(path: Path) -> Figures:
    """Read what was measured before."""
    nothing: Figures = {"rows": [], "environment": {}}
    found = read_json(path)
    try:
        is_whole = all(isinstance(row["ratio"], float | int) and row["answers"] for row in found["rows"])
    except (KeyError, TypeError):
        return nothing
    return nothing | found if is_whole else nothing


def _describe(job: AttributionJob, questions: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for line in job.lines:
        settings |= job.settings(line)
    return {
        **settings,
        "questions": f"{len(questions)} of {Path(job.questions).name}",
        "ratio": "the share of heads and neurons switched off in every layer",
    }
