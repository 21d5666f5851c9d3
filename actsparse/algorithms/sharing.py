"""One threshold for everything: how a budget of weight bytes is shared at the least cost."""

from collections.abc import Callable, Mapping, Sequence

from actsparse.algorithms.groups import LayerGroup, Scopes
from actsparse.algorithms.statistics import MagnitudeSketch

# Thresholds are found to one part in 2^60 of their range.
BISECTIONS = 60


def share_budget(
    scopes: Scopes, sketches: Mapping[str, MagnitudeSketch], weights: Mapping[LayerGroup, float] | None = None
) -> dict[str, float]:
    """
    Leave out the entries whose score per weight byte is the smallest.

    If leaving x_j out costs ½ (a_j x_j)² and saves as many bytes as the channel's weights have, the cheapest way to
    save bytes is one threshold for a_j |x_j| / √cost.

    :param weights: What the scores of a group are to be multiplied by to compare with those of others; 1 if left out.
    :return: The sparsity of each layer; each scope meets its target by weight bytes.
    """
    sparsity: dict[str, float] = {}
    for target, groups in scopes:
        scored = [(sketches[group.site], group.cost**0.5 / (weights[group] if weights else 1.0)) for group in groups]
        highest = max(sketch.quantile(1.0) / scale for sketch, scale in scored)

        def shares(threshold: float, scored: list[tuple[MagnitudeSketch, float]] = scored) -> list[float]:
            return [sketch.share(threshold * scale) for sketch, scale in scored]

        sparsity |= bisect_shares(groups, target, shares, highest)
    return sparsity


def bisect_shares(
    groups: Sequence[LayerGroup], target: float, shares: Callable[[float], Sequence[float]], highest: float
) -> dict[str, float]:
    """
    Find the one number from which the shares of all groups follow.

    :param target: What they are to reach by weight bytes.
    :param shares: The sparsity of each group, growing with the number.
    """
    low, high = 0.0, highest
    sizes = [group.weight_bytes for group in groups]
    wanted = target * sum(sizes)
    rows = {group.site: number for number, group in enumerate(groups) if group.is_of_rows}
    behind = [(number, rows[group.behind]) for number, group in enumerate(groups) if group.behind in rows]

    def share(number: float) -> list[float]:
        found = list(shares(number))
        for masked, before in behind:
            # What masked rows leave out is zero further on, too.
            found[masked] = max(found[masked], found[before])
        return found

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        saved = sum(size * found for size, found in zip(sizes, share(middle), strict=True))
        low, high = (middle, high) if saved < wanted else (low, middle)
    return {name: found for group, found in zip(groups, share(high), strict=True) for name in group.layers}
