"""Measured sparsity: the share of zeros that masked layers really see, layer by layer and by weight bytes."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from actsparse import distributed
from actsparse.calibration import CalibrationBatches, run_batches, run_each
from actsparse.errors import ActsparseError
from actsparse.insertion import named_sparsifiers, record_calls
from actsparse.openvino.detect import find_openvino_model
from actsparse.scopes.layers import in_features, named_linears, out_features, weight_bytes
from actsparse.sparsifier import ActivationSparsifier


@dataclass(frozen=True)
class LayerSparsity:
    """
    What one masked layer saw.

    :param name: The layer.
    :param site: The site whose input it reads.
    :param roles: What it does in its block.
    :param target_sparsity: The share of zeros asked for; None where an OpenVINO model converted by others does not say.
    :param sparsity: The share of zeros measured, less what a low-rank part that stands in for them reads, as a share of
        the weights.
    :param weight_bytes: Size of its weight as stored.
    """

    name: str
    site: str
    roles: tuple[str, ...]
    target_sparsity: float | None
    sparsity: float
    weight_bytes: int


@dataclass(frozen=True)
class SparsityReport:
    """
    Measured sparsity of a model on some data.

    :param layers: The masked layers, in the model's order.
    :param linear_bytes: Size of the weights of all the model's Linear layers, masked or not.
    :param tokens: Which tokens are masked: ``all``, ``decode``, or both joined.
    """

    layers: tuple[LayerSparsity, ...]
    linear_bytes: int
    tokens: str

    @property
    def sparsity(self) -> float:
        """Share of zeros over the masked layers, weighted by weight bytes."""
        return _weighted(self.layers)

    @property
    def weight_reads_skipped(self) -> float:
        """Share of the bytes of all Linear weights, the head's included, that zeros make unnecessary to read."""
        return sum(x.sparsity * x.weight_bytes for x in self.layers) / self.linear_bytes

    @property
    def by_role(self) -> dict[str, float]:
        """Share of zeros for each role, weighted by weight bytes; layers without a role are under ``other``."""
        groups: dict[str, list[LayerSparsity]] = {}
        for layer in self.layers:
            groups.setdefault("+".join(layer.roles) or "other", []).append(layer)
        return {role: _weighted(group) for role, group in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the report into what JSON can hold.

        :return: Totals, roles and layers.
        """
        return {
            "sparsity": self.sparsity,
            "weight_reads_skipped": self.weight_reads_skipped,
            "tokens": self.tokens,
            "by_role": self.by_role,
            "by_layer": {x.name: {"target": x.target_sparsity, "sparsity": x.sparsity} for x in self.layers},
        }


class SparsityCounter:
    """
    Count zeros behind a model's masks.

    :param model: The masked model, which is the one to run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._zeros: dict[str, int] = {}
        self._entries: dict[str, int] = {}
        self._is_paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """
        Count nothing for a while.

        :return: A context in which the model runs uncounted.
        """
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """
        Count while the model runs.

        :return: A context in which that happens.
        """
        with ExitStack() as stack:
            for name, sparsifier in named_sparsifiers(self.model):
                stack.enter_context(record_calls(sparsifier, partial(self._count, name, sparsifier)))
            yield

    def _count(self, name: str, sparsifier: ActivationSparsifier, args: Any, _kwargs: Any, output: Any) -> None:
        if self._is_paused:
            return
        self._zeros[name] = self._zeros.get(name, 0) + sparsifier.count_zeros(args[0], output)
        self._entries[name] = self._entries.get(name, 0) + output.numel()

    def report(self) -> SparsityReport:
        """
        Sum up what was counted.

        :return: The measured sparsity.
        :raises ActsparseError: If a masked layer was never run.
        """
        sparsifiers = dict(named_sparsifiers(self.model))
        counts = torch.tensor([[x.get(name, 0) for name in sparsifiers] for x in (self._zeros, self._entries)])
        distributed.add_up(counts)
        zeros, entries = (dict(zip(sparsifiers, x, strict=True)) for x in counts.tolist())
        missing = next((name for name in sparsifiers if not entries[name]), None)
        if missing is not None:
            msg = f"the sparsity of layer {missing} cannot be measured: no data went through it"
            raise ActsparseError(msg)
        extra = self._extra_reads(sparsifiers)
        layers = [
            LayerSparsity(
                name,
                s.site,
                s.roles,
                s.target_sparsity,
                zeros[name] / entries[name] - extra[s.site],
                weight_bytes(self.model.get_submodule(name)),
            )
            for name, s in sparsifiers.items()
        ]
        total = sum(weight_bytes(module) for _, module in named_linears(self.model))
        tokens = "+".join(sorted({s.tokens for s in sparsifiers.values()}))
        return SparsityReport(tuple(layers), total, tokens)

    def _extra_reads(self, sparsifiers: dict[str, ActivationSparsifier]) -> dict[str, float]:
        """Tell by site what its low-rank part reads, as a share of its weights."""
        sites: dict[str, list[str]] = {}
        for name, sparsifier in sparsifiers.items():
            sites.setdefault(sparsifier.site, []).append(name)
        reads = {}
        for site, names in sites.items():
            modules = [self.model.get_submodule(name) for name in names]
            outputs, size = sum(map(out_features, modules)), sum(map(weight_bytes, modules))
            reads[site] = sparsifiers[names[0]].stand_in.reads(in_features(modules[0]), outputs, size)
        return reads


@contextmanager
def count_zeros(model: Any) -> Iterator[Any]:
    """
    Count zeros behind a model's masks while it runs, for example inside `word_perplexity`.

    :param model: The masked model, of torch or OpenVINO.
    :return: A context with the counter. What runs is its `model`; ask it for its report afterwards.
    """
    if (openvino_model := find_openvino_model(model)) is not None:
        from actsparse.openvino.sparsity import OpenVinoSparsityCounter

        yield OpenVinoSparsityCounter(openvino_model, getattr(model, "config", None))
        return
    counter = SparsityCounter(model)
    with counter.watch():
        yield counter


def measure_sparsity(model: Any, dataset: Iterable[Any]) -> SparsityReport:
    """
    Measure a masked model's sparsity on data.

    :param model: The masked torch module, `openvino.Model` or optimum-intel model.
    :param dataset: Model inputs, as for `sparsify_activations`.
    :return: The share of zeros by layer and role, and the share of weight reads that they make unnecessary.
    :raises ActsparseError: If the model has no masks.
    :raises DatasetError: If the dataset is empty or does not fit the model.
    """
    if not has_masks(model):
        msg = "the model has no activation sparsifiers to measure"
        raise ActsparseError(msg)
    batches = CalibrationBatches(dataset)
    with count_zeros(model) as counter:
        if isinstance(counter, SparsityCounter):
            run_batches(model, batches.share(), total=batches.share_length, description="measuring sparsity")
        else:
            run_each(counter.run, batches.share(), total=batches.share_length, description="measuring sparsity")
    return counter.report()


def has_masks(model: Any) -> bool:
    """
    Tell whether a model masks anything.

    :param model: A model of torch or OpenVINO.
    :return: Whether a mask of it is active.
    """
    if (openvino_model := find_openvino_model(model)) is not None:
        from actsparse.openvino.masks import count_masks

        return count_masks(openvino_model) > 0
    return any(sparsifier.is_active for _, sparsifier in named_sparsifiers(model))


def _weighted(layers: Iterable[LayerSparsity]) -> float:
    layers = list(layers)
    return sum(x.sparsity * x.weight_bytes for x in layers) / max(sum(x.weight_bytes for x in layers), 1)
