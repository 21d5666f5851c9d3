"""Build the C++ extension on first use, with the system's compiler, and keep it in the cache."""

import contextlib
import ctypes
import hashlib
import json
import logging
import os
import platform
import shlex
import stat
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from actsparse.errors import SourceError
from actsparse.openvino.toolchain import BuildError, Compiler, OpenVino, find_compiler, find_openvino, run_command
from actsparse.runtime.progress import status_console
from actsparse.storage.assets import cache_dir, file_sha256
from actsparse.storage.files import unfinished_folder

SOURCES = Path(__file__).parent / "extension"
# No -march: the cache may travel to another processor. The kernels choose their instructions when they are loaded.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
LIBRARY = "libactsparse.dylib" if sys.platform == "darwin" else "libactsparse.so"

_FOLDER = "extension"
_RECORD = "build.json"
_logger = logging.getLogger(__name__)
_is_explained = threading.Event()


@dataclass(frozen=True)
class BuildState:
    """
    Where the extension stands; nothing is built to find out.

    :param openvino: OpenVINO's full build string, or None if its headers or libraries are missing.
    :param compiler: The compiler's version and target, or None.
    :param obstacle: What stands in the way of building, or None.
    :param library: The library built from these sources, or None if there is none yet.
    """

    openvino: str | None
    compiler: str | None
    obstacle: str | None
    library: Path | None = None
    root: Path | None = None
    age: float | None = None
    state: str = "absent"


@dataclass(frozen=True)
class _Plan:
    openvino: OpenVino
    compiler: Compiler | BuildError  # why there is none
    sources: dict[str, bytes]

    @property
    def key(self) -> str:
        """What a library must have been built from and for."""
        parts = [self.openvino.version, sys.platform, platform.machine(), *FLAGS]
        parts += [part for name, data in self.sources.items() for part in (name, hashlib.sha256(data).hexdigest())]
        return f"openvino-{self.openvino.version.split('-')[0]}-{_digest(*parts)}"

    @property
    def name(self) -> str:
        """The folder of the library that this compiler makes; without a compiler, a pattern for that of any."""
        return f"{self.key}-{_digest(self.compiler.identity) if isinstance(self.compiler, Compiler) else '*'}"


def extension_path() -> Path:
    """Return the extension's library for the installed OpenVINO, building it on first use.

    :return: A library that loads, in the cache or, where that cannot be written, in the user's temporary folder.
    :raises BuildError: If there is no compiler, it fails, or what it made does not load.
    """
    plan = _make_plan()
    for root in _roots():
        for library in _find_libraries(root, plan):
            if _fault(library) is None:
                return library
    if isinstance(plan.compiler, BuildError):
        raise plan.compiler
    root = _writable_root()
    library = root / _FOLDER / plan.name / LIBRARY
    try:
        (root / _FOLDER).mkdir(exist_ok=True)
        with _lock(root / _FOLDER / ".lock"):
            if _fault(library) is not None:  # else another process has just built it
                _build(plan, plan.compiler, root)
    except OSError as error:
        msg = f"cannot keep the OpenVINO extension in {root}: {error.strerror or error}"
        raise BuildError(msg) from error
    return library


def is_extension_available() -> bool:
    """Say whether `extension_path` can be expected to work, without building anything."""
    found = describe_build()
    return found.state == "ready" or found.obstacle is None


def describe_build() -> BuildState:
    """Say what there is to build the extension with, and whether it is built."""
    try:
        plan = _make_plan()
    except BuildError as error:
        return BuildState(None, None, str(error))
    state = BuildState(
        openvino=plan.openvino.version,
        compiler=plan.compiler.identity if isinstance(plan.compiler, Compiler) else None,
        obstacle=str(plan.compiler) if isinstance(plan.compiler, BuildError) else None,
    )
    for root in _roots():
        for library in _find_libraries(root, plan):
            fault = _fault(library)
            with contextlib.suppress(OSError):
                age = time.time() - library.stat().st_mtime
                state = replace(state, library=library, root=root, age=age, state=fault or "ready")
            if fault is None:
                return state
    return state


def explain_portable(error: Exception) -> None:
    """Warn once in this process that a model runs without the extension."""
    if not _is_explained.is_set():
        _is_explained.set()
        _logger.warning("the masked model stays correct but is not faster: %s", error)


