"""What the machine has: memory, cores, and how fast it copies."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from actsparse.errors import ActsparseError

_COPY_BYTES = 1 << 28
_COPIES = 8


def available_memory() -> int | None:
    """Return how many bytes of memory can still be taken without swapping, or None where that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        # A container's limit; its page cache counts as used there, so this can only be too low by that.
        group = Path("/sys/fs/cgroup")
        return min(found, int((group / "memory.max").read_text()))
    except (OSError, ValueError):
        return found


def require_memory(needed: float, purpose: str) -> None:
    """
    Check that there is enough memory for something.

    :param needed: Bytes.
    :param purpose: What needs them, for the message.
    :raises ActsparseError: If there is less.
    """
    available = available_memory()
    if available is not None and available < needed:
        msg = f"{purpose} needs about {needed / 2**30:.1f} GiB of memory, but {available / 2**30:.1f} GiB are free"
        raise ActsparseError(msg)


def measure_copy_bandwidth(threads: int) -> float:
    """
    Copy memory and take the best of several times.

    :param threads: How many threads copy at once.
    :return: Bytes read and bytes written, per second.
    """
    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_COPIES):
            start = time.perf_counter()
            list(pool.map(lambda part: np.copyto(*part), parts))
            seconds.append(time.perf_counter() - start)
    return 2 * _COPY_BYTES / min(seconds)
