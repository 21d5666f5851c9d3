"""Measured sparsity: the share of zeros that masked layers really see, layer by layer and by weight bytes."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from actsparse.errors import ActsparseError
from actsparse.mask import Mask
from actsparse.runtime import distributed
from actsparse.scopes import LayerSize


@dataclass(frozen=True)
class LayerSparsity:
    """
    What one masked layer saw.

    :param target_sparsity: The share of zeros asked for; None where an OpenVINO model converted by others does not say.
    :param allocated_sparsity: The share that the allocation gave the layer; likewise.
    :param sparsity: The share of zeros measured, less what a low-rank compensation for them reads, as a share of the
        weights.
    """

    name: str
    site: str
    roles: tuple[str, ...]
    target_sparsity: float | None
    allocated_sparsity: float | None
    sparsity: float
    weight_bytes: float


@dataclass(frozen=True)
class SparsityReport:
    """
    Measured sparsity of a model on some data.

    :param layers: The masked layers, in the model's order.
    :param linear_bytes: Size of the weights of all the model's Linear layers, masked or not.
    :param tokens: Which tokens are masked: ``all``, ``decode``, or both joined.
    """

    layers: tuple[LayerSparsity, ...]
    linear_bytes: float
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
        layers = {
            x.name: {"target": x.target_sparsity, "allocated": x.allocated_sparsity, "sparsity": x.sparsity}
            for x in self.layers
        }
        return {
            "sparsity": self.sparsity,
            "weight_reads_skipped": self.weight_reads_skipped,
            "tokens": self.tokens,
            "by_role": self.by_role,
            "by_layer": layers,
        }


class ZeroCounter:
    """
    Count zeros behind a model's masks while it runs: what every backend's counter shares.

    :param model: What is to be run while it counts.
    :param masks: The masks at work, by layer.
    """

    def __init__(self, model: Any, masks: Mapping[str, Mask], sizes: Mapping[str, LayerSize]) -> None:
        self.model = model
        self._masks = masks
        self._sizes = sizes
        self._zeros = dict.fromkeys(masks, 0)
        self._entries = dict.fromkeys(masks, 0)
        self._is_paused = False

    @property
    def has_masks(self) -> bool:
        """Whether there is anything to count."""
        return bool(self._masks)

    def run_batches(self, batches: Iterable[Any], *, total: int | None, description: str) -> int:
        """
        Run every batch, and count.

        :param total: How many, where it is known.
        :raises DatasetError: If the model cannot take a batch; names the batch.
        """
        raise NotImplementedError

    def add(self, layer: str, zeros: int, entries: int) -> None:
        """Take in what a layer has read, unless the counter is paused."""
        if not self._is_paused:
            self._zeros[layer] += zeros
            self._entries[layer] += entries

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

    def report(self) -> SparsityReport:
        """
        Sum up what was counted, in all processes.

        :raises ActsparseError: If a masked layer was never run.
        """
        counts = torch.tensor([[counted[name] for name in self._masks] for counted in (self._zeros, self._entries)])
        distributed.add_up(counts)
        zeros, entries = (dict(zip(self._masks, row, strict=True)) for row in counts.tolist())
        missing = next((name for name in self._masks if not entries[name]), None)
        if missing is not None:
            msg = f"the sparsity of layer {missing} cannot be measured: no data went through it"
            raise ActsparseError(msg)
        reads = self._compensation_reads()
        layers = [
            LayerSparsity(
                name,
                mask.site or name,
                mask.roles,
                mask.target_sparsity,
                mask.allocation,
                zeros[name] / entries[name] - reads[name],
                self._sizes[name].weight_bytes,
            )
            for name, mask in self._masks.items()
        ]
        total = sum(size.weight_bytes for size in self._sizes.values())
        return SparsityReport(tuple(layers), total, "+".join(sorted({mask.tokens for mask in self._masks.values()})))

    def _compensation_reads(self) -> dict[str, float]:
        """Tell by layer what its site's low-rank compensation reads, as a share of the site's weights."""
        sites: dict[str, list[str]] = {}
        for name, mask in self._masks.items():
            sites.setdefault(mask.site or name, []).append(name)
        reads = {}
        for names in sites.values():
            sizes = [self._sizes[name] for name in names]
            outputs, weight_bytes = sum(size.outputs for size in sizes), sum(size.weight_bytes for size in sizes)
            share = self._masks[names[0]].compensation.reads(sizes[0].channels, outputs, weight_bytes)
            reads |= dict.fromkeys(names, share)
        return reads


def _weighted(layers: Iterable[LayerSparsity]) -> float:
    layers = list(layers)
    return sum(x.sparsity * x.weight_bytes for x in layers) / max(sum(x.weight_bytes for x in layers), 1)
