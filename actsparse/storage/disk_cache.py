"""Measurements of a calibration that is not finished, kept on disk: a run that was cut off goes on from there."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from actsparse.algorithms.cache import MeasurementCache
from actsparse.algorithms.measurements import Attribution, GradientSums
from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.runtime import distributed
from actsparse.storage.files import prepare_folder, write_bytes

FORMAT = "actsparse.measurement"


class DiskCache(MeasurementCache):
    """
    Keep what is measured in files, one for each measurement.

    Of processes that work together, the first writes; what not all of them can read is measured again by all.

    :param name_calibration: Says what identifies the calibration: model, data and settings. Files of another one are
        not read. It may be slow: it is asked once, when the first measurement is wanted.
    """

    def __init__(self, folder: Path, name_calibration: Callable[[], str]) -> None:
        super().__init__()
        self._folder = folder
        self._name_calibration = name_calibration

    @cached_property
    def _calibration(self) -> str:
        return self._name_calibration()

    def forget(self) -> None:
        """Remove all files: the calibration is finished."""
        if distributed.is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    def _find(self, what: str, measure: Callable[[], Any]) -> Any:
        name = hashlib.sha256(what.encode()).hexdigest()[:16]
        path = self._folder / f"{name}.safetensors"
        found = _read(path, self._calibration)
        readers = torch.tensor([int(found is not None)])
        distributed.add_up(readers)
        if found is not None and readers.item() == distributed.count_processes():
            return found
        found = measure()
        prepare_folder(self._folder)
        _write(path, found, self._calibration)
        return found


def _write(path: Path, found: Any, calibration: str) -> None:
    kind, tensors, rest = "text", {}, found
    if isinstance(found, Mapping) and found:
        kind = next(kind for kind, (type_, _, _) in _KINDS.items() if isinstance(next(iter(found.values())), type_))
        # Numbered: a name may be anything, and the order is part of what was found.
        tensors = {str(i): _KINDS[kind][1](value).contiguous() for i, value in enumerate(found.values())}
        rest = list(found)
    metadata = {"format": FORMAT, "calibration": calibration, "kind": kind, "rest": json.dumps(rest)}
    write_bytes(path, save(tensors, metadata))


def _read(path: Path, calibration: str) -> Any:
    """Return what a file holds; None where it is missing, is of another calibration or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
        if (metadata["format"], metadata["calibration"]) != (FORMAT, calibration):
            return None
        rest = json.loads(metadata["rest"])
        if metadata["kind"] == "text":
            return rest
        restore = _KINDS[metadata["kind"]][2]
        return {name: restore(tensor) for name, tensor in zip(rest, tensors, strict=True)}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _store_gradients(sums: GradientSums) -> torch.Tensor:
    return torch.stack([*sums.vectors, torch.full_like(sums.square, sums.tokens)])


def _restore_gradients(stored: torch.Tensor) -> GradientSums:
    sums = GradientSums(stored.shape[1])
    for vector, values in zip(sums.vectors, stored, strict=False):
        vector.copy_(values)
    sums.tokens = int(stored[-1, 0])
    return sums


def _store_attribution(found: Attribution) -> torch.Tensor:
    return torch.tensor([found.energy, *found.increases], dtype=torch.float64)


def _restore_attribution(stored: torch.Tensor) -> Attribution:
    energy, *increases = stored.tolist()
    return Attribution(tuple(increases), energy)


# What measurements consist of, as tensors and back.
_KINDS: dict[str, tuple[type, Callable[[Any], torch.Tensor], Callable[[torch.Tensor], Any]]] = {
    "tensor": (torch.Tensor, lambda x: x, lambda x: x),
    "sketch": (MagnitudeSketch, lambda x: x.counts, MagnitudeSketch),
    "gradients": (GradientSums, _store_gradients, _restore_gradients),
    "attribution": (Attribution, _store_attribution, _restore_attribution),
    "number": (float, lambda x: torch.tensor(x, dtype=torch.float64), lambda x: x.item()),
    "numbers": (tuple, lambda x: torch.tensor(x, dtype=torch.float64), lambda x: tuple(x.tolist())),
}
