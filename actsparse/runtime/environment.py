"""What a figure or a file was made with."""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("actsparse", "torch", "transformers", "nncf", "openvino")


def library_versions() -> dict[str, str]:
    """
    List the versions of the libraries that results depend on.

    :return: Versions by distribution name.
    """
    return {name: version(name) for name in _LIBRARIES}


def describe_environment() -> dict[str, Any]:
    """
    Say what a figure was measured with.

    :return: Versions of libraries and Python, and the machine.
    """
    return {
        "versions": library_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def describe_machine() -> dict[str, Any]:
    """
    Describe the machine that the benchmark runs on.

    :return: Processor, cores, threads, memory, operating system and the load of the last minute.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def count_cores() -> int:
    """
    Count the cores that this process may use.

    :return: How many.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """
    Read the peak of this process's resident memory.

    :return: Bytes.
    """
    try:
        # On Linux ru_maxrss starts with the peak of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # which not every system has

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
