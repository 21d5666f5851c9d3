"""R-Sparse (arXiv 2504.19449): what is left out goes through a low-rank part of the weights."""

from collections.abc import Mapping

from actsparse.algorithms.groups import LayerGroup
from actsparse.algorithms.measurements import Measurements
from actsparse.mask import Compensation, reads_of_rank

# How much of what is read may go to the low-rank part: its sizes to try, as shares of the weights.
SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8)


def low_ranks(model: Measurements, sites: Mapping[str, list[LayerGroup]]) -> dict[str, list[Compensation]]:
    """
    Propose truncated singular value decompositions of the weights, for W x = W x_kept + U V x_dropped.

    The larger one is, the more entries have to be left out for the same number of reads. Where R-Sparse searches by
    evolution how to split each layer's budget, the size with the least output error is taken.

    :param sites: The layers that read each tensor.
    :return: The compensations to try for each site.
    """
    ranks = {site: found for site, groups in sites.items() if (found := _ranks(groups))}
    vectors = model.right_vectors({site: found[-1] for site, found in ranks.items()})
    return {
        site: [Compensation(basis=vectors[site][:, :rank].contiguous()) for rank in ranks.get(site, [])]
        for site in sites
    }


def _ranks(groups: list[LayerGroup]) -> list[int]:
    inputs, outputs = groups[0].channels, sum(group.outputs for group in groups)
    of_one = reads_of_rank(1, inputs, outputs, sum(group.weight_bytes for group in groups))
    return sorted({min(int(share / of_one), inputs, outputs) for share in SHARES} - {0})
