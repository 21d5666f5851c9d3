"""The search: predict what every candidate loses and how fast it is, measure the best one, and learn from it."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from actsparse.algorithms.bisection import next_guess
from actsparse.commands.tune.candidates import KERNEL, Candidate
from actsparse.runtime.progress import Say

# What masks lose before any was measured: c s^p, as `auto` on small models; one measurement moves c, two move p.
USUAL_LOSS, USUAL_SPARSITY, USUAL_POWER = 0.1, 0.4, 3.0
POWERS = (1.5, 6.0)
# What masks cost may be lost in noise, or below 0: a step goes no farther than where they cost so many times as much.
LARGEST_LEAP = 4.0
# The share of the room that a guess aims at: a little too much is a step for nothing.
AIM = 0.95
# So near to the limit another step is not worth its minutes.
ENOUGH = 0.9
# Another candidate has to promise as much more speed, and two sparsities are the same when they are as near.
LEAST_GAIN, LEAST_STEP = 0.01, 0.01
MOST_SPARSITY = 0.9
# Of each phase: candidates without training, and such with it, which take several times as long.
MOST_STEPS = 8
MOST_TRAININGS = 3
# What masks lose with learnt biases, beside those without, before any was measured.
RECOVERED = 0.7


@dataclass(frozen=True)
class Line:
    """
    How long decoding takes on the kernel: what is left out need not be read, so that it falls along a line.

    :param start: Milliseconds of a token without masks.
    :param slope: Milliseconds for each unit of sparsity; below 0.
    """

    start: float
    slope: float

    def at(self, sparsity: float) -> float:
        """Predict milliseconds of a token."""
        return self.start + self.slope * sparsity


@dataclass(frozen=True)
class Tried:
    """
    A candidate that was measured.

    :param loss: How much more a token costs than in the dense model as it was loaded, in nats.
    """

    candidate: Candidate
    loss: float


@dataclass
class Found:
    """
    What a search found.

    :param best: The fastest candidate within the limit; None where no candidate is.
    :param tried: The masked candidates, in the order in which they were measured.
    :param reason: Why the search ended.
    """

    best: Candidate | None
    tried: list[Tried] = field(default_factory=list)
    reason: str = ""


class Search:
    """
    Look for the fastest candidate within a loss.

    Losses of weights and masks nearly add up, so what masks cost with one kind of weights tells where to begin with
    another; and speed follows the bytes that are read, so that two measurements of it predict all others.

    :param limit: The most that a token may cost more than in the dense model, in nats.
    :param dense: Losses of the kinds of weights without masks.
    :param lines: How long decoding takes on the kernel, by kind of weights; those that cannot be masked are left out.
    :param recover: Steps of training with which candidates are tried once those without are; 0 for none.
    :param measure: Masks a candidate and measures its loss.
    :param has_time: Whether there is time for another measurement.
    """

    def __init__(
        self,
        limit: float,
        dense: Mapping[str, float],
        lines: Mapping[str, Line],
        algorithm: str,
        *,
        recover: int = 0,
        measure: Callable[[Candidate], float],
        has_time: Callable[[], bool] = lambda: True,
        say: Say = lambda _line: None,
    ) -> None:
        self._rooms = {name: limit - loss for name, loss in dense.items() if name in lines and loss < limit}
        self._dense, self._lines, self._algorithm = dense, lines, algorithm
        self._measure, self._has_time, self._say = measure, has_time, say
        self._limit, self._phases = limit, (0, recover) if recover else (0,)
        self._steps = 0
        self._tried: list[Tried] = []

    def run(self, best: Candidate | None, milliseconds: float) -> Found:
        """
        Search.

        :param best: The fastest candidate without masks within the limit, if there is one.
        :param milliseconds: What a token takes with it, or infinity.
        """
        reason = ""
        for steps in self._phases:
            self._steps = steps
            best, milliseconds, reason = self._run_phase(best, milliseconds)
        return Found(best, self._tried, reason)

    def _run_phase(self, best: Candidate | None, milliseconds: float) -> tuple[Candidate | None, float, str]:
        while True:
            ahead = [(self._lines[name].at(sparsity), name, sparsity) for name, sparsity in self._guesses().items()]
            reason = self._reason_to_end(ahead, milliseconds)
            if reason:
                return best, milliseconds, reason
            expected, name, sparsity = min(ahead)
            candidate = Candidate(name, KERNEL, self._algorithm, round(sparsity, 3), self._steps)
            self._say(f"measuring {candidate.name}: {expected:.2f} ms a token expected")
            begin = time.monotonic()
            loss = self._measure(candidate)
            self._tried.append(Tried(candidate, loss))
            is_within = loss <= self._limit
            minutes, left = (time.monotonic() - begin) / 60, self._count_left()
            self._say(
                f"{candidate.name} costs {math.expm1(loss):+.2%}, {'within' if is_within else 'above'} the limit; "
                f"it took {minutes:.1f} minutes, and {left} more are measured at most: {left * minutes:.0f} minutes"
            )
            if is_within and expected < milliseconds:
                best, milliseconds = candidate, expected

    def _reason_to_end(self, ahead: list[tuple[float, str, float]], milliseconds: float) -> str:
        if not self._rooms:
            return "no kind of weights leaves room for masks"
        if not ahead:
            return "the limit is reached as nearly as another step would reach it"
        if min(ahead)[0] > (1 - LEAST_GAIN) * milliseconds:
            return f"no other candidate promises {LEAST_GAIN:.0%} more speed"
        if not self._count_left():
            return f"{MOST_TRAININGS if self._steps else MOST_STEPS} candidates were measured"
        return "" if self._has_time() else "the time was up"

    def _count_left(self) -> int:
        done = sum(tried.candidate.recover == self._steps for tried in self._tried)
        return (MOST_TRAININGS if self._steps else MOST_STEPS) - done

    def _guesses(self) -> dict[str, float]:
        """Guess for each kind of weights the next sparsity to measure; none where another step brings nothing."""
        found = {}
        for name, room in self._rooms.items():
            costs = sorted(self._costs(name, self._steps))
            below = max((cost for cost in costs if cost[1] <= room), default=None)
            above = min((cost for cost in costs if cost[1] > room), default=None)
            low, high = below[0] if below else 0.0, above[0] if above else MOST_SPARSITY
            if below and above:
                guess = next_guess(low, high, below, above, AIM * room)
            else:
                guess = self._predict(name, AIM * room)
            is_enough = below is not None and below[1] >= ENOUGH * room
            if not is_enough and high - low >= 2 * LEAST_STEP:
                found[name] = min(max(guess, low + LEAST_STEP), high - LEAST_STEP)
        return found

    def _costs(self, name: str, steps: int) -> list[tuple[float, float]]:
        """List what masks on these weights were found to cost, by sparsity, in the order of measurement."""
        own = [tried for tried in self._tried if (tried.candidate.weights, tried.candidate.recover) == (name, steps)]
        return [(tried.candidate.sparsity, tried.loss - self._dense[name]) for tried in own]

    def _predict(self, name: str, room: float) -> float:
        """Predict the sparsity whose masks cost so much, from what is known of these weights, or else of others."""
        factor = RECOVERED if self._steps else 1.0
        trained = self._costs(name, self._steps) if self._steps else []
        plain = [cost for other in (name, *self._rooms) for cost in self._costs(other, 0)[::-1]]
        known = [*trained[::-1], *((sparsity, factor * loss) for sparsity, loss in plain)]
        sparsity, loss = known[0] if known else (USUAL_SPARSITY, factor * USUAL_LOSS)
        power = _fit_power([cost for cost in plain if cost[1] > 0])
        return sparsity * min(room / loss if loss > 0 else math.inf, LARGEST_LEAP) ** (1 / power)


def _fit_power(points: list[tuple[float, float]]) -> float:
    """Fit p of c s^p through the lowest and the highest point."""
    low, high = min(points, default=(0.0, 0.0)), max(points, default=(0.0, 0.0))
    if high[0] < 1.1 * low[0] or not points:
        return USUAL_POWER
    power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    return min(max(power, POWERS[0]), POWERS[1])
