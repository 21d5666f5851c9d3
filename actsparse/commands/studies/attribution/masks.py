"""Which units stay on: chosen for each generated token, or by thresholds fixed before."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actsparse.algorithms import SCORES, MeasurementCache, get_algorithm
from actsparse.calibration import Settings
from actsparse.commands.studies.attribution.recording import Recording
from actsparse.commands.studies.units import HEADS, NEURONS, READERS, UnitLayer
from actsparse.scopes.target_scope import TargetScope
from actsparse.sparsify import calibrate, remove_sparsifiers
from actsparse.thresholds import read_thresholds, save_thresholds

ORACLE, STATIC = "oracle", "static"
WHERE = {HEADS: (HEADS,), NEURONS: (NEURONS,), "both": (HEADS, NEURONS)}

# Called with the number of the generated token, a layer's name and what it reads, [texts, 1, channels]; tells which
# entries stay, or None where all do.
Masks = Callable[[int, str, torch.Tensor], torch.Tensor | None]


def has_form(mode: str, metric: str) -> bool:
    """
    Tell whether a metric can be had in a mode.

    :param mode: `ORACLE` or `STATIC`.
    :param metric: A name of `METRICS`.
    :return: False for one whose average over calibration text would take a backward pass for each of many steps, for
        each layer and batch.
    """
    return mode == ORACLE or metric in SCORES


def oracle_masks(recording: Recording, layers: Mapping[str, UnitLayer], metric: str, where: str, ratio: float) -> Masks:
    """
    Switch off the least units of each layer, for each token by its own score.

    :param metric: A name of `METRICS`.
    :param where: A name of `WHERE`.
    """
    keep: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        dropped = int(ratio * layer.count + 0.5)
        if layer.kind in WHERE[where] and dropped:
            order = recording.score(metric, layer).argsort(-1)
            kept = torch.ones_like(order, dtype=torch.bool).scatter_(-1, order[..., :dropped], False)
            keep[name] = layer.spread(kept)

    def mask(step: int, name: str, x: torch.Tensor) -> torch.Tensor | None:
        if name not in keep:
            return None
        # Of each text there may be several copies.
        kept = keep[name][step]
        return kept.repeat_interleave(len(x) // len(kept), dim=0)[:, None]

    return mask


def calibrate_static(
    model: Any, batches: list[Any], metric: str, where: str, ratio: float, cache: MeasurementCache, path: Path
) -> dict[str, torch.Tensor]:
    """
    Fix thresholds: the metric averaged over calibration tokens, as `sparsify_activations` does with this score.

    Entries are left out, not whole heads: that is what a thresholds file can say, and what deployed models skip.

    :param metric: A name of `METRICS` with a static form.
    :param where: A name of `WHERE`.
    :param cache: What was measured before with the same model, data and `where`.
    """
    if path.is_file():
        return read_thresholds(path).thresholds
    settings = Settings(get_algorithm(f"{metric}+uniform"), tokens="decode", cache=cache)
    targets = {TargetScope(roles=(READERS[kind],)): ratio for kind in WHERE[where]}
    calibrate(model, batches, targets, None, settings)
    try:
        save_thresholds(model, path)
    finally:
        remove_sparsifiers(model)
    return read_thresholds(path).thresholds


def static_masks(thresholds: Mapping[str, torch.Tensor]) -> Masks:
    """
    Leave out entries that do not exceed thresholds.

    :param thresholds: By layer, 0-d or [channels].
    """

    def mask(thresholds: Mapping[str, torch.Tensor], _step: int, name: str, x: torch.Tensor) -> torch.Tensor | None:
        return x.abs() > thresholds[name].to(x) if name in thresholds else None

    return partial(mask, thresholds)
