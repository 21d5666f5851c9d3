"""A constant-size, mergeable sketch of the distribution of magnitudes."""

import struct

import numpy as np
import torch

MANTISSA_BITS = 9
LOWEST_EXPONENT = -96
HIGHEST_EXPONENT = 32
NUM_BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) << MANTISSA_BITS
_SHIFT = 23 - MANTISSA_BITS
_LARGEST = torch.finfo(torch.float32).max
_OFFSET = (127 + LOWEST_EXPONENT) << MANTISSA_BITS


class MagnitudeSketch:
    """
    Count magnitudes by the top bits of their float32 representation.

    Dropping the sign and keeping the exponent and nine bits of the mantissa gives bins of relative width 2⁻⁹ or less,
    in 512 kB whatever the amount of data. Counts are integers: the sketch of two parts, merged, is the sketch of the
    whole, in any order. The lowest bin holds everything below 2⁻⁹⁶, zeros above all; the highest everything from 2³²
    on.

    :param counts: Counts to start from, [NUM_BINS]; none if left out.
    """

    def __init__(self, counts: torch.Tensor | None = None) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64) if counts is None else counts
        self._cumulative: tuple[int, np.ndarray] | None = None

    @classmethod
    def of(cls, x: torch.Tensor) -> "MagnitudeSketch":
        """
        Count the entries of a tensor.

        :raises ValueError: If an entry is NaN or infinite.
        """
        bits = x.detach().reshape(-1).abs().to(torch.float32).view(torch.int32)
        bins = (bits >> _SHIFT).sub_(_OFFSET).clamp_(0, NUM_BINS - 1)
        counts = torch.bincount(bins, minlength=NUM_BINS).cpu()
        # NaN and infinity have the highest exponent there is, so they can only be in the last bin.
        if counts[-1] and not torch.isfinite(x).all():
            msg = "NaN or infinite entries"
            raise ValueError(msg)
        return cls(counts)

    def merge(self, other: "MagnitudeSketch") -> None:
        """Add what another sketch has counted."""
        self.counts += other.counts

    def quantile(self, q: float) -> float:
        """
        Find the threshold that a share of the magnitudes does not exceed.

        Inside a bin, magnitudes are taken as evenly spread.

        :param q: The share, in [0, 1].
        :return: The threshold; 0.0 where the share lies in the bin of zeros.
        :raises ValueError: If nothing was counted.
        """
        cumulative, total = self._cumulate()
        # Ranks are whole, so the bin that holds the rank is the one that holds the next whole number.
        rank = q * total
        index = int(cumulative.searchsorted(min(max(int(-(-rank // 1)), 1), total)))
        if index == 0:
            return 0.0
        before = int(cumulative[index - 1])
        share = (rank - before) / (int(cumulative[index]) - before)
        low, high = _edge(index), _edge(index + 1)
        return low + (high - low) * min(max(share, 0.0), 1.0)

    def share(self, threshold: float) -> float:
        """
        Find the share of the magnitudes that does not exceed a threshold: the inverse of `quantile`.

        :return: The share, in [0, 1].
        :raises ValueError: If nothing was counted.
        """
        cumulative, total = self._cumulate()
        bits = struct.unpack("i", struct.pack("f", min(threshold, _LARGEST)))[0]
        index = min(max((bits >> _SHIFT) - _OFFSET, 0), NUM_BINS - 1)
        if index == 0:
            return int(cumulative[0]) / total
        low, high = _edge(index), _edge(index + 1)
        inside = min((threshold - low) / (high - low), 1.0)
        before = int(cumulative[index - 1])
        return (before + inside * (int(cumulative[index]) - before)) / total

    def tail(self, share: float) -> float:
        """
        Find the threshold up to which magnitudes hold a share of the sum of all squares.

        :param share: The share, in [0, 1].
        :return: The upper end of the bin in which it is reached.
        :raises ValueError: If nothing was counted.
        """
        self._cumulate()
        bins = torch.arange(NUM_BINS)
        exponents, mantissas = bins >> MANTISSA_BITS, bins & ((1 << MANTISSA_BITS) - 1)
        middles = (exponents + LOWEST_EXPONENT).double().exp2() * (1 + (mantissas + 0.5) / (1 << MANTISSA_BITS))
        # The lowest bin holds zeros above all.
        energies = self.counts * middles.square() * (bins > 0)
        cumulative = energies.cumsum(0)
        index = int(torch.searchsorted(cumulative, share * cumulative[-1])) if cumulative[-1] > 0 else 0
        return 0.0 if index == 0 else _edge(min(index, NUM_BINS - 1) + 1)

    def _cumulate(self) -> tuple[np.ndarray, int]:
        # Asked for many thousand times while budgets are shared, of counts that do not change any more.
        version = self.counts._version
        if self._cumulative is None or self._cumulative[0] != version:
            self._cumulative = (version, self.counts.cumsum(0).numpy())
        cumulative = self._cumulative[1]
        total = int(cumulative[-1])
        if total == 0:
            msg = "no activations were counted"
            raise ValueError(msg)
        return cumulative, total


def _edge(index: int) -> float:
    exponent, mantissa = divmod(index, 1 << MANTISSA_BITS)
    return 2.0 ** (exponent + LOWEST_EXPONENT) * (1 + mantissa / (1 << MANTISSA_BITS))
