"""What a figure or a file was made with."""

import os
import platform
from importlib.metadata import version
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


def count_cores() -> int:
    """
    Count the cores that this process may use.

    :return: How many.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
