"""SCAP (arXiv 2412.07174): mask what is close to the value that a tensor's entries crowd around, and put that there."""

from collections.abc import Mapping

import torch

from actsparse.algorithms.groups import LayerGroup
from actsparse.algorithms.measurements import Measurements
from actsparse.mask import Compensation


def shifts(model: Measurements, sites: Mapping[str, list[LayerGroup]]) -> dict[str, list[Compensation]]:
    """
    Propose what entries may crowd around besides 0: their median, and the mode of their density.

    W x = W (x - m) + W m, of which the last is a constant: with a shift there is no more to read.

    :param sites: The layers that read each tensor.
    :return: The compensations to try for each site.
    """
    centres = model.centres()
    return {site: [Compensation(shift=torch.tensor(centre)) for centre in centres[site]] for site in sites}
