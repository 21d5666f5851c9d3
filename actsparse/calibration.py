"""Calibration: its settings, its data, the decision for each site, and the estimates of thresholds."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import nncf
import numpy as np
import torch

from actsparse.algorithms import (
    Algorithm,
    MeasurementCache,
    Measurements,
    Plan,
    Selection,
    Way,
    gather_groups,
    select,
)
from actsparse.errors import ActsparseError, DatasetError, one_line
from actsparse.runtime import distributed
from actsparse.runtime.progress import progress_bar
from actsparse.scopes import LayerSize, Site
from actsparse.scopes.matching import Target

Loss = Callable[[Any, Any], torch.Tensor]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """
    How `sparsify_activations` was called.

    :param tokens: ``all`` or ``decode``.
    :param keep_existing: Whether masks stay on the layers that no scope matches.
    :param loss: What gradients are of; None for the model's own.
    :param skip_first: How many tokens at the start of a forward pass unmasked.
    :param cache: What calls before this one measured of the same model, sites and data; this one adds to it.
    """

    algorithm: Algorithm
    tokens: str = "all"
    keep_existing: bool = False
    loss: Loss | None = None
    skip_first: int = 0
    cache: MeasurementCache = field(default_factory=MeasurementCache)


@dataclass
class Passes:
    """
    How often a model has run.

    :param backwards: Those that keep what a backward pass needs.
    """

    forwards: int = 0
    backwards: int = 0


@dataclass(frozen=True)
class Calibration:
    """
    What a calibration took and decided.

    :param forwards: How often the data went through the model, this process's share of it; tracing is not counted.
    :param backwards: How many of these runs went backwards too.
    :param selection: What was tried and chosen, by an algorithm that chooses.
    """

    forwards: float
    backwards: float
    selection: Selection | None = None

    def name_algorithm(self, name: str) -> str:
        """
        Name the algorithm for a report.

        :return: The same, with what was chosen where it chooses.
        """
        return f"{name}, which chose {self.selection.chosen}" if self.selection else name

    def to_dict(self) -> dict[str, Any]:
        """Turn the calibration into what JSON can hold."""
        selection = {"selection": self.selection.to_dict()} if self.selection else {}
        return {"forwards": round(self.forwards, 3), "backwards": round(self.backwards, 3), **selection}


class CalibrationBatches:
    """
    The batches of a calibration dataset, read once.

    :param dataset: An `nncf.Dataset`, or any iterable of model inputs.
    :raises DatasetError: If it is not iterable, or its first batch cannot be read or is missing.
    """

    def __init__(self, dataset: Any) -> None:
        self._batches = _open(dataset)
        self.length = _length(dataset)
        try:
            self.first = next(self._batches)
        except StopIteration:
            msg = "the calibration dataset is empty"
            raise DatasetError(msg) from None

    @classmethod
    def of(cls, dataset: Any) -> "CalibrationBatches":
        """
        Read a dataset, unless that has begun.

        :param dataset: A calibration dataset, or the batches of one.
        """
        return dataset if isinstance(dataset, cls) else cls(dataset)

    def __iter__(self) -> Iterator[Any]:
        yield self.first
        yield from self._batches

    def share(self) -> Iterator[Any]:
        """
        Go through this process's share of the batches; through all of them where it works alone.

        :raises ProcessError: At the end, if the processes have different batches.
        """
        digest = distributed.Digest()
        for number, batch in enumerate(self):
            if distributed.count_processes() > 1:
                digest.add(batch)
            if distributed.is_own(number):
                yield batch
        distributed.require_same(digest.finish(), "calibration data")

    def keep(self) -> list[Any]:
        """
        Read all batches into memory, to go through them several times.

        :raises ProcessError: If the processes have different batches.
        """
        kept = list(self)
        if distributed.count_processes() > 1:
            distributed.require_same(distributed.digest_of(kept), "calibration data")
        return kept

    @property
    def share_length(self) -> int | None:
        """How many batches are this process's share, where that is known."""
        return None if self.length is None else len(distributed.share(range(self.length)))


