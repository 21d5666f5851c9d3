"""The quantile of a site's scores over all calibration tokens, independent of their order and batching."""

import torch

from actsparse.algorithms.statistics import MagnitudeSketch
from actsparse.mask import LARGEST, mask_small

# Entries of a sequence from which on a sample of them tells its quantile to a quarter of a point.
LARGE_SEQUENCE = 1 << 16


class PooledQuantile:
    """
    Estimate the pooled quantile of a site's scores a_j |x_j|.

    While it calibrates, each sequence is masked at its own quantile. Layers further down then see what they will see in
    the masked model, where inputs are smaller than in the dense one (at 50% up to 13 points of sparsity lie between the
    two), and yet no sequence's share of the result depends on what came before it or stands beside it.

    :param importance: a, 0-d or [in_features]; positive somewhere, nowhere negative. None is 1 everywhere.
    :param stride: Of a large sequence every `stride`-th entry is counted: for trials, which need no better quantile.
    """

    def __init__(self, targets: tuple[float, ...], importance: torch.Tensor | None = None, *, stride: int = 1) -> None:
        self._pooled = MagnitudeSketch()
        self._targets = targets
        # A number common to all channels changes no order.
        self._importance = importance if importance is not None and importance.ndim else None
        self._stride = stride
        self._sequence_quantiles: dict[float, list[float]] = {}

    def update(self, x: torch.Tensor) -> None:
        """
        Count the scores of one batch, sequence by sequence.

        :param x: The site's input: [sequences, tokens, in_features], or [tokens, in_features] for one sequence.
        :raises ValueError: If an entry is NaN or infinite.
        """
        sketches = [MagnitudeSketch.of(self._sample(self._score(sequence))) for sequence in _sequences(x)]
        for sketch in sketches:
            self._pooled.merge(sketch)
        self._sequence_quantiles = {t: [s.quantile(t) for s in sketches] for t in self._targets}

    def mask_batch(self, x: torch.Tensor, target: float) -> torch.Tensor:
        """Mask each sequence of the batch just counted at its own quantile."""
        thresholds = [self._as_threshold(q).to(x.device) for q in self._sequence_quantiles[target]]
        if len(thresholds) == 1:
            return mask_small(x, thresholds[0])
        masked = [mask_small(sequence, t) for sequence, t in zip(_sequences(x), thresholds, strict=True)]
        return torch.stack(masked).reshape(x.shape)

    def sums(self) -> list[torch.Tensor]:
        """Give what is added up over processes."""
        return [self._pooled.counts]

    def threshold(self, target: float) -> torch.Tensor:
        """
        Give the pooled quantile, as a threshold for |x|.

        :return: The threshold, 0-d, or [in_features] where channels differ in importance.
        """
        return self._as_threshold(self._pooled.quantile(target))

    def _score(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._importance is None else x.detach().float() * self._importance.to(x.device)

    def _sample(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if scores.numel() < LARGE_SEQUENCE else scores.flatten()[:: self._stride]

    def _as_threshold(self, quantile: float) -> torch.Tensor:
        if self._importance is None:
            return torch.tensor(quantile)
        # A channel of no importance is never kept, whatever the quantile is.
        return torch.where(self._importance > 0, quantile / self._importance, torch.inf).clamp(max=LARGEST)


def _sequences(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)
