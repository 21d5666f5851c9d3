"""What an algorithm has to be."""

from typing import Protocol

import torch


class ThresholdEstimator(Protocol):
    """
    Estimate the thresholds of one site from its calibration activations.

    :param targets: The target sparsities of the site's layers, each in (0, 1].
    """

    def __init__(self, targets: tuple[float, ...]) -> None: ...

    def update(self, x: torch.Tensor) -> None:
        """
        Take in the activations of one batch.

        :param x: The site's input, [..., tokens, in_features].
        :raises ValueError: If an entry is NaN or infinite.
        """
        ...

    def mask_batch(self, x: torch.Tensor, target: float) -> torch.Tensor:
        """
        Mask the batch just taken in, as what the layers behind this site shall be calibrated on.

        :param x: The site's input, [..., tokens, in_features].
        :param target: The target sparsity of the layer that reads it.
        """
        ...

    def sums(self) -> list[torch.Tensor]:
        """
        Give what is added up where several processes calibrate, each on a share of the data.

        :return: The tensors themselves; none for an estimator whose result depends on the order of the data.
        """
        ...

    def threshold(self, target: float) -> torch.Tensor:
        """
        Give the estimate.

        :return: The threshold, 0-d or [in_features].
        """
        ...
