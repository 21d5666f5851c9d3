"""Memory: how much there is, how fast it is copied and read, and what a model takes at its peak."""

import ctypes
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actsparse.errors import ActsparseError

_COPY_BYTES = 1 << 28
_COPIES = 8
# More than the third-level caches of nearly all processors, the half that is read too.
_READ_BYTES = 1 << 30


@dataclass(frozen=True)
class MemorySpeed:
    """
    How fast the threads that compute reach memory.

    :param read: Bytes read per second by the extension's threads: rows of a page, all of them.
    :param half_read: The same where only a random half of the rows is read, as sparse layers read their weights.
    """

    copied: float
    read: float
    half_read: float

    def to_dict(self) -> dict[str, float]:
        """Turn the speeds into what JSON can hold, in GB/s."""
        speeds = {"copy": self.copied, "read_all_rows": self.read, "read_half_of_rows": self.half_read}
        return {f"{name}_gb_per_s": round(speed / 1e9, 2) for name, speed in speeds.items()}


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

    :raises ActsparseError: If there is less.
    """
    available = available_memory()
    if available is not None and available < needed:
        msg = f"{purpose} needs about {needed / 2**30:.1f} GiB of memory, but {available / 2**30:.1f} GiB are free"
        raise ActsparseError(msg)


def measure_memory(extension: Path, threads: int, num_bytes: int = _READ_BYTES) -> MemorySpeed:
    """
    Copy and read memory, and take the best of several times each.

    :raises ActsparseError: If there is too little memory.
    """
    read_memory = ctypes.CDLL(str(extension)).actsparse_measure_reading
    read_memory.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_double)]
    read_memory.restype = ctypes.c_bool
    speeds = (ctypes.c_double * 2)()
    if not read_memory(num_bytes, threads, speeds):
        msg = f"there is no memory of {num_bytes / 2**30:.1f} GiB to measure how fast it is read"
        raise ActsparseError(msg)
    return MemorySpeed(measure_copy_bandwidth(threads), speeds[0], speeds[1])


def measure_copy_bandwidth(threads: int) -> float:
    """
    Copy memory and take the best of several times.

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
