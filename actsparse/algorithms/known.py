"""What has been measured of a model, so that nothing is measured twice."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


class Known:
    """What has been measured of a model, its sites and its data, and how many seconds that took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._found: dict[Any, Any] = {}

    def once(self, what: Any, measure: Callable[[], Any]) -> Any:
        """
        Measure what is not known yet.

        :param what: Its name.
        :param measure: Measures it.
        :return: What was measured, now or earlier.
        """
        if what not in self._found:
            before, start = self.seconds, time.perf_counter()
            self._found[what] = self._find(what, measure)
            # One measurement may need another, whose time is part of its own.
            self.seconds = before + time.perf_counter() - start
        return self._found[what]

    def _find(self, _what: Any, measure: Callable[[], Any]) -> Any:
        return measure()


def name_sketches(importance: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
    """
    Name the sketches of scores, for `Known`.

    :param importance: a of each site.
    :return: A name that other importances do not have.
    """
    return ("sketches", *((site, *a.flatten().tolist()) for site, a in sorted(importance.items())))
