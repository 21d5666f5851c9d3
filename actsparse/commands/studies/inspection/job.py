"""The job behind `actsparse inspect`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actsparse.algorithms import ZEROS
from actsparse.commands.common import (
    CALIBRATION_LENGTH,
    DTYPES,
    point_key,
    read_batches,
    require_choice,
    validate_precision,
)
from actsparse.commands.studies.inspection.inspect import METHODS, PPLP, inspect_model
from actsparse.commands.studies.inspection.networks import CETT, FAT, TOPK
from actsparse.commands.studies.inspection.result import Inspection, Line
from actsparse.commands.studies.inspection.series import Checkpoint, Series, read_tokens
from actsparse.console.report import read_json, write_json
from actsparse.errors import ActsparseError, SourceError
from actsparse.models import load_model
from actsparse.models.identity import model_identity
from actsparse.runtime.environment import describe_environment
from actsparse.runtime.progress import Say
from actsparse.storage.files import kind_of, prepare_folder
from actsparse.texts import Text, load_pages
from actsparse.thresholds import save_thresholds


@dataclass(frozen=True)
class InspectJob:
    """What `actsparse inspect` is asked to do; see its help."""

    out: Path
    model: str | None = None
    checkpoints: tuple[str, ...] = ()
    method: str = PPLP
    value: float | None = None
    thresholds: str | None = None
    calibration: str = "default"
    num_batches: int = 8
    text: str = "default"
    num_pages: int | None = None
    max_length: int = 512
    heat_tokens: int = 128
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        validate_precision(None, self.dtype)
        if self.model is None and not self.checkpoints:
            msg = "give a MODEL, or --checkpoints 'DIR/*', or both"
            raise ActsparseError(msg)
        require_choice("--method", self.method, METHODS)
        if self.thresholds is not None:
            Line.parse(self.thresholds)
            return
        if self.method == ZEROS:
            if self.value is not None:
                msg = f"{ZEROS} counts what is zero by itself: leave --value out"
                raise ActsparseError(msg)
            return
        value = self.chosen_value
        limits = {TOPK: (0, 1), FAT: (-1e-300, 1e300), CETT: (0, 1), PPLP: (0, 1e6)}
        low, high = limits[self.method]
        if not low < value <= high:
            meaning = {
                TOPK: "the share of entries to keep, more than 0 and at most 1",
                FAT: "a threshold, 0 or more",
                CETT: "a relative error, more than 0 and at most 1",
                PPLP: "a growth of perplexity in percent, more than 0",
            }
            msg = f"--value is {value}; with {self.method} it is {meaning[self.method]}"
            raise ActsparseError(msg)

    @property
    def chosen_value(self) -> float:
        """What the method is given: `value`, or the usual one."""
        usual = {TOPK: 0.5, FAT: 0.01, CETT: 0.2, PPLP: 1.0, ZEROS: 0.0}
        return usual[self.method] if self.value is None else self.value

    @property
    def title(self) -> str:
        """The method and its value, for tables and plots."""
        if self.thresholds is not None:
            return "given thresholds"
        names = {TOPK: "top-{:g}", FAT: "FAT-{:g}", CETT: "CETT {:g}", PPLP: "PPL-{:g}%", ZEROS: "zeros"}
        return names[self.method].format(self.chosen_value)


def run_inspect(job: InspectJob, say: Say) -> tuple[Inspection, dict[str, Any]]:
    """
    Inspect one model.

    :return: The inspection and how it was made; the folder gets inspection.json, heat_map.png and, where the method has
        thresholds, thresholds.safetensors.
    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    assert job.model is not None
    calibration, text = _load_texts(job)
    prepare_folder(job.out)
    found, model = _inspect(job, job.model, calibration, text, say)
    settings = {"model": job.model} | settings_of(job, calibration, text)
    if found.line is not None or found.method == ZEROS:
        notes = {"source": job.model, "int8": None, "calibration": settings["calibration text"]}
        save_thresholds(model, job.out / "thresholds.safetensors", **notes)
    report = found.to_dict() | {"settings": settings, "environment": describe_environment()}
    write_json(job.out / "inspection.json", report)
    found.draw_heat_map(f"{job.title}: active entries of {job.model}", job.out / "heat_map.png")
    return found, settings


