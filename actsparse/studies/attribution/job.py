"""The job behind `actsparse attribution`."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actsparse.algorithms import Known
from actsparse.calibration import evaluation_mode
from actsparse.demo import CALIBRATION_LENGTH
from actsparse.environment import describe_environment
from actsparse.errors import ActsparseError, nearest, shorten_message
from actsparse.files import prepare_folder
from actsparse.jobs import DTYPES, validate_precision
from actsparse.measurements.probe import without_parameter_gradients
from actsparse.models import load_model
from actsparse.progress import progress_bar
from actsparse.report import write_json
from actsparse.studies.attribution.curves import Curves, require_sacrebleu
from actsparse.studies.attribution.decoding import Decoding
from actsparse.studies.attribution.masks import (
    ORACLE,
    STATIC,
    WHERE,
    calibrate_static,
    has_form,
    oracle_masks,
    static_masks,
)
from actsparse.studies.attribution.metrics import INTEGRATED, METRICS
from actsparse.studies.attribution.prompts import encode_questions
from actsparse.studies.attribution.recording import Advance, Recording, record
from actsparse.studies.attribution.replay import replay
from actsparse.studies.units import UnitLayer, find_units
from actsparse.texts import Text, load_pages, token_batches
from actsparse.texts.questions import load_questions

Say = Callable[[str], None]
Thresholds = dict[str, torch.Tensor]


class Line(NamedTuple):
    """One curve: a metric in a mode, on some kinds of units."""

    mode: str
    metric: str
    where: str

    def __str__(self) -> str:
        return "-".join(self)


@dataclass(frozen=True)
class AttributionJob:
    """What `actsparse attribution` is asked to do; see its help."""

    model: str
    out: Path
    questions: str
    metrics: tuple[str, ...] = tuple(METRICS)
    ratios: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    where: str = "both"
    modes: tuple[str, ...] = (ORACLE,)
    number: int | None = None
    ig_steps: int = 20
    max_tokens: int = 32
    batch: int = 8
    prompt: str | None = None
    calibration: str = "default"
    num_batches: int = 8
    dtype: str = "fp32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        validate_precision(None, self.dtype)
        _require_device(self.device)
        for option, chosen, known in (
            ("--metrics", self.metrics, tuple(METRICS)),
            ("--mode", self.modes, (ORACLE, STATIC)),
            ("--where", (self.where,), tuple(WHERE)),
        ):
            wrong = next((name for name in chosen if name not in known), None)
            if wrong is not None or not chosen:
                msg = f"{option} takes {', '.join(known)}, not {wrong!r}; nearest: {nearest(str(wrong), known, 1)}"
                raise ActsparseError(msg)
        if not self.lines:
            msg = (
                f"{', '.join(self.metrics)} has no static form: that would take a backward pass for each step and layer"
            )
            raise ActsparseError(msg)
        if not self.ratios or not all(0 <= ratio < 1 for ratio in self.ratios):
            msg = f"--ratios takes shares of at least 0 and less than 1, not {', '.join(map(str, self.ratios))}"
            raise ActsparseError(msg)
        for option, value in (
            ("--ig-steps", self.ig_steps),
            ("--max-tokens", self.max_tokens),
            ("--batch", self.batch),
        ):
            if value < 1:
                msg = f"{option} is {value}; it must be at least 1"
                raise ActsparseError(msg)
        if self.prompt is not None and "{question}" not in self.prompt:
            msg = f"--prompt must say where the question goes, such as 'Q: {{question}} A:', not {self.prompt!r}"
            raise ActsparseError(msg)

    @property
    def lines(self) -> list[Line]:
        """Every curve asked for; a metric without a static form has none in that mode."""
        pairs = product(self.modes, self.metrics)
        return [Line(mode, metric, self.where) for mode, metric in pairs if has_form(mode, metric)]

    def settings(self, line: Line) -> dict[str, Any]:
        """
        Say how a curve is measured.

        :param line: The curve.
        :return: All that its figures depend on, but the questions and the ratios.
        """
        settings = {
            "model": self.model,
            "weights": self.dtype,
            "generated": f"greedy, up to {self.max_tokens} tokens, all of them masked; the prompt is not",
            "prompt": self.prompt or "the tokenizer's chat template, else 'Question: … Answer:'",
        }
        if line.mode == STATIC:
            settings["calibration text"] = f"{self.calibration}: {self.num_batches} x {CALIBRATION_LENGTH} tokens"
        if line.metric == INTEGRATED:
            settings["steps of integration"] = str(self.ig_steps)
        return settings


def parse_ratios(text: str) -> tuple[float, ...]:
    """
    Read ratios.

    :param text: FIRST:LAST:STEP, both ends included, or numbers between commas.
    :return: The ratios.
    :raises ActsparseError: If it is neither.
    """
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(",") if part.strip())
        first, last, step = map(float, text.split(":"))
        count = int((last - first) / step + 1e-9) + 1
        if not (0 < count <= 1000 and step > 0):
            raise ValueError
        return tuple(round(first + i * step, 9) for i in range(count))
    except (ValueError, ZeroDivisionError, OverflowError):
        msg = f"--ratios takes FIRST:LAST:STEP such as 0:0.9:0.1, or numbers between commas, not {text!r}"
        raise ActsparseError(msg) from None


def run_attribution(job: AttributionJob, say: Say) -> Curves:
    """
    Measure what has not been measured before.

    :param job: What to do.
    :param say: Told what happens next.
    :return: The curves; also written to the folder as attribution.json, .csv, .png and .pdf.
    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    require_sacrebleu()
    questions = load_questions(job.questions, number=job.number)
    for folder in (job.out, job.out / "points", job.out / "thresholds"):
        prepare_folder(folder)
    study = _Study(job, say)
    start = time.perf_counter()
    chunks = [questions[i : i + job.batch] for i in range(0, len(questions), job.batch)]
    missing = [(number, line) for number in range(len(chunks)) for line in job.lines
               if _read(study.path(chunks[number], line), job.ratios) is None]  # fmt: skip
    if missing:
        study.measure(chunks, missing)
    else:
        say("everything has been measured before")
    points = {
        line: [_read(study.path(chunk, line), job.ratios) or {} for chunk in chunks] for line in job.lines
    }  # fmt: skip
    curves = Curves.of({tuple(line): rows for line, rows in points.items()}, job.ratios, _describe(job, questions))
    curves.write(job.out)
    say(f"{len(questions)} questions in {time.perf_counter() - start:.0f} s")
    return curves


