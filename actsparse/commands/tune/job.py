"""The job behind `actsparse tune`: what each kind of weights costs, then the search, then the folder."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actsparse.algorithms import get_allocating_algorithm
from actsparse.commands.bench.prepare import AWARE, find_source
from actsparse.commands.tune.candidates import KERNEL, REFERENCE, Candidate, Speed
from actsparse.commands.tune.results import TuneReport, TuneRow
from actsparse.commands.tune.search import Found, Line, Search
from actsparse.commands.tune.workshop import Workshop
from actsparse.console.plot import plot_tradeoff
from actsparse.console.report import write_json
from actsparse.errors import ActsparseError, SourceError, nearest
from actsparse.evaluation.bootstrap import bootstrap_ratio
from actsparse.openvino.require import require_optimum
from actsparse.runtime.environment import describe_environment
from actsparse.runtime.progress import Say
from actsparse.storage.files import prepare_folder
from actsparse.texts import load_pages

TUNED = ("int8", "int4", AWARE)
# With these masks speed is predicted: it is a matter of bytes, whatever algorithm finds them.
PROBE_ALGORITHM, PROBE_SPARSITY = "magnitude", 0.5
# Text is judged by so many windows, and as many others that the search has not seen; with fewer than these, not at all.
WINDOWS, LEAST_WINDOWS = 24, 4
# Which windows the search sees, and which judge what it found: every other one.
SEEN, UNSEEN = (0, 2), (1, 2)
# Weights learnt from data lose about half of what those made without lose: not worth the minutes where that is as many
# times the limit.
HOPELESS = 4.0
UNFINISHED_NAME = "tune.unfinished"


@dataclass(frozen=True)
class TuneJob:
    """What `actsparse tune` is asked to do; see its help."""

    model: str
    out: Path
    max_perplexity_increase: float = 0.03
    weights: tuple[str, ...] = TUNED
    algorithm: str = "auto"
    recover: int = 60
    minutes: float | None = None
    text: str = "default"
    calibration: str = "default"
    num_batches: int = 32

    def __post_init__(self) -> None:
        limit = self.max_perplexity_increase
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < math.inf:
            msg = f"--max-perplexity-increase is {limit!r}; it must be a positive number, such as 0.03 for 3%"
            raise ActsparseError(msg)
        for name in self.weights:
            if name not in TUNED:
                msg = f"--weights has {name!r}; they are of {', '.join(TUNED)} (nearest: {nearest(name, TUNED, 1)})"
                raise ActsparseError(msg)
        if not self.weights or len(set(self.weights)) < len(self.weights):
            msg = "--weights needs at least one kind of weights, and none twice"
            raise ActsparseError(msg)
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            msg = f"--minutes is {self.minutes}; it must be a positive number"
            raise ActsparseError(msg)
        if isinstance(self.recover, bool) or not isinstance(self.recover, int) or self.recover < 0:
            msg = f"--recover takes a number of steps, not {self.recover!r}"
            raise ActsparseError(msg)
        if self.num_batches < 1:
            msg = f"--batches is {self.num_batches}; it must be at least 1"
            raise ActsparseError(msg)
        get_allocating_algorithm(self.algorithm)
        require_optimum("tuning")


def tune(model: str, out: str | Path, *, say: Say = lambda _line: None, **options: Any) -> TuneReport:
    """
    Find the fastest form of a model on this machine within a perplexity, and write it as an OpenVINO folder.

    Tried are kinds of weights, masks of one algorithm at several sparsities, and OpenVINO's own layers beside the
    extension's. Losses of weights and masks nearly add up and speed follows the bytes that are read, so that few
    candidates are measured. If the best is a dense model, that is what is written.

    :param model: ``default``, a hub id, a folder or a GGUF file.
    :param out: The folder to write: the model, its tokenizer, its thresholds, tune.json and tune.png. An interrupted
        call goes on from what the folder has.
    :param say: Told of each step.
    :param options: `max_perplexity_increase` (0.03: 3% of token perplexity on held-out text), `weights` (of int8, int4
        and int4-aware), `algorithm`, `recover` (60: steps with which masks learn biases, once the search without is
        done; 0 for none), `minutes` (no new candidate is begun after them), `text` (held out), `calibration` and
        `num_batches`.
    :return: What was tried, what was chosen, and why the search ended.
    :raises ActsparseError: If an input cannot be used, nothing is within the limit, or the folder cannot be written.
    """
    return run_tune(TuneJob(model, Path(out), **options), say)


def run_tune(job: TuneJob, say: Say) -> TuneReport:
    """
    Tune a model; see `tune`.

    :raises ActsparseError: As `tune`.
    """
    text = load_pages(job.text)
    calibration = load_pages(job.calibration, purpose="calibration")
    prepare_folder(job.out)
    source = find_source(job.model)
    if not source.has_text or source.is_openvino:
        what = "has no tokenizer" if not source.has_text else "is an OpenVINO model already, of one kind of weights"
        msg = f"{job.model} {what}: give the model that it was made from"
        raise SourceError(msg)
    folder = job.out / UNFINISHED_NAME
    workshop = Workshop(source, text, calibration, folder, num_batches=job.num_batches, windows=WINDOWS, say=say)
    report = _Run(job, workshop, text.name, say).run()
    write_json(job.out / "tune.json", report.to_dict() | {"environment": describe_environment()})
    plot_tradeoff(report.points(), job.max_perplexity_increase, job.out / "tune.png")
    workshop.forget()
    return report


class _Run:
    """A job under way."""

    def __init__(self, job: TuneJob, workshop: Workshop, text: str, say: Say) -> None:
        self._job, self._workshop, self._text, self._say = job, workshop, text, say
        self._begin = time.monotonic()
        self._losses: dict[Candidate, float] = {}
        self._speeds: dict[Candidate, Speed] = {}
        self._left_out: dict[str, str] = {}

    def run(self) -> TuneReport:
        limit = math.log1p(self._job.max_perplexity_increase)
        self._workshop.dense(REFERENCE.weights)
        if len(self._workshop.windows(*UNSEEN).windows) < LEAST_WINDOWS:
            msg = f"{self._text} is too short: half of it has fewer than {LEAST_WINDOWS} windows to judge by"
            raise SourceError(msg)
        kinds = self._measure_weights(limit)
        self._yardstick = kinds[0]
        lines = {name: line for name in kinds if (line := self._time_weights(name)) is not None}
        best = min(
            (x for x in self._speeds if not x.algorithm and self._lose(x) <= limit),
            key=lambda x: self._speeds[x].decode,
            default=None,
        )
        # What rounding activations costs is noise beside what masks do to it: the lower of both is where these begin.
        dense = {name: min(self._lose(Candidate(name)), self._lose(Candidate(name, KERNEL))) for name in lines}
        search = Search(
            limit,
            dense,
            lines,
            self._job.algorithm,
            recover=self._job.recover,
            measure=self._lose,
            has_time=self._has_time,
            say=self._say,
        )
        found = search.run(best, self._speeds[best].decode if best else math.inf)
        return self._finish(found, best, limit)

    def _measure_weights(self, limit: float) -> list[str]:
        kinds: list[str] = []
        for name in sorted(self._job.weights, key=TUNED.index):
            others = [self._lose(Candidate(x)) for x in kinds if x.startswith("int4")]
            if name == AWARE and others and min(others) > HOPELESS * limit:
                self._left_out[name] = f"int4 loses more than {HOPELESS:g} times the limit"
                self._say(f"{name} is left out: {self._left_out[name]}")
                continue
            try:
                self._workshop.dense(name)
                self._lose(Candidate(name))
            except ActsparseError as error:
                self._left_out[name] = str(error)
                self._say(f"{name} is left out: {error}")
                continue
            kinds.append(name)
        if not kinds:
            msg = f"no kind of weights can be had: {'; '.join(f'{n}: {why}' for n, why in self._left_out.items())}"
            raise ActsparseError(msg)
        return kinds

    def _time_weights(self, name: str) -> Line | None:
        """Time a kind of weights: OpenVINO's layers, and the kernel's without masks and with some."""
        if self._workshop.no_kernel:
            self._left_out["masks, and the kernel"] = self._workshop.no_kernel
            self._speeds |= self._workshop.speeds([x for x in self._losses if x != REFERENCE])
            return None
        kernel = Candidate(name, KERNEL)
        probe = Candidate(name, KERNEL, PROBE_ALGORITHM, PROBE_SPARSITY)
        first, yardstick = Candidate(self._yardstick), self._yardstick
        others = [] if name == yardstick else [Candidate(name)]
        timed = self._workshop.speeds([first, *others, kernel, probe])
        # Others were timed at another minute: the yardstick tells how fast the machine was.
        pace = self._speeds[first].decode / timed[first].decode if first in self._speeds else 1.0
        for candidate, speed in timed.items():
            if candidate not in self._speeds and not candidate.algorithm:
                self._speeds[candidate] = speed.at_pace(pace)
        if timed[probe].decode >= timed[kernel].decode:
            self._left_out[f"masks on {name}"] = "masks do not make it faster here"
            return None
        return Line(pace * timed[kernel].decode, pace * (timed[probe].decode - timed[kernel].decode) / PROBE_SPARSITY)

    def _finish(self, found: Found, dense: Candidate | None, limit: float) -> TuneReport:
        job, workshop = self._job, self._workshop
        if found.best is None:
            least = min(self._losses, key=self._losses.__getitem__)
            msg = (
                f"nothing is within {job.max_perplexity_increase:.1%}: the least loss is that of {least.name}, "
                f"{math.expm1(self._losses[least]):.1%}"
            )
            raise ActsparseError(msg)
        within = [x.candidate for x in found.tried if x.loss <= limit]
        finalists: list[Candidate] = []
        for candidate in [
            dense,
            found.best,
            Candidate(self._yardstick),
            *sorted(within, key=lambda x: -x.sparsity)[:2],
        ]:
            if candidate is not None and candidate not in finalists:
                finalists.append(candidate)
        # Once more together, so that no minute favours one of them; others as fast as they were beside the yardstick.
        final, yardstick = workshop.speeds(finalists), Candidate(self._yardstick)
        pace = final[yardstick].decode / self._speeds[yardstick].decode
        self._speeds = {x: speed.at_pace(pace) for x, speed in self._speeds.items()} | final
        chosen = min((x for x in finalists if self._lose(x) <= limit), key=lambda x: self._speeds[x].decode)
        self._say(f"writing {chosen.name}")
        confirmed = self._confirm(chosen)
        workshop.write(chosen, job.out)
        candidates = [*self._losses, *(x for x in self._speeds if x not in self._losses)]
        rows = tuple(
            TuneRow(x, self._losses.get(x), self._speeds.get(x), x == chosen) for x in candidates if x != REFERENCE
        )
        settings = {
            "model": job.model,
            "limit": f"{job.max_perplexity_increase:.1%} of token perplexity over the model's own weights",
            "text": f"{self._text}, {len(workshop.windows(*SEEN).windows)} windows",
            "calibration": f"{job.calibration}, {job.num_batches} batches",
            "processor": workshop.processor,
            "minutes": round((time.monotonic() - self._begin) / 60, 1),
        }
        return TuneReport(rows, confirmed, found.reason, settings, self._left_out)

    def _confirm(self, chosen: Candidate) -> dict[str, Any]:
        """Measure the chosen one on text that the search has not seen."""
        tokens = self._workshop.windows(*UNSEEN).num_scored
        more = self._workshop.losses(chosen, *UNSEEN) - self._workshop.losses(REFERENCE, *UNSEEN)
        low, high = bootstrap_ratio(more, tokens)
        return {
            "loss_increase": float(more.sum() / tokens.sum()),
            "loss_increase_interval": [low, high],
            "perplexity_increase": math.expm1(float(more.sum() / tokens.sum())),
            "text": f"{len(tokens)} other windows of {self._text}",
        }

    def _lose(self, candidate: Candidate) -> float:
        """Measure how much more a token costs than with the model's own weights, in nats."""
        if candidate not in self._losses:
            tokens = self._workshop.windows(*SEEN).num_scored
            more = self._workshop.losses(candidate, *SEEN) - self._workshop.losses(REFERENCE, *SEEN)
            self._losses[candidate] = float(np.sum(more) / tokens.sum())
        return self._losses[candidate]

    def _has_time(self) -> bool:
        return self._job.minutes is None or time.monotonic() - self._begin < 60 * self._job.minutes