def run_series(job: InspectJob, say: Say) -> Series:
    """
    Inspect the checkpoints of one or more trainings; those that the folder has figures of are not inspected again.

    :raises ActsparseError: If an input cannot be used or the output cannot be written.
    """
    found = [(pattern, folder) for pattern in job.checkpoints for folder in find_checkpoints(pattern)]
    calibration, text = _load_texts(job)
    prepare_folder(job.out)
    prepare_folder(job.out / "points")
    settings = settings_of(job, calibration, text)
    checkpoints = []
    for number, (pattern, folder) in enumerate(found, start=1):
        key = point_key(model_identity(str(folder)), settings, calibration.sha256, text.sha256)
        path = job.out / "points" / f"{folder.name}-{key}.json"
        figures = _read(path)
        if figures is None:
            say(f"{folder} ({number} of {len(found)})")
            figures = _inspect(job, str(folder), calibration, text, say)[0].to_dict()
            write_json(path, figures)
        else:
            say(f"{folder} has been inspected before")
        tokens, unit = read_tokens(folder, number)
        checkpoints.append(Checkpoint(_name_series(pattern), str(folder), tokens, unit, figures))
    series = Series(tuple(checkpoints), settings | {"method": job.title})
    write_json(job.out / "series.json", series.to_dict() | {"environment": describe_environment()})
    series.draw(f"{job.title}: active entries while training", job.out / "series.png")
    return series


def find_checkpoints(pattern: str) -> list[Path]:
    """
    Find the checkpoints of a training, in the order of what they have seen.

    :raises SourceError: If there are none.
    """
    try:
        path = Path(pattern).expanduser()
        if not path.name:
            msg = "it names no folder"
            raise ValueError(msg)
        folders = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    except (ValueError, RuntimeError, OSError) as error:
        msg = f"--checkpoints takes a pattern of folders such as 'DIR/*', not {pattern!r}: {error}"
        raise SourceError(msg) from None
    models = [folder for folder in folders if kind_of(folder / "config.json") == "file"]
    if not models:
        msg = f"no folder that fits {pattern!r} holds a model (config.json); {len(folders)} files and folders fit"
        raise SourceError(msg)
    return sorted(models, key=lambda folder: (read_tokens(folder, 0)[0], folder.name))


def settings_of(job: InspectJob, calibration: Text, text: Text) -> dict[str, Any]:
    """Say how a job inspects."""
    method = f"thresholds {job.thresholds}" if job.thresholds else f"{job.method} {job.chosen_value:g}"
    return {
        "method": method,
        "weights": job.dtype,
        "calibration text": f"{calibration.name}: {job.num_batches} x {CALIBRATION_LENGTH} tokens",
        "evaluation text": f"{text.name}: windows of {job.max_length}",
        "tokens masked": "all",
    }


def _load_texts(job: InspectJob) -> tuple[Text, Text]:
    return load_pages(job.calibration, purpose="calibration"), load_pages(job.text, num_pages=job.num_pages)


def _inspect(job: InspectJob, name: str, calibration: Text, text: Text, say: Say) -> tuple[Inspection, Any]:
    say(f"loading {name}")
    loaded = load_model(name, dtype=DTYPES[job.dtype], torch_only=True)
    batches = read_batches(loaded, calibration, job.num_batches)
    inspection = inspect_model(
        loaded.model,
        loaded.tokenizer,
        batches,
        text.pages,
        method=job.method,
        value=None if job.thresholds else job.chosen_value,
        line=Line.parse(job.thresholds) if job.thresholds else None,
        max_length=job.max_length,
        heat_tokens=job.heat_tokens,
        say=say,
    )
    return inspection, loaded.model


def _name_series(pattern: str) -> str:
    """Name a series after the folder that its checkpoints lie in."""
    return Path(pattern).parent.name or pattern


def _read(path: Path) -> dict[str, Any] | None:
    point = read_json(path)
    return point if isinstance(point, dict) and "mean_activation" in point else None
