"""What `actsparse doctor` says where acceleration works, and where something is missing."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from actsparse import cli
from actsparse.openvino import doctor
from actsparse.openvino.build import extension_path
from actsparse.openvino.doctor import Diagnosis, Finding, diagnose, try_extension
from actsparse.openvino.toolchain import BuildError


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        return extension_path()
    except BuildError as error:
        pytest.skip(str(error))


def find(diagnosis: Diagnosis, name: str) -> Finding:
    return next(finding for finding in diagnosis.findings if finding.name == name)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["actsparse", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_command_ends_with_0_where_acceleration_works(library, monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, "--json", tmp_path / "doctor.json") == 0
    printed = capsys.readouterr().out
    assert "acceleration works" in printed
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["is_accelerated"] is True
    names = [finding["name"] for finding in written["findings"]]
    assert names[:6] == ["Python", "platform", "processor", "cores", "threads", "memory"]
    assert names[-5:] == ["OpenVINO to build with", "compiler", "extension", "instructions", "self-test"]
    assert all(finding["value"] for finding in written["findings"])
    # Reports are pasted into public places.
    assert str(Path.home()) not in printed + json.dumps(written)


def test_the_command_ends_with_1_and_advice_where_there_is_no_compiler(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert run(monkeypatch) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "no C++ compiler was found" in printed
    assert "acceleration does not work" in printed


def test_advice_stands_once_beside_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    diagnosis = diagnose()
    assert not diagnosis.is_accelerated
    assert [f.name for f in diagnosis.findings if "no-such-compiler" in f.advice] == ["compiler"]
    assert find(diagnosis, "extension").value == "absent"
    assert find(diagnosis, "self-test").value == "not run"


def test_a_failing_build_is_advice_to_the_self_test(monkeypatch, tmp_path):
    def fail() -> Path:
        message = "the C++ compiler fails"
        raise BuildError(message)

    monkeypatch.setattr(doctor, "extension_path", fail)
    monkeypatch.setenv("ACTSPARSE_CACHE", str(tmp_path))
    assert find(diagnose(), "self-test").advice == "the C++ compiler fails"


def test_the_self_test_passes_with_the_extension(library):
    finding = try_extension(library)
    assert finding.is_fine, finding


def test_the_self_test_fails_on_wrong_numbers(library, monkeypatch):
    monkeypatch.setattr(doctor, "_run_extension", lambda *_: np.full((3, 128), np.nan, np.float32))
    finding = try_extension(library)
    assert finding.is_fine is False
    assert "ACTSPARSE_ISA=portable" in finding.advice


def test_the_self_test_fails_on_something_that_is_no_extension(tmp_path):
    (tmp_path / "library.so").write_bytes(b"nothing")
    finding = try_extension(tmp_path / "library.so")
    assert finding.is_fine is False
    assert finding.value.startswith("fails: ")


def test_missing_and_ill_matched_libraries_come_with_the_command_that_installs_them(monkeypatch):
    versions = {"openvino": "2026.4.1", "openvino-genai": "2026.3.0.0", "openvino-tokenizers": "2026.4.1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor, "version", version)
    examined = {name: doctor._examine_library(name) for name in ("nncf", *doctor.OPTIONAL_LIBRARIES)}
    assert {name: finding.is_fine for name, finding in examined.items()} == {
        "nncf": False,
        "optimum-intel": None,
        "openvino-genai": False,
        "openvino-tokenizers": True,
    }
    assert "does not match openvino 2026.4.1" in examined["openvino-genai"].advice
    assert "pip install 'actsparse[openvino]'" in examined["optimum-intel"].advice


def test_the_table_shows_brackets_as_they_are():
    finding = Finding("compiler", "[red] g++", False, "pip install 'actsparse[openvino]'")
    console = Console(width=100)
    with console.capture() as captured:
        console.print(Diagnosis(False, (finding,)).to_table())
    assert "[red] g++" in captured.get()
    assert "actsparse[openvino]" in captured.get()
