"""What has been measured of a model, so that nothing is measured twice."""

import time
from collections.abc import Callable
from typing import Any

from actsparse.runtime.distributed import digest_of


class MeasurementCache:
    """What has been measured of a model, its sites and its data, and how many seconds each thing took."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}
        # Of each name the time without that of what it needed, and all names that it consists of, its own included.
        self._seconds: dict[str, float] = {}
        self._parts: dict[str, set[str]] = {}
        self._asked: set[str] = set()
        self._reusable: set[str] = set()

    def begin(self) -> None:
        """Begin a calibration, which has asked for nothing yet."""
        self._asked, self._reusable = set(), set(self._found)

    @property
    def reused_seconds(self) -> float:
        """How long that took which this calibration has asked for and earlier ones have measured."""
        return sum(self._seconds[what] for what in self._asked & self._reusable)

    def get_or_measure(self, what: str, measure: Callable[[], Any]) -> Any:
        """Measure what is not known yet."""
        if what not in self._found:
            self._measure(what, measure)
        self._asked |= self._parts[what]
        return self._found[what]

    def _measure(self, what: str, measure: Callable[[], Any]) -> None:
        outer, self._asked = self._asked, {what}
        start, before = time.perf_counter(), sum(self._seconds.values())
        try:
            found = self._find(what, measure)
            needed = sum(self._seconds.values()) - before
            self._seconds[what] = time.perf_counter() - start - needed
            self._found[what], self._parts[what] = found, self._asked
        finally:
            self._asked = outer

    def _find(self, _what: str, measure: Callable[[], Any]) -> Any:
        return measure()


def name_measurement(kind: str, *depends_on: Any) -> str:
    """
    Name what is measured, for `MeasurementCache`.

    :param depends_on: What it depends on beside model, sites and data: tensors, numbers and texts, and what holds them.
    :return: A short name that what depends on anything else does not have.
    """
    return f"{kind} {digest_of(depends_on).hex()}"
