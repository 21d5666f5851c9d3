"""`nncf`: NNCF's rule, a moving average of each batch's quantile with the masks on; kept for parity."""

import torch

from actsparse.mask import mask_small

ALPHA = 0.2


class NncfMovingAverage:
    """
    Estimate thresholds as `nncf.experimental.torch.sparsify_activations` does.

    Each batch's quantile of |x| enters a debiased exponential moving average. The result depends on the order of the
    batches and on their size.
    """

    def __init__(self, targets: tuple[float, ...]) -> None:
        self._thresholds: dict[float, torch.Tensor] = dict.fromkeys(targets, torch.tensor(-torch.inf))
        self._num_batches = 0

    def update(self, x: torch.Tensor) -> None:
        """
        Move the averages towards the quantiles of one batch.

        :param x: The site's input, [..., tokens, in_features].
        :raises ValueError: If an entry is NaN or infinite.
        """
        magnitudes = x.detach().abs().reshape(-1)
        if not torch.isfinite(magnitudes).all():
            msg = "NaN or infinite entries"
            raise ValueError(msg)
        beta = 1.0 - ALPHA
        # NNCF counts batches in a tensor, so these powers are float32; the last bit of the result depends on it.
        decay, next_decay = beta ** torch.tensor(self._num_batches), beta ** torch.tensor(self._num_batches + 1)
        for target, old in self._thresholds.items():
            new = _quantile(magnitudes, target)
            if self._num_batches > 0:
                new = (new * ALPHA + old.to(torch.float64) * beta * (1 - decay)) / (1 - next_decay)
            # NNCF stores the average in the activations' own type, so later batches see it rounded.
            self._thresholds[target] = new.to(x.dtype)
        self._num_batches += 1

    def mask_batch(self, x: torch.Tensor, target: float) -> torch.Tensor:
        """Mask the batch at the average so far."""
        return mask_small(x, self._thresholds[target])

    def sums(self) -> list[torch.Tensor]:
        """
        Give what is added up over processes.

        :return: Nothing: an average of batch after batch has no parts.
        """
        return []

    def threshold(self, target: float) -> torch.Tensor:
        """
        Give the present average.

        :return: The threshold, 0-d.
        """
        return self._thresholds[target]


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """Compute the linearly interpolated quantile that `torch.quantile` gives for float64, without sorting."""
    rank = q * (values.numel() - 1)
    low = int(rank)
    lower = values.kthvalue(low + 1).values.to(torch.float64)
    if low + 1 == values.numel() or rank == low:
        return lower
    above = torch.where(values > lower.to(values.dtype), values, torch.inf).min().to(torch.float64)
    ties = int((values <= lower.to(values.dtype)).sum()) > low + 1
    return lower if ties else torch.lerp(lower, above, rank - low)