class SiteEstimates:
    """
    The estimates of all sites while a model is calibrated.

    :param targets: The target sparsities of each site's layers. Target 0 is the identity whatever the data, so there is
        nothing to estimate for it.
    :param importance: The importance of the channels of each site.
    :raises ActsparseError: If several processes are to estimate what depends on the order of the data.
    """

    def __init__(
        self, targets: Mapping[str, set[float]], algorithm: Algorithm, importance: Mapping[str, torch.Tensor]
    ) -> None:
        positive = {site: sorted(wanted - {0.0}) for site, wanted in targets.items()}
        self._estimators = {
            site: algorithm.make_estimator(tuple(wanted), importance.get(site))
            for site, wanted in positive.items()
            if wanted
        }
        if distributed.count_processes() > 1 and not all(x.sums() for x in self._estimators.values()):
            msg = f"{algorithm.allocation} takes batch after batch, in their order: it cannot be shared among processes"
            raise ActsparseError(msg)
        self._seen: set[str] = set()

    @classmethod
    def of(cls, plan: Plan, sites: Sequence[Site], algorithm: Algorithm) -> "SiteEstimates":
        """Get ready to estimate what a plan needs."""
        zeros = {site.name: {plan.zeros[layer.name] for layer in site.layers} for site in sites}
        return cls(zeros, algorithm, plan.importance)

    def update(self, site: str, x: torch.Tensor) -> None:
        """
        Take in what a site's layers read from one batch.

        :param site: The site, which is named after its first layer.
        :raises DatasetError: If an entry is NaN or infinite; names the layer.
        """
        if site not in self._estimators:
            return
        self._seen.add(site)
        with blame_layer(site):
            self._estimators[site].update(x)

    def mask_batch(self, site: str, x: torch.Tensor, target: float) -> torch.Tensor:
        """
        Mask what was just taken in.

        :param target: The target sparsity of the layer that reads it.
        """
        return self._estimators[site].mask_batch(x, target) if target > 0 else x

    def add_up(self) -> None:
        """Add what the other processes have taken in."""
        seen = torch.tensor([int(site in self._seen) for site in self._estimators])
        distributed.add_up(seen, *(x for estimator in self._estimators.values() for x in estimator.sums()))
        self._seen = {site for site, count in zip(self._estimators, seen.tolist(), strict=True) if count}

    def threshold(self, site: str, target: float) -> torch.Tensor:
        """
        Give the threshold of some of a site's layers.

        :return: The threshold, 0-d or [in_features]; minus infinity for target 0.
        """
        return self._estimators[site].threshold(target) if target > 0 else torch.tensor(-torch.inf)

    def require_all_seen(self) -> None:
        """
        Check that every site was reached.

        :raises DatasetError: If one was not; names the layer.
        """
        require_seen(self._estimators, self._seen)


@dataclass(frozen=True)
class Decision:
    """
    What an algorithm has decided, and what its thresholds are to be calibrated with.

    :param data: This process's share of the batches.
    :param selection: What was tried and chosen, by an algorithm that chooses.
    """

    sites: Sequence[Site]
    plan: Plan
    data: Iterable[Any]
    estimates: SiteEstimates
    selection: Selection | None = None


