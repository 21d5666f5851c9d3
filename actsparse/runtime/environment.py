"""What a figure or a file was made with."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_LIBRARIES = ("actsparse", "torch", "transformers", "nncf", "openvino")


def library_versions() -> dict[str, str]:
    """List the versions of the libraries that results depend on."""
    return {name: version(name) for name in _LIBRARIES}


def describe_environment() -> dict[str, Any]:
    """
    Say what a figure was measured with.

    :return: Versions of libraries and Python, and the machine.
    """
    import torch  # slow, and no part of a process that only measures memory

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
    import torch  # as above

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
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Read the peak of this process's resident memory."""
    try:
        # On Linux ru_maxrss starts with the peak of the process that started this one.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource  # which not every system has

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def read_git_state(folder: Path, excluded: Sequence[Path] = ()) -> dict[str, Any]:
    """
    Tell which commit a folder is at.

    Files that git does not know are no changes: results and caches often lie in a checkout.

    :param excluded: Files and folders whose changes do not count.
    :return: The commit, when it was made, and whether the working tree differs from it; all None outside a checkout.
    """
    commit = _run_git(folder, "rev-parse", "HEAD")
    top = _run_git(folder, "rev-parse", "--show-toplevel")
    paths = [":/"]
    for path in excluded:
        absolute = path.absolute().resolve()
        if top is not None and absolute.is_relative_to(Path(top).resolve()):
            paths.append(f":(top,exclude,literal){absolute.relative_to(Path(top).resolve()).as_posix()}")
    changes = _run_git(folder, "status", "--porcelain", "--untracked-files=no", "--", *paths)
    return {
        "commit": commit,
        "committed_at": _run_git(folder, "show", "-s", "--format=%cI", "HEAD"),
        "is_dirty": None if commit is None or changes is None else bool(changes),
    }


def _run_git(folder: Path, *arguments: str) -> str | None:
    """Return git's answer; None where there is no git, no checkout, or no such thing in it."""
    # Without optional locks, so that asking never gets into the way of anyone who commits.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