class _Study:
    """
    A job with its model, which is loaded when it is first needed.

    :param job: The job.
    :param say: Told what happens next.
    """

    def __init__(self, job: AttributionJob, say: Say) -> None:
        self._job = job
        self._say = say
        self._known = Known()

    @cached_property
    def _loaded(self) -> Any:
        self._say(f"loading {self._job.model}")
        loaded = load_model(self._job.model, dtype=DTYPES[self._job.dtype])
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

    def _settings(self, line: Line) -> dict[str, Any]:
        settings = self._job.settings(line)
        return settings | {"calibrated on": self._text.sha256} if line.mode == STATIC else settings

    @cached_property
    def _batches(self) -> list[Any]:
        number = self._job.num_batches
        batches = token_batches(self._loaded.tokenizer, self._text, num_batches=number, length=CALIBRATION_LENGTH)
        return [{name: tensor.to(self._job.device) for name, tensor in batch.items()} for batch in batches]

    def path(self, questions: Sequence[str], line: Line) -> Path:
        """
        Name the file of a curve's figures for some questions.

        :param questions: The questions.
        :param line: The curve.
        :return: The file.
        """
        described = json.dumps([self._settings(line), list(questions)], sort_keys=True)
        return self._job.out / "points" / f"{line}-{hashlib.sha256(described.encode()).hexdigest()[:12]}.json"

    def measure(self, chunks: Sequence[Sequence[str]], missing: Sequence[tuple[int, Line]]) -> None:
        """
        Measure curves, questions by questions, each written as soon as it is known.

        :param chunks: The questions.
        :param missing: Which chunks and curves.
        """
        job = self._job
        layers = self._layers
        thresholds = {line: dict(self._thresholds(line)) for line in job.lines if line.mode == STATIC}
        steps = sum(
            self._count_steps([line for n, line in missing if n == number]) for number in {n for n, _ in missing}
        )
        self._say(f"asking {job.model} {len(chunks)} x {job.batch} questions")
        bar = progress_bar("attribution", total=steps, unit="steps")
        with bar as advance, evaluation_mode(self._loaded.model), without_parameter_gradients(self._loaded.model):
            for number in sorted({n for n, _ in missing}):
                lines = [line for n, line in missing if n == number]
                needs_path = any(line.metric == INTEGRATED for line in lines)
                prompts = encode_questions(self._loaded.tokenizer, chunks[number], job.prompt)
                decoding = Decoding.begin(self._loaded.model, list(layers), prompts)
                recording = record(
                    decoding,
                    ends=self._ends,
                    most=job.max_tokens,
                    ig_steps=job.ig_steps if needs_path else None,
                    advance=advance,
                )
                # Texts that ended early took fewer steps than were counted.
                left = job.max_tokens - len(recording.labels)
                advance(left * (1 + (len(layers) if needs_path else 0) + len(lines) * len(job.ratios)))
                for line in lines:
                    rows = [
                        self._replay(decoding, recording, line, ratio, thresholds.get(line, {}), advance)
                        for ratio in job.ratios
                    ]
                    found = {"rows": rows, "environment": describe_environment() | {"device": job.device}}
                    write_json(self.path(chunks[number], line), found)

    def _count_steps(self, lines: Sequence[Line]) -> int:
        needs_path = any(line.metric == INTEGRATED for line in lines)
        recorded = 1 + (len(self._layers) if needs_path else 0)
        return self._job.max_tokens * (recorded + len(lines) * len(self._job.ratios))

    def _replay(
        self,
        decoding: Decoding,
        recording: Recording,
        line: Line,
        ratio: float,
        thresholds: dict[float, Thresholds],
        advance: Advance,
    ) -> dict[str, Any]:
        if line.mode == ORACLE:
            masks = oracle_masks(recording, self._layers, line.metric, line.where, ratio)
        else:
            masks = static_masks(thresholds[ratio])
        found = replay(decoding, recording, self._layers, masks, advance)
        texts, references = self._decode(found.tokens, recording), self._decode(recording.labels, recording)
        return {
            "ratio": ratio,
            "sparsity": found.sparsity,
            "answers": texts,
            "references": references,
            "tokens": recording.is_label.sum(0).tolist(),
            "divergence": found.divergence.tolist(),
            "agreement": found.agreement.tolist(),
        }

    def _thresholds(self, line: Line) -> Iterator[tuple[float, Thresholds]]:
        for ratio in self._job.ratios:
            if ratio == 0:
                yield ratio, {}
                continue
            described = hashlib.sha256(json.dumps(self._settings(line)).encode()).hexdigest()[:12]
            path = self._job.out / "thresholds" / f"{line.metric}-{line.where}-{ratio:g}-{described}.safetensors"
            if not path.is_file():
                self._say(f"calibrating {line.metric} at {ratio:g}")
            model, batches = self._loaded.model, self._batches
            yield ratio, calibrate_static(model, batches, line.metric, line.where, ratio, self._known, path)

    @property
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


def _require_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        msg = f"--device {name} cannot be used here: {shorten_message(error, 100)}"
        raise ActsparseError(msg) from None


def _read(path: Path, ratios: Sequence[float]) -> dict[str, Any] | None:
    try:
        point = json.loads(path.read_bytes())
        has_all = {row["ratio"] for row in point["rows"]} >= set(ratios)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return point if has_all else None


def _describe(job: AttributionJob, questions: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for line in job.lines:
        settings |= job.settings(line)
    return {
        **settings,
        "questions": f"{len(questions)} of {Path(job.questions).name}",
        "ratio": "the share of heads and neurons switched off in every layer",
    }
