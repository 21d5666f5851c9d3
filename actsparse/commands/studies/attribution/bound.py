"""
What GxO may miss: the paper's bound against what really happens when a unit is switched off.

To first order the loss grows by -g·o without the unit. What that misses is bounded by ‖o‖ ‖g‖, ‖g‖ over the whole layer
(arXiv 2406.06562): corrected GxO adds the half of it, the middle of 0 and the bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from actsparse.commands.studies.attribution.decoding import Decoding
from actsparse.commands.studies.attribution.metrics import INTEGRATED, METRICS
from actsparse.commands.studies.attribution.recording import see_outputs
from actsparse.commands.studies.units import UnitLayer
from actsparse.runtime.progress import progress_bar
from actsparse.torch.measurements.probe import without_parameter_gradients
from actsparse.torch.running import evaluation_mode


@dataclass(frozen=True)
class Drops:
    """
    Units switched off one at a time, all of one kind.

    :param true: What the loss of the token grew by, nats, [units].
    :param first_order: -g·o, [units].
    :param bound: ‖o‖ ‖g‖, [units].
    :param ranks: Spearman's correlation of each metric with `true`, mean over layers and tokens.
    """

    true: np.ndarray
    first_order: np.ndarray
    bound: np.ndarray
    ranks: dict[str, float]

    @property
    def missed(self) -> np.ndarray:
        """What GxO misses beside the bound; the paper's claim is that it is between 0 and 1."""
        return (self.true - self.first_order) / np.maximum(self.bound, 1e-30)

    def to_dict(self) -> dict[str, Any]:
        """Sum up."""
        missed = self.missed
        quantiles = np.quantile(missed, [0.01, 0.25, 0.5, 0.75, 0.99])
        return {
            "drops": len(missed),
            "within_bound": float((np.abs(missed) <= 1).mean()),
            "between_0_and_bound": float(((missed >= 0) & (missed <= 1)).mean()),
            "missed_over_bound_quantiles_1_25_50_75_99": [float(q) for q in quantiles],
            "rank_correlation": self.ranks,
        }


def drop_units(
    model: Any,
    layers: Mapping[str, UnitLayer],
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    sample: int = 32,
    seed: int = 0,
) -> dict[str, Drops]:
    """Switch off units one at a time and compare the loss of the token about to be generated."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[tuple[np.ndarray, ...]]] = {layer.kind: [] for layer in layers.values()}
    ranks: dict[str, list[dict[str, float]]] = {kind: [] for kind in found}
    bar = progress_bar("switching units off", total=tokens * len(layers), unit="layers")
    with bar as advance, evaluation_mode(model), without_parameter_gradients(model):
        decoding = Decoding.begin(model, list(layers), prompts)
        for _ in range(tokens):
            before = decoding.repeat(1)
            loss, logits, outputs, decoding = see_outputs(decoding)
            labels = logits.detach().argmax(-1)
            dense = F.cross_entropy(logits.detach(), labels, reduction="none").double()
            gradients = torch.autograd.grad(loss(labels), list(outputs.values()))
            for (name, output), gradient in zip(outputs.items(), gradients, strict=True):
                layer = layers[name]
                o, g = layer.split(output.detach()[:, 0]), layer.split(gradient[:, 0])
                chosen = torch.randperm(layer.count, generator=generator)[:sample].to(labels.device)
                true = _losses_without(before, layer, chosen, labels) - dense[:, None]
                first_order = -(g * o).sum(-1)[:, chosen]
                bound = (o.norm(dim=-1) * g.flatten(1).norm(dim=-1)[:, None])[:, chosen]
                found[layer.kind].append(tuple(x.double().cpu().numpy().ravel() for x in (true, first_order, bound)))
                ranks[layer.kind] += [
                    _rank(text, o[i, chosen], g[i, chosen]) for i, text in enumerate(true.cpu().numpy())
                ]
                advance(1)
            decoding = decoding.go_on(labels)
    joined = {kind: [np.concatenate(parts) for parts in zip(*rows, strict=True)] for kind, rows in found.items()}
    return {kind: Drops(true, first, bound, _mean(ranks[kind])) for kind, (true, first, bound) in joined.items()}


def _losses_without(before: Decoding, layer: UnitLayer, chosen: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the loss of each text's next token without each unit, [texts, units]."""
    copies = before.repeat(len(chosen))
    keep = torch.ones(len(chosen), layer.count, device=labels.device)
    keep[torch.arange(len(chosen)), chosen] = 0
    keep = layer.spread(keep).repeat(len(labels), 1)[:, None]
    with torch.no_grad():
        logits, _ = copies.step(lambda name, x: x * keep if name == layer.name else x)
    losses = F.cross_entropy(logits, labels.repeat_interleave(len(chosen)), reduction="none")
    return losses.double().unflatten(0, (len(labels), len(chosen)))


def _rank(true: np.ndarray, o: torch.Tensor, g: torch.Tensor) -> dict[str, float]:
    metrics = {name: metric for name, metric in METRICS.items() if name != INTEGRATED}
    return {name: float(spearmanr(true, metric(o, g).cpu().numpy())[0]) for name, metric in metrics.items()}  # type: ignore[arg-type]


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.nanmean([row[name] for row in rows])) for name in rows[0]}
