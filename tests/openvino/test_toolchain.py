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


def test_no_compiler_says_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler was found.*name one in CXX"):
        find_compiler()


def test_commands_run_in_a_folder_and_in_english(tmp_path):
    done = run_command(["sh", "-c", "pwd; echo $LC_ALL; echo wrong >&2; exit 3"], tmp_path)
    assert done.returncode == 3
    assert done.stdout.splitlines() == [str(tmp_path), "C", "wrong"]
