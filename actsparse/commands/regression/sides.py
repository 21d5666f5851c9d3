"""What is measured of a case before its figures are worked out."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actsparse.sparsity_report import SparsityReport


@dataclass(frozen=True)
class Sides:
    """
    A model without masks and with them, on the same windows of text.

    :param tokens: How many tokens of each window are scored, [windows].
    :param losses: Sums of their negative log-likelihoods in nats by side: dense, sparse, and NNCF's; [windows].
    :param sparsity: Measured on the text behind our masks.
    :param forward_seconds: The bare forward passes over the calibration batches.
    :param calibration_seconds: Our call on them.
    :param nncf_sparsity: Measured on the text behind NNCF's masks, by weight bytes.
    :param nncf_seconds: NNCF's call.
    :param decode_ratio: How many times as fast as dense the sparse model decodes.
    :param details: What else is worth keeping.
    """

    tokens: np.ndarray
    losses: dict[str, np.ndarray]
    sparsity: SparsityReport
    forward_seconds: float
    calibration_seconds: float
    nncf_sparsity: float | None = None
    nncf_seconds: float | None = None
    decode_ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
