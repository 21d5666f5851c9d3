"""The perplexity gate: whether what masks cost is little enough to deploy them."""

import math
from dataclasses import dataclass
from typing import Any

from actsparse.console.report import Row
from actsparse.errors import ActsparseError


@dataclass(frozen=True)
class Verdict:
    """
    What a gate says of two models.

    :param limit: The largest share that token perplexity may grow by.
    :param increase: The share that it grew by; NaN or infinite where a model is broken.
    """

    limit: float
    increase: float
    text: str

    @property
    def has_passed(self) -> bool:
        """Whether the increase is within the limit; one that is not a number never is."""
        return self.increase <= self.limit

    def __str__(self) -> str:
        told = f"token perplexity on {self.text} grew by {100 * self.increase:.2f}%"
        return f"{told}, {'within' if self.has_passed else 'beyond'} the {100 * self.limit:g}% allowed"

    def to_dict(self) -> dict[str, Any]:
        """
        Turn the verdict into what JSON can hold.

        :return: Limit, increase, whether it has passed, and the same in words.
        """
        figures = {"limit": self.limit, "perplexity_increase": self.increase}
        return figures | {"has_passed": self.has_passed, "message": str(self)}


def judge(limit: float, dense: Row, sparse: Row, text: str) -> Verdict:
    """Compare token perplexities."""
    before, after = dense.cost.perplexity.token_perplexity, sparse.cost.perplexity.token_perplexity
    return Verdict(limit, after / before - 1, text)


def require_limit(option: str, limit: float) -> None:
    """
    Check the limit that a gate is given.

    :param limit: The largest share that token perplexity may grow by.
    :raises ActsparseError: If it is not a number, 0 or more.
    """
    if not 0 <= limit < math.inf:
        msg = f"{option} is {limit:g}; it must be a share of 0 or more, such as 0.05 for 5%"
        raise ActsparseError(msg)
