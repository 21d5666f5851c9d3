"""Running calibration data through a model, and leaving the model as it was."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import nncf
import numpy as np
import torch
from torch import nn

from actsparse import distributed
from actsparse.algorithms import Algorithm, LayerSize, Measurements, Plan, gather_parts
from actsparse.errors import DatasetError
from actsparse.lockstep import run_side_by_side
from actsparse.offload import is_offloaded
from actsparse.progress import progress_bar
from actsparse.scopes import Site
from actsparse.scopes.matching import Target

_logger = logging.getLogger(__name__)


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
        :return: Its batches.
        """
        return dataset if isinstance(dataset, cls) else cls(dataset)

    def __iter__(self) -> Iterator[Any]:
        yield self.first
        yield from self._batches

    def share(self) -> Iterator[Any]:
        """
        Go through this process's share of the batches; through all of them where it works alone.

        :return: The batches.
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

        :return: The batches.
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
    :param algorithm: What makes the estimators.
    :param importance: What it takes the channels of each site to be worth.
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
        self._seen: set[str] = set()

    @classmethod
    def of(cls, plan: Plan, sites: Sequence[Site], algorithm: Algorithm) -> "SiteEstimates":
        """
        Get ready to estimate what a plan needs.

        :param plan: The plan.
        :param sites: The sites to mask.
        :param algorithm: What makes the estimators.
        :return: Estimates that have seen nothing.
        """
        zeros = {site.name: {plan.zeros[layer.name] for layer in site.layers} for site in sites}
        return cls(zeros, algorithm, plan.importance)

    def update(self, site: str, x: torch.Tensor) -> None:
        """
        Take in what a site's layers read from one batch.

        :param site: The site, which is named after its first layer.
        :param x: Its input.
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

        :param site: The site.
        :param x: Its input.
        :param target: The target sparsity of the layer that reads it.
        :return: What the layer gets.
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

        :param site: The site.
        :param target: The layers' target sparsity.
        :return: The threshold, 0-d or [in_features]; minus infinity for target 0.
        """
        return self._estimators[site].threshold(target) if target > 0 else torch.tensor(-torch.inf)

    def require_all_seen(self) -> None:
        """
        Check that every site was reached.

        :raises DatasetError: If one was not; names the layer.
        """
        unseen = next((site for site in self._estimators if site not in self._seen), None)
        if unseen is not None:
            msg = f"layer {unseen} received no activations from the dataset"
            raise DatasetError(msg)


def make_estimates(
    algorithm: Algorithm,
    sites: Sequence[Site],
    targets: Mapping[str, Target],
    sizes: Mapping[str, LayerSize],
    batches: CalibrationBatches,
    measure: Callable[[list[Any]], Measurements],
) -> tuple[Plan, Iterable[Any], SiteEstimates]:
    """
    Decide how sparse each layer becomes, and get ready to calibrate its threshold.

    :param algorithm: The algorithm.
    :param sites: The sites to mask.
    :param targets: The target of each layer.
    :param sizes: The size of each layer.
    :param batches: The data.
    :param measure: Makes what measures the model on the data, for an algorithm that asks for it.
    :return: What was decided, this process's share of the data to calibrate on, and estimates that have seen none of
        it.
    """
    if algorithm.is_one_pass:
        data = batches.share()
        wanted = {name: target.sparsity for name, target in targets.items()}
        plan = Plan(wanted, {}, wanted, {})
    else:
        kept = batches.keep()
        data = distributed.share(kept)
        plan = algorithm.plan(gather_parts(sites, targets, sizes), measure(kept))
    return plan, data, SiteEstimates.of(plan, sites, algorithm)


@contextmanager
def blame_layer(name: str) -> Iterator[None]:
    """
    Say which layer's input cannot be used.

    :param name: The layer.
    :return: A context in which a ValueError becomes a DatasetError that names it.
    """
    try:
        yield
    except ValueError as error:
        msg = f"{error} in the input of layer {name}"
        raise DatasetError(msg) from None


def run_model(model: nn.Module, batch: Any) -> Any:
    """
    Run one model input: a dict as keyword arguments, a tuple as positional ones, anything else as the only one.

    :param model: The model.
    :param batch: The model input.
    :return: The model's output.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def run_batches(
    model: nn.Module, batches: Iterable[Any], *, total: int | None, description: str, reads_logits: bool = True
) -> int:
    """
    Run every batch in evaluation mode and without gradients, with a progress bar.

    :param model: The model; its training flags are restored afterwards, whatever happens.
    :param batches: Model inputs.
    :param total: How many, where it is known.
    :param description: What the progress bar says.
    :param reads_logits: Whether anything depends on the logits. Where nothing does, a causal language model is asked
        for those of the last token only: the head of a small model is a fifth of its work.
    :return: Number of batches run.
    :raises DatasetError: If the model cannot take a batch; names the batch.
    """

    def run(batch: Any) -> None:
        run_model(model, batch if reads_logits else _keep_last_logits(model, batch))

    with evaluation_mode(model), torch.no_grad():
        if not is_offloaded(model):
            return run_each(run, batches, total=total, description=description)
        with progress_bar(description, total=total, unit="batches") as advance:
            jobs = [partial(_run_one, run, batch, number, advance) for number, batch in enumerate(batches)]
            return len(run_side_by_side(model, jobs))


def run_each(run: Callable[[Any], object], batches: Iterable[Any], *, total: int | None, description: str) -> int:
    """
    Run every batch, one after the other, with a progress bar.

    :param run: Runs a model on one batch.
    :param batches: Model inputs.
    :param total: How many, where it is known.
    :param description: What the progress bar says.
    :return: Number of batches run.
    :raises DatasetError: If the model cannot take a batch; names the batch.
    """
    count = 0
    with progress_bar(description, total=total, unit="batches") as advance:
        for number, batch in enumerate(batches):
            _run_one(run, batch, number, advance)
            count += 1
    return count


def _run_one(run: Callable[[Any], object], batch: Any, number: int, advance: Callable[[int], None]) -> None:
    try:
        run(batch)
    except DatasetError:
        raise
    except Exception as error:
        _logger.debug("batch %d failed", number, exc_info=True)
        msg = f"the model cannot take batch {number} of the dataset ({describe_batch(batch)}): {one_line(error)}"
        raise DatasetError(msg) from error
    advance(1)


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """
    Put a model in evaluation mode for a while.

    :param model: The model; anything that is not a torch module has no mode.
    :return: A context after which each module's training flag is what it was.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module for module in modules if module.training]
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def describe_batch(batch: Any) -> str:
    """
    Say what a batch is, for an error message.

    :param batch: A model input.
    :return: Its type and shapes.
    """
    if isinstance(batch, torch.Tensor | np.ndarray):
        return f"tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {_shape(value)}" for key, value in batch.items()) or "empty dict"
    if isinstance(batch, tuple):
        return ", ".join(_shape(value) for value in batch) or "empty tuple"
    return type(batch).__name__


def one_line(error: BaseException, limit: int = 200) -> str:
    """
    Shorten an exception to one line.

    :param error: The exception.
    :param limit: Number of characters to keep.
    :return: Its type and the start of its message.
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]


def _keep_last_logits(model: nn.Module, batch: Any) -> Any:
    is_known = "logits_to_keep" in inspect.signature(model.forward).parameters
    if is_known and isinstance(batch, Mapping) and not {"labels", "logits_to_keep"} & batch.keys():
        return {**batch, "logits_to_keep": 1}
    return batch


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
