"""Building the extension, on sources so small that they compile in no time."""

import ctypes
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import openvino
import pytest

from actsparse.openvino import build
from actsparse.openvino.build import describe_build, extension_path, is_extension_available
from actsparse.openvino.toolchain import BuildError, Compiler, find_compiler

FUNCTION = """
#include "answer.hpp"
extern "C" __attribute__((visibility("default"))) int NAME() { return ANSWER; }
"""


def has_compiler() -> bool:
    try:
        return bool(find_compiler())
    except BuildError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler"),
]


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny extension, an empty cache and an empty temporary folder."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("answer", "other"):
        (folder / f"{name}.cc").write_text(FUNCTION.replace("NAME", name))
    (folder / "answer.hpp").write_text("#define ANSWER 42\n")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build, "SOURCES", folder)
    monkeypatch.setattr(build, "_is_explained", threading.Event())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return folder


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Take away every compiler when called."""
    (tmp_path / "empty").mkdir()
    return lambda: monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def answer_of(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def left_over(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != "extension")


def test_the_first_use_builds_and_says_so_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    library = extension_path()
    assert library.is_relative_to(tmp_path / "cache" / "extension")
    assert answer_of(library) == 42
    assert ctypes.CDLL(str(library)).other() == 42
    assert extension_path() == library
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("built the OpenVINO extension for 20")
    assert lines[0].endswith(" s")
    assert left_over(tmp_path / "cache") == []


def test_nothing_in_the_name_or_the_record_says_where_the_compiler_is():
    library = extension_path()
    program = find_compiler().command[0]
    assert Path(program).is_absolute()
    assert str(Path(program).parent) not in (library.parent / "build.json").read_text()


BUILD_SCRIPT = """
import sys
from pathlib import Path
from actsparse.openvino import build
build.SOURCES = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(build.extension_path())
"""


def test_two_processes_that_build_at_once_end_with_the_same_library(sources, tmp_path):
    command = [sys.executable, "-c", BUILD_SCRIPT, str(sources)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1]
    assert extension_path() == Path(printed[0])
    assert left_over(tmp_path / "cache") == []


@pytest.mark.parametrize("name", ["with space", "quote's \"", "$HOME;#&", "ä–", "-leading", ".hidden", "%41[x]*?"])
def test_sources_and_cache_may_lie_in_any_folder(sources, monkeypatch, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setattr(build, "SOURCES", sources.rename(folder / "sources"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("ACTSPARSE_CACHE", str(folder / "cache"))
    library = extension_path()
    assert library.is_relative_to(folder / "cache")
    assert ctypes.CDLL(str(library)).answer() == 42


def replace_file(path: Path, data: bytes) -> None:
    """Put another file in the place of one that this process may have loaded: changing that one would crash it."""
    copy = path.with_name("copy")
    copy.write_bytes(data)
    copy.replace(path)


@pytest.mark.parametrize("is_damaged", [False, True], ids=["no library", "a damaged library"])
def test_where_files_cannot_be_locked_the_first_library_counts(monkeypatch, is_damaged, tmp_path):
    if is_damaged:
        replace_file(extension_path(), b"damaged")
    barrier, publish = threading.Barrier(2, timeout=30), build._publish

    def publish_together(*folders: Path) -> None:
        barrier.wait()
        publish(*folders)

    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(build, "_publish", publish_together)
    monkeypatch.setattr(fcntl, "flock", refuse)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(extension_path())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert answer_of(found[0]) == answer_of(found[1]) == 42
    assert left_over(tmp_path / "cache") == []


def make_unwritable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Below a file: even root cannot write there.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path / "file" / "cache"))


def test_without_a_writable_cache_the_library_goes_to_a_private_temporary_folder(tmp_path, monkeypatch, caplog):
    make_unwritable(tmp_path, monkeypatch)
    library = extension_path()
    folder = tmp_path / "tmp" / f"actsparse-{os.getuid()}"
    assert library.is_relative_to(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert answer_of(library) == 42
    assert extension_path() == library
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(folder) in caplog.text


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_cache_is_read(tmp_path, monkeypatch):
    library = extension_path()
    folders = [tmp_path / "cache", tmp_path / "cache" / "extension"]
    for folder in folders:
        folder.chmod(0o500)
    try:
        assert extension_path() == library
        (build.SOURCES / "answer.hpp").write_text("#define ANSWER 43\n")
        assert extension_path().is_relative_to(tmp_path / "tmp")
    finally:
        for folder in folders:
            folder.chmod(0o700)


def plant_open_folder(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def plant_link(folder: Path) -> None:
    (folder.parent / "mine").mkdir(mode=0o700)
    folder.symlink_to("mine")


@pytest.mark.parametrize("plant", [plant_open_folder, plant_link, Path.touch])
def test_a_temporary_folder_that_others_may_have_made_is_refused(tmp_path, monkeypatch, plant):
    make_unwritable(tmp_path, monkeypatch)
    plant(tmp_path / "tmp" / f"actsparse-{os.getuid()}")
    with pytest.raises(BuildError, match="not yours alone; set ACTSPARSE_CACHE"):
        extension_path()


def truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:-100])


def flip_byte(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(bytes(data))


def lose_record(library: Path) -> None:
    (library.parent / "build.json").unlink()


def spoil_record(library: Path) -> None:
    (library.parent / "build.json").write_text("[]")


def lose_library(library: Path) -> None:
    library.unlink()


def replace_by_text(library: Path) -> None:
    data = b"not a library"
    library.write_bytes(data)
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (library.parent / "build.json").write_text(json.dumps(record))


@pytest.mark.parametrize("damage", [truncate, flip_byte, lose_record, spoil_record, lose_library, replace_by_text])
def test_a_damaged_library_is_built_again(damage, tmp_path):
    library = extension_path()
    replace_file(library, library.read_bytes())
    damage(library)
    assert describe_build().state != "ready"
    assert extension_path() == library
    assert describe_build().state == "ready"
    assert left_over(tmp_path / "cache") == []


def test_without_a_compiler_the_error_says_what_to_install(no_compiler, tmp_path):
    no_compiler()
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found.*install.*CXX") as caught:
        extension_path()
    assert "\n" not in str(caught.value)
    assert not is_extension_available()
    assert describe_build().compiler is None
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_a_library_built_before_is_used(no_compiler):
    library = extension_path()
    no_compiler()
    assert extension_path() == library
    assert is_extension_available()


@pytest.mark.parametrize("chosen", ["no-such-compiler", "false", "/no/such/g++ -O2", 'g++ "'])
def test_a_compiler_that_does_not_run_is_named(monkeypatch, chosen):
    monkeypatch.setenv("CXX", chosen)
    with pytest.raises(BuildError, match=re.escape(f"CXX names {chosen!r}")):
        extension_path()


def test_the_chosen_compiler_may_have_options(monkeypatch):
    before = extension_path()
    name = Path(find_compiler().command[0]).name
    monkeypatch.setenv("CXX", f"{name} -Wall")
    assert find_compiler().command[1:] == ("-Wall",)
    assert answer_of(extension_path()) == 42
    assert extension_path() != before


def test_a_failing_compiler_is_quoted_and_its_words_are_kept(tmp_path):
    (build.SOURCES / "answer.cc").write_text("int broken() { return nonsense; }\nint more() { return rubbish; }\n")
    with pytest.raises(BuildError, match=r"answer\.cc:1.*nonsense.*all of it in") as caught:
        extension_path()
    assert "\n" not in str(caught.value)
    logs = list((tmp_path / "cache" / "extension").glob("*.log"))
    assert len(logs) == 1
    assert str(logs[0]) in str(caught.value)
    assert "rubbish" in logs[0].read_text()
    assert describe_build().library is None
    assert left_over(tmp_path / "cache") == []


def test_a_library_that_does_not_load_is_not_kept():
    (build.SOURCES / "answer.cc").write_text("int missing();\nint value = missing();\n")
    with pytest.raises(BuildError, match="built but does not load: .*missing"):
        extension_path()
    assert describe_build().library is None


def change_header(monkeypatch: pytest.MonkeyPatch) -> None:
    (build.SOURCES / "answer.hpp").write_text("#define ANSWER 43\n")


def add_source(monkeypatch: pytest.MonkeyPatch) -> None:
    (build.SOURCES / "third.cc").write_text("")


def change_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DMORE"))


def change_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "get_version", lambda: "2030.1.0-1-other")


def change_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")


def change_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Compiler(find_compiler().command, "c++ 99")
    monkeypatch.setattr(build, "find_compiler", lambda: other)


@pytest.mark.parametrize(
    "change", [change_header, add_source, change_flags, change_openvino, change_machine, change_compiler]
)
def test_what_the_library_depends_on_is_in_its_key(monkeypatch, change):
    before = extension_path()
    change(monkeypatch)
    assert describe_build().library is None
    after = extension_path()
    assert after != before
    assert before.exists()


def test_the_state_tells_absent_from_ready(tmp_path):
    state = describe_build()
    assert (state.state, state.library, state.age, state.obstacle) == ("absent", None, None, None)
    assert is_extension_available()
    library = extension_path()
    state = describe_build()
    assert (state.state, state.library, state.root) == ("ready", library, tmp_path / "cache")
    assert state.age is not None
    assert state.age < 60
    assert state.openvino == openvino.get_version()


def test_windows_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BuildError, match="not built on Windows"):
        extension_path()


def test_an_openvino_without_headers_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(openvino, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BuildError, match="no headers or libraries"):
        extension_path()
    assert not is_extension_available()
    assert describe_build().openvino is None


def test_the_portable_graph_is_explained_once(caplog):
    for reason in ("no compiler", "another reason"):
        build.explain_portable(BuildError(reason))
    assert [record.message for record in caplog.records] == [
        "the masked model stays correct but is not faster: no compiler"
    ]