def decide(
    algorithm: Algorithm,
    layouts: Mapping[bool, Sequence[Site]],
    targets: Mapping[str, Target],
    sizes: Mapping[str, LayerSize],
    batches: CalibrationBatches,
    measure: Callable[[Sequence[Site], list[Any]], Measurements],
) -> Decision:
    """
    Decide how sparse each layer becomes.

    :param layouts: The sites to mask, without masks of rows and with them, as far as the algorithm needs them.
    :param measure: Makes what measures sites on the data, for an algorithm that asks for it.
    """
    if algorithm.is_one_pass and not algorithm.candidates:
        (sites,) = layouts.values()
        wanted = {name: target.sparsity for name, target in targets.items()}
        plan = Plan(wanted, {}, wanted, {})
        return Decision(sites, plan, batches.share(), SiteEstimates.of(plan, sites, algorithm))
    kept = batches.keep()
    models = {has_rows: measure(sites, kept) for has_rows, sites in layouts.items()}
    scopes = {has_rows: gather_groups(sites, targets, sizes) for has_rows, sites in layouts.items()}
    selection = None
    if algorithm.candidates:
        ways = []
        for candidate in algorithm.candidates:
            has_rows = candidate.rows and True in layouts
            # Where no gate can be masked, rows are inputs as always.
            tried = candidate if has_rows == candidate.rows else candidate.without_rows()
            if all(tried != way.algorithm for way in ways):
                ways.append(Way(tried, scopes[has_rows], models[has_rows]))
        chosen, plan, selection = select(ways, algorithm.compensation)
        algorithm = chosen.algorithm
        sites = layouts[algorithm.rows]
    else:
        ((has_rows, sites),) = layouts.items()
        plan = algorithm.plan(scopes[has_rows], models[has_rows])
    return Decision(sites, plan, distributed.share(kept), SiteEstimates.of(plan, sites, algorithm), selection)


def require_seen(sites: Iterable[str], seen: Iterable[str]) -> None:
    """
    Check that data went through every site.

    :raises DatasetError: If one is missing; names it.
    """
    seen = set(seen)
    unseen = next((site for site in sites if site not in seen), None)
    if unseen is not None:
        msg = f"layer {unseen} received no activations from the dataset"
        raise DatasetError(msg)


@contextmanager
def blame_layer(name: str) -> Iterator[None]:
    """
    Say which layer's input cannot be used.

    :return: A context in which a ValueError becomes a DatasetError that names it.
    """
    try:
        yield
    except ValueError as error:
        msg = f"{error} in the input of layer {name}"
        raise DatasetError(msg) from None


def run_each(run: Callable[[Any], object], batches: Iterable[Any], *, total: int | None, description: str) -> int:
    """
    Run every batch, one after the other, with a progress bar.

    :param total: How many, where it is known.
    :raises DatasetError: If the model cannot take a batch; names the batch.
    """
    count = 0
    with progress_bar(description, total=total, unit="batches") as advance:
        for number, batch in enumerate(batches):
            run_one(run, batch, number, advance)
            count += 1
    return count


def run_one(run: Callable[[Any], object], batch: Any, number: int, advance: Callable[[int], None]) -> None:
    """
    Run one batch of several.

    :param number: Its number, for an error message.
    :raises DatasetError: If the model cannot take the batch.
    """
    try:
        run(batch)
    except DatasetError:
        raise
    except Exception as error:
        _logger.debug("batch %d failed", number, exc_info=True)
        msg = f"the model cannot take batch {number} of the dataset ({describe_batch(batch)}): {one_line(error)}"
        raise DatasetError(msg) from error
    advance(1)


def describe_batch(batch: Any) -> str:
    """Say what a batch is, for an error message."""
    if isinstance(batch, torch.Tensor | np.ndarray):
        return f"tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_shape(value)}" for key, value in batch.items()) or "empty dict"
    if isinstance(batch, tuple):
        return ", ".join(_shape(value) for value in batch) or "empty tuple"
    return type(batch).__name__


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor | np.ndarray) else type(value).__name__


def _open(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, nncf.Dataset):
        return iter(dataset.get_inference_data())
    if isinstance(dataset, torch.Tensor | Mapping | str | bytes) or not isinstance(dataset, Iterable):
        msg = f"the dataset must be an nncf.Dataset or an iterable of model inputs, not {type(dataset).__name__}"
        raise DatasetError(msg)
    return iter(dataset)


def _length(dataset: Any) -> int | None:
    try:
        return dataset.get_length() if isinstance(dataset, nncf.Dataset) else len(dataset)
    except TypeError:
        # A DataLoader of a stream has a length that cannot be asked for.
        return None
