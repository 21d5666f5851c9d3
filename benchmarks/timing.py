"""Timing contenders in turn, so that a machine that slows down for a while slows all of them down."""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any


def time_interleaved(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: int, clean_up: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """
    Time calls in turn, A B A B and so on.

    :param contenders: What to call, by name. Each should have been warmed up.
    :param repeats: How often to call each.
    :param clean_up: Called after every call, outside the measured time.
    :return: Seconds of every call, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            # Otherwise one contender may pay for collecting what another has left.
            gc.collect()
            started = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - started)
            clean_up()
    return samples
