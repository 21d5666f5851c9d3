"""What has been measured of a model, so that nothing is measured twice."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


class MeasurementCache:
    """What has been measured of a model, its sites and its data, and how many seconds each thing took."""

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}
        # Of each name the time without that of what it needed, and all names that it consists of, its own included.
        self._seconds: dict[Any, float] = {}
        self._parts: dict[Any, set[Any]] = {}
        self._asked: set[Any] = set()
        self._reusable: set[Any] = set()

    def begin(self) -> None:
        """Begin a calibration, which has asked for nothing yet."""
        self._asked, self._reusable = set(), set(self._found)

    @property
    def reused_seconds(self) -> float:
        """How long that took which this calibration has asked for and earlier ones have measured."""
        return sum(self._seconds[what] for what in self._asked & self._reusable)

    def get_or_measure(self, what: Any, measure: Callable[[], Any]) -> Any:
        """
        Measure what is not known yet.

        :param what: Its name.
        :param measure: Measures it.
        :return: What was measured, now or earlier.
        """
        if what not in self._found:
            self._measure(what, measure)
        self._asked |= self._parts[what]
        return self._found[what]

    def _measure(self, what: Any, measure: Callable[[], Any]) -> None:
        outer, self._asked = self._asked, {what}
        start, before = time.perf_counter(), sum(self._seconds.values())
        try:
            found = self._find(what, measure)
            needed = sum(self._seconds.values()) - before
            self._seconds[what] = time.perf_counter() - start - needed
            self._found[what], self._parts[what] = found, self._asked
        finally:
            self._asked = outer

    def _find(self, _what: Any, measure: Callable[[], Any]) -> Any:
        return measure()


def name_sketches(importance: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """
    Name the sketches of scores, for `MeasurementCache`.

    :param importance: The importance a of each site.
    :return: A name that other importances do not have.
    """
    return ("sketches", *((site, *a.flatten().tolist()) for site, a in sorted(importance.items())))
