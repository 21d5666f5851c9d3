"""The reference file: the figures that cases had when somebody accepted them, how far they may move, and why."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from actsparse.commands.regression.case import CASE_NAME
from actsparse.commands.regression.figures import KINDS, CaseResult, Figure
from actsparse.commands.regression.records import NOT_IN_FILE, make_mapping, read_record, write_yaml
from actsparse.errors import SourceError, nearest
from actsparse.storage.files import prepare_folder, write_bytes

FORMAT = 1
HEADING = "Written by `actsparse regress --update REASON`; tolerances are there to be edited, and updates keep them."
_RESULT_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,119}\.json")


@dataclass(frozen=True)
class Tolerance:
    """
    A tolerance: one of three.

    :param relative: The figure may be worse by that share of the reference.
    :param interval: For figures of the loss: the 95% interval of the difference to the reference's windows, paired,
        must reach that many nats a token of worse. 0 asks that a difference be told from none.
    """

    absolute: float | None = None
    relative: float | None = None
    interval: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.absolute, self.relative, self.interval) if value is not None]
        if len(given) != 1:
            msg = "a tolerance is one of absolute, relative and interval"
            raise SourceError(msg)
        if given[0] < 0:
            msg = f"a tolerance is 0 or more, not {given[0]}"
            raise SourceError(msg)


# What a first --update writes; the other figures are shown and not judged. benchmarks/planted_regression.py shows what
# those of loss and sparsity catch and what they let pass. Times and memory are only roughly the same on other machines.
DEFAULTS = {
    "word_perplexity": Tolerance(interval=0.02),
    "dense_word_perplexity": Tolerance(interval=0.005),
    "sparsity": Tolerance(absolute=0.01),
    "farthest_layer": Tolerance(absolute=0.03),
    "weight_reads_skipped": Tolerance(absolute=0.01),
    "calibration_ratio": Tolerance(relative=0.5),
    "peak_memory_mb": Tolerance(relative=0.3),
    "decode_ratio": Tolerance(relative=0.15),
}


@dataclass(frozen=True)
class AcceptedFigure(Figure):
    """
    A figure as it was accepted.

    :param tolerance: How much worse it may become; None where it is shown and not judged.
    """

    tolerance: Tolerance | None = None

    @property
    def figure(self) -> Figure:
        """The figure alone."""
        return Figure(self.value, self.low, self.high)


@dataclass(frozen=True)
class ReferenceCase:
    """
    A case in a reference.

    :param result: The name of the file beside the reference that has all that was measured, window by window.
    """

    case: str
    result: str
    figures: dict[str, AcceptedFigure]

    def __post_init__(self) -> None:
        if not _RESULT_NAME.fullmatch(self.result):
            msg = f"{self.result[:60]!r} is no name of a result's JSON file"
            raise SourceError(msg)
        for name, accepted in self.figures.items():
            if name not in KINDS:
                msg = f"there is no figure {name[:60]!r}; nearest: {nearest(name[:60], KINDS)}"
                raise SourceError(msg)
            tolerance = accepted.tolerance
            if tolerance is not None and tolerance.interval is not None and not KINDS[name].losses:
                msg = f"{name} is no figure of the loss: it takes absolute or relative"
                raise SourceError(msg)

    @property
    def tolerances(self) -> dict[str, Tolerance | None]:
        """The tolerance of each figure; None where it is not judged."""
        return {name: accepted.tolerance for name, accepted in self.figures.items()}


@dataclass(frozen=True)
class Update:
    """
    One time that figures were accepted.

    :param commit: Of the reference's folder; None outside a checkout.
    """

    date: str
    reason: str
    cases: tuple[str, ...]
    commit: str | None = None
    is_dirty: bool | None = None


@dataclass(frozen=True)
class Reference:
    """A reference file."""

    format: int
    cases: dict[str, ReferenceCase]
    updates: tuple[Update, ...] = ()
    path: Path = field(default=Path("reference.yaml"), metadata=NOT_IN_FILE)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            msg = f"its format is {self.format}, and this version of actsparse reads {FORMAT}"
            raise SourceError(msg)
        for name, case in self.cases.items():
            if not CASE_NAME.fullmatch(name) or PurePosixPath(case.case).stem != name:
                msg = f"the case {name[:60]!r} is not named after its file, {case.case[:60]!r}"
                raise SourceError(msg)

    def find(self, name: str) -> ReferenceCase:
        """
        Look a case up.

        :raises SourceError: If there is none.
        """
        if name not in self.cases:
            msg = f"{self.path} has no case {name!r}; nearest: {nearest(name, self.cases)}; --update adds a case's file"
            raise SourceError(msg)
        return self.cases[name]

    def case_path(self, name: str) -> Path:
        """Find a case's file."""
        return self.path.parent / self.find(name).case

    def read_result(self, name: str) -> CaseResult:
        """
        Read what was measured when a case was accepted.

        :raises SourceError: If its file is missing or damaged.
        """
        return read_result(results_folder(self.path) / self.find(name).result)


