"""What the entries of a tensor crowd around."""

import numpy as np
import torch
from scipy.stats import gaussian_kde

from actsparse.calibration import require_seen
from actsparse.torch.measurements.probe import Probe

# Of each site so many entries are looked at, and the density at so many points between these percentiles: a few entries
# of language models are a thousand times as large as the rest, and would be most of a kernel's width.
ENTRIES = 8192
POINTS = 512
PERCENTILES = (1.0, 99.0)


def measure_centres(probe: Probe) -> dict[str, tuple[float, float]]:
    """
    Run forwards and look at some of the entries of what each site's layers read.

    :return: Their median, and the mode of their density, on the first `PROBE_TOKENS` tokens.
    :raises DatasetError: If no data went through a site.
    """
    batches = probe.first_batches
    taken: dict[str, list[np.ndarray]] = {}

    def take(name: str, x: torch.Tensor) -> torch.Tensor:
        if name in probe.sites:
            entries = x.detach().flatten()
            step = max(1, entries.numel() * len(batches) // ENTRIES)
            # An odd stride meets every channel of a tensor whose width is even.
            taken.setdefault(name, []).append(entries[:: step | 1].double().cpu().numpy())
        return x

    with probe.watch(take):
        probe.run(batches, "looking for centres")
    require_seen(probe.sites, taken)
    return {name: find_centres(np.concatenate(parts)) for name, parts in taken.items()}


def find_centres(entries: np.ndarray) -> tuple[float, float]:
    """
    Find what numbers crowd around.

    :return: Their median, and the mode of a Gaussian kernel density estimate with Scott's width.
    """
    low, high = np.percentile(entries, PERCENTILES)
    inner = entries[(entries >= low) & (entries <= high)]
    median = float(np.median(entries))
    if not low < high or inner.std() == 0:
        return median, median
    points = np.linspace(low, high, POINTS)
    return median, float(points[np.argmax(gaussian_kde(inner)(points))])
