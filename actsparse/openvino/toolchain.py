"""The C++ compiler of this machine, and what the installed openvino package has for extensions."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import openvino

from actsparse.errors import ActsparseError

COMPILERS = ("c++", "g++", "clang++")


class BuildError(ActsparseError):
    """The extension cannot be built or loaded here."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    :param command: What to run.
    :param identity: Its version, target and options, which say nothing about where it is installed.
    """

    command: tuple[str, ...]
    identity: str


@dataclass(frozen=True)
class OpenVino:
    """What the installed openvino package has for extensions."""

    version: str
    include: Path
    libraries: tuple[Path, ...]


def find_compiler() -> Compiler:
    """Find the C++ compiler: $CXX, else c++, g++ or clang++.

    :raises BuildError: If there is none.
    """
    chosen = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]
    except ValueError:  # an open quotation
        commands = []
    for command in commands:
        program = shutil.which(command[0])
        if program is None:
            continue
        command[0] = str(Path(program).absolute())  # it runs in another folder
        version, target = (_first_line([*command, option]) for option in ("--version", "-dumpmachine"))
        if version is not None:
            identity = ", ".join([version, target or platform.machine(), *command[1:]])
            return Compiler(tuple(command), identity)
    if chosen:
        msg = f"the environment variable CXX names {chosen!r}, which does not run; unset it or name a C++17 compiler"
        raise BuildError(msg)
    install = "run xcode-select --install" if sys.platform == "darwin" else "install g++ (apt install g++)"
    msg = f"no C++ compiler was found, which the OpenVINO extension needs once; {install} or name one in CXX"
    raise BuildError(msg)


def find_openvino() -> OpenVino:
    """Find the headers and libraries of the installed openvino package.

    :raises BuildError: If it has none, or on Windows.
    """
    if sys.platform == "win32":
        msg = "the OpenVINO extension is written for GCC and Clang and is not built on Windows; WSL runs it"
        raise BuildError(msg)
    home = Path(openvino.__file__).parent
    suffix = ".*.dylib" if sys.platform == "darwin" else ".so.*"
    patterns = (f"libopenvino{suffix}", f"libtbb{suffix}")
    found = [sorted((home / "libs").glob(pattern)) for pattern in patterns]
    if not (home / "include" / "openvino").is_dir() or not all(found):
        msg = "the installed openvino package has no headers or libraries to build with; pip's openvino wheel has them"
        raise BuildError(msg)
    return OpenVino(openvino.get_version(), home / "include", tuple(libraries[0] for libraries in found))


def run_command(command: list[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """
    Run a compiler.

    :return: Its exit code, and all that it says in `stdout`.
    """
    # In English, for the first error to be recognised.
    environment = os.environ | {"LC_ALL": "C"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _first_line(command: list[str]) -> str | None:
    try:
        done = run_command(command)
    except OSError:
        return None
    return next(iter(done.stdout.splitlines()), None) if done.returncode == 0 else None