def read_reference(path: str | Path) -> Reference:
    """
    Read a reference file.

    :raises SourceError: If it cannot be read or says something impossible; names the file.
    """
    path = Path(path)
    return replace(read_record(path, Reference, "the reference"), path=path)


def write_reference(
    path: Path,
    before: Reference | None,
    results: Mapping[str, tuple[Path, CaseResult]],
    reason: str,
    git: Mapping[str, Any],
) -> None:
    """
    Accept results as the reference, whole or not at all; cases that are not among them stay as they are.

    :param before: What it holds; None for a new one. Its tolerances are kept.
    :param results: A case's file and what was measured of it, by name.
    :raises OutputError: If a file cannot be written.
    """
    folder = prepare_folder(results_folder(path))
    before = before or Reference(FORMAT, {})
    cases = dict(before.cases)
    for name, (case_path, result) in results.items():
        data = (json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n").encode()
        file_name = f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.json"
        # Under a new name: until the reference names it, the old one is what counts.
        write_bytes(folder / file_name, data)
        tolerances = DEFAULTS | (cases[name].tolerances if name in cases else {})
        relative = Path(os.path.relpath(case_path.resolve(), path.parent.resolve())).as_posix()
        cases[name] = ReferenceCase(relative, file_name, accept_figures(result.figures, tolerances))
    update = Update(datetime.now(UTC).date().isoformat(), reason, tuple(results), git["commit"], git["is_dirty"])
    write_yaml(path, make_mapping(Reference(FORMAT, cases, (*before.updates, update))), HEADING)
    for old in {case.result for case in before.cases.values()} - {case.result for case in cases.values()}:
        (folder / old).unlink(missing_ok=True)


def read_result(path: Path) -> CaseResult:
    """
    Read a result's JSON file.

    :raises SourceError: If it is missing, damaged or something else.
    """
    try:
        contents = json.loads(path.read_bytes())
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror or error}"
        raise SourceError(msg) from None
    except (ValueError, RecursionError):
        msg = f"{path} is damaged: it is no JSON file"
        raise SourceError(msg) from None
    return CaseResult.from_dict(contents, str(path))


def accept_figures(
    figures: Mapping[str, Figure], tolerances: Mapping[str, Tolerance | None]
) -> dict[str, AcceptedFigure]:
    """
    Make figures into what later ones are compared with.

    :param tolerances: How much worse each may become; figures that have none are not judged.
    """
    return {
        name: AcceptedFigure(_round(figure.value), _round(figure.low), _round(figure.high), tolerances.get(name))
        for name, figure in figures.items()
    }


def results_folder(path: Path) -> Path:
    """Name the folder of all that was measured for a reference."""
    return path.with_suffix(".results")


def _round(value: Any) -> Any:
    # For people to read; what is rounded away is far below any tolerance.
    return None if value is None else float(f"{value:.9g}")
