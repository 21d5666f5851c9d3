"""Where to look next for the place at which a growing loss meets a limit."""

import math

# What was tried, and the loss it gave.
Tried = tuple[float, float]


def next_guess(low: float, high: float, below: Tried | None, above: Tried | None, limit: float) -> float:
    """
    Take the place where a power law through both ends meets the limit; in the middle where there is none.

    The loss hardly changes at first and then grows ever faster.

    :param low: No place below this one has to be tried.
    :param below: The highest place tried whose loss is within the limit.
    """
    middle = (low + high) / 2
    if below is None or above is None or below[1] <= 0:
        return middle
    # loss = c * place^k through both ends.
    power = math.log(above[1] / below[1]) / math.log(above[0] / below[0])
    if power <= 0:
        return middle
    guess = below[0] * (limit / below[1]) ** (1 / power)
    # Noise may put the guess next to an end, where a step brings nothing.
    margin = 0.15 * (high - low)
    return min(max(guess, low + margin), high - margin)
