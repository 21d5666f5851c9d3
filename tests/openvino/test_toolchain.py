import pytest

from actsparse.openvino.toolchain import BuildError, find_compiler, find_openvino, run_command


def test_openvino_has_headers_and_libraries():
    package = find_openvino()
    assert (package.include / "openvino" / "op" / "op.hpp").is_file()
    assert all(library.is_file() for library in package.libraries)


def test_openvino_without_headers_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("openvino.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(BuildError, match="no headers or libraries"):
        find_openvino()


def test_the_libraries_of_macos_are_found(monkeypatch, tmp_path):
    # As openvino 2026.4.1 for macOS on ARM has them.
    (tmp_path / "include" / "openvino").mkdir(parents=True)
    (tmp_path / "libs").mkdir()
    for name in ("openvino.2641", "tbb.12", "tbbbind_2_5.3", "tbbmalloc.2", "openvino_c.2641"):
        (tmp_path / "libs" / f"lib{name}.dylib").touch()
    monkeypatch.setattr("openvino.__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr("sys.platform", "darwin")
    assert [path.name for path in find_openvino().libraries] == ["libopenvino.2641.dylib", "libtbb.12.dylib"]


def test_windows_is_refused_with_the_reason_before_its_libraries_are_missed(monkeypatch, tmp_path):
    monkeypatch.setattr("openvino.__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(BuildError, match="not built on Windows"):
        find_openvino()


def test_no_compiler_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler was found.*name one in CXX"):
        find_compiler()


def test_commands_run_in_a_folder_and_in_english(tmp_path):
    done = run_command(["sh", "-c", "pwd; echo $LC_ALL; echo wrong >&2; exit 3"], tmp_path)
    assert done.returncode == 3
    assert done.stdout.splitlines() == [str(tmp_path), "C", "wrong"]
