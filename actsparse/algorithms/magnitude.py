"""`magnitude`: the quantile of |x| over all calibration tokens, independent of their order and batching."""

import torch

from actsparse.sparsifier import mask_small
from actsparse.statistics import MagnitudeSketch


class PooledQuantile:
    """
    Estimate the pooled quantile of a site's magnitudes.

    While it calibrates, each sequence is masked at its own quantile. Layers further down then see what they will see in
    the masked model, where inputs are smaller than in the dense one (at 50% up to 13 points of sparsity lie between the
    two), and yet no sequence's share of the result depends on what came before it or stands beside it.

    :param targets: The target sparsities of the site's layers.
    """

    def __init__(self, targets: tuple[float, ...]) -> None:
        self._pooled = MagnitudeSketch()
        self._targets = targets
        self._sequence_thresholds: dict[float, list[torch.Tensor]] = {}

    def update(self, x: torch.Tensor) -> None:
        """
        Count the magnitudes of one batch, sequence by sequence.

        :param x: The site's input: [sequences, tokens, in_features], or [tokens, in_features] for one sequence.
        :raises ValueError: If an entry is NaN or infinite.
        """
        sketches = [MagnitudeSketch.of(sequence) for sequence in _sequences(x)]
        for sketch in sketches:
            self._pooled.merge(sketch)
        self._sequence_thresholds = {t: [torch.tensor(s.quantile(t)) for s in sketches] for t in self._targets}

    def mask_batch(self, x: torch.Tensor, target: float) -> torch.Tensor:
        """
        Mask each sequence of the batch just counted at its own quantile.

        :param x: The site's input.
        :param target: The target sparsity.
        :return: The masked input.
        """
        thresholds = self._sequence_thresholds[target]
        if len(thresholds) == 1:
            return mask_small(x, thresholds[0])
        masked = [mask_small(sequence, t) for sequence, t in zip(_sequences(x), thresholds, strict=True)]
        return torch.stack(masked).reshape(x.shape)

    def threshold(self, target: float) -> torch.Tensor:
        """
        Give the pooled quantile.

        :param target: The target sparsity.
        :return: The threshold, 0-d.
        """
        return torch.tensor(self._pooled.quantile(target))


def _sequences(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -3) if x.ndim > 2 else x.unsqueeze(0)