def _make_plan() -> _Plan:
    package = find_openvino()
    try:
        compiler = find_compiler()
    except BuildError as error:
        compiler = error
    paths = sorted(path for path in SOURCES.iterdir() if path.suffix in {".cc", ".hpp"})
    return _Plan(package, compiler, {path.name: path.read_bytes() for path in paths})


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _roots() -> Iterator[Path]:
    with contextlib.suppress(SourceError):
        yield cache_dir()
    if os.name == "posix" and _is_private(_temporary_root()):
        yield _temporary_root()


def _writable_root() -> Path:
    try:
        root = cache_dir()
        (root / _FOLDER).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root / _FOLDER):
            return root
    except (OSError, SourceError) as error:
        reason = getattr(error, "strerror", None) or error
    root = _temporary_root()
    with contextlib.suppress(OSError):
        root.mkdir(mode=0o700)
    if not _is_private(root):
        msg = f"the cache cannot be written ({reason}), and {root} is not yours alone; set ACTSPARSE_CACHE to a folder"
        raise BuildError(msg)
    _logger.warning("the cache cannot be written (%s); the OpenVINO extension is kept in %s", reason, root)
    return root


def _temporary_root() -> Path:
    return Path(tempfile.gettempdir()) / f"actsparse-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """Say whether nobody else can have put a library there."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _find_libraries(root: Path, plan: _Plan) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted((root / _FOLDER).glob(f"{plan.name}/{LIBRARY}"))
    return []


def _fault(library: Path) -> str | None:
    """Return what is wrong with a library, or None."""
    try:
        record = json.loads((library.parent / _RECORD).read_bytes())
        if library.stat().st_size != record["size"] or file_sha256(library) != record["sha256"]:
            return "damaged"
    except (OSError, ValueError, KeyError, TypeError):
        return "damaged"
    return _load_fault(library)


def _load_fault(library: Path) -> str | None:
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"does not load: {error}"
    return None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process build at a time. Where files cannot be locked, each builds its own: the first to end counts."""
    import fcntl

    with path.open("ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(plan: _Plan, compiler: Compiler, root: Path) -> None:
    started = time.monotonic()
    what = f"the OpenVINO extension for {plan.openvino.version.split('-')[0]} with {compiler.identity}"
    target = root / _FOLDER / plan.name
    with (
        unfinished_folder(root) as folder,
        status_console().status(f"building {what} …"),
    ):
        finished = folder / "finished"
        finished.mkdir()
        library = finished / LIBRARY
        _compile(plan, compiler, folder, library, target.with_name(f"{target.name}.log"))
        fault = _load_fault(library)
        if fault is not None:
            msg = f"the OpenVINO extension was built but {fault}"
            raise BuildError(msg)
        record = {"size": library.stat().st_size, "sha256": file_sha256(library), "compiler": compiler.identity}
        (finished / _RECORD).write_text(json.dumps(record))
        _publish(finished, target, folder / "damaged")
    _logger.info("built %s in %.1f s", what, time.monotonic() - started)


def _publish(finished: Path, target: Path, trash: Path) -> None:
    """Move a finished folder to its place in one step. A damaged one is moved away first: it may be loaded."""
    if target.exists() and _fault(target / LIBRARY) is not None:
        with contextlib.suppress(FileNotFoundError):
            target.rename(trash)
    try:
        finished.rename(target)
    except OSError:
        if _fault(target / LIBRARY) is not None:
            raise


def _compile(plan: _Plan, compiler: Compiler, folder: Path, library: Path, log: Path) -> None:
    """Compile the sources, one process for each, and link them."""
    for name, data in plan.sources.items():
        (folder / name).write_bytes(data)
    names = [name for name in plan.sources if name.endswith(".cc")]
    include = ["-isystem", str(plan.openvino.include)]
    commands = [[*compiler.command, *FLAGS, "-I.", *include, "-c", name, "-o", f"{name}.o"] for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(lambda command: run_command(command, folder), commands))
    if all(run.returncode == 0 for run in runs):
        libraries = [str(path) for path in plan.openvino.libraries]
        rpath = f"-Wl,-rpath,{plan.openvino.libraries[0].parent}"
        objects = [f"{name}.o" for name in names]
        runs.append(
            run_command([*compiler.command, "-shared", *objects, "-o", str(library), *libraries, rpath], folder)
        )
    failed = [run for run in runs if run.returncode != 0]
    if failed:
        log.write_text("\n".join(f"{shlex.join(run.args)}\n{run.stdout}" for run in failed))
        lines = [line for run in failed for line in run.stdout.splitlines()]
        first = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it says nothing")
        first = textwrap.shorten(first, 200, placeholder=" …")
        msg = f"the C++ compiler fails on the OpenVINO extension: {first} (all of it in {log})"
        raise BuildError(msg)
