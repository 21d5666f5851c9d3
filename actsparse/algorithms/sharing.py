"""One threshold for everything: how a budget of weight bytes is shared at the least cost."""

from collections.abc import Callable, Mapping, Sequence

from actsparse.algorithms.parts import Part, Scopes
from actsparse.statistics import MagnitudeSketch

# Thresholds are found to one part in 2^60 of their range.
BISECTIONS = 60


def share_budget(
    scopes: Scopes, sketches: Mapping[str, MagnitudeSketch], worth: Mapping[Part, float] | None = None
) -> dict[str, float]:
    """
    Leave out the entries whose score per weight byte is the smallest.

    If leaving x_j out costs ½ (a_j x_j)² and saves as many bytes as the channel's weights have, the cheapest way to
    save bytes is one threshold for a_j |x_j| / √cost.

    :param scopes: Target sparsity and parts of each scope.
    :param sketches: The scores of each site.
    :param worth: What the scores of a part are to be multiplied by to compare with those of others; 1 if left out.
    :return: The sparsity of each layer; each scope meets its target by weight bytes.
    """
    sparsity: dict[str, float] = {}
    for target, parts in scopes:
        scale = {part: part.cost**0.5 / (worth[part] if worth else 1.0) for part in parts}
        highest = max(sketches[part.site].quantile(1.0) / scale[part] for part in parts)

        def share(threshold: float, part: Part, scale: Mapping[Part, float] = scale) -> float:
            return sketches[part.site].share(threshold * scale[part])

        sparsity |= bisect_shares(parts, target, share, highest)
    return sparsity


def bisect_shares(
    parts: Sequence[Part], target: float, share: Callable[[float, Part], float], highest: float
) -> dict[str, float]:
    """
    Find the one number from which the shares of all parts follow.

    :param parts: The parts of one scope.
    :param target: What they are to reach by weight bytes.
    :param share: The sparsity of a part, growing with the number.
    :param highest: A number at which nothing is kept.
    :return: The sparsity of each layer.
    """
    low, high = 0.0, highest
    total = sum(part.weight_bytes for part in parts)

    def shares(number: float) -> dict[Part, float]:
        own = {part: share(number, part) for part in parts}
        rows = {part.site: own[part] for part in parts if part.is_of_rows}
        # What masked rows leave out is zero further on, too.
        return {part: max(own[part], rows.get(part.behind, 0.0)) for part in parts}

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        saved = sum(part.weight_bytes * found for part, found in shares(middle).items())
        low, high = (middle, high) if saved < target * total else (low, middle)
    return {name: found for part, found in shares(high).items() for name in part.layers}
