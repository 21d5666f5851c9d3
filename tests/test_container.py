"""The container recipe agrees with the files that it copies and with the packages that `make` installs."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "examples" / "container" / "Dockerfile"
IGNORED = DOCKERFILE.with_name("Dockerfile.dockerignore")


def instructions(name: str) -> list[str]:
    """Read what follows each instruction of a kind, in order."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.partition(" ")[2].strip() for line in text.splitlines() if line.partition(" ")[0] == name]


def pip_installs() -> list[list[str]]:
    """Read the arguments of each `pip install`."""
    return [shlex.split(run)[2:] for run in instructions("RUN") if run.startswith("pip install")]


def copied() -> list[str]:
    """List what is copied from the repository."""
    copies = [shlex.split(copy)[:-1] for copy in instructions("COPY") if not copy.startswith("--from")]
    return [name for names in copies for name in names]


def extras_of(requirement: str) -> set[str]:
    return set(requirement.partition("[")[2].rstrip("]").split(","))


def test_what_is_copied_exists_and_reaches_the_builder():
    allowed = {line.removeprefix("!") for line in IGNORED.read_text().splitlines() if line.startswith("!")}
    assert set(copied()) == allowed
    assert all((ROOT / name).exists() for name in copied())


def test_what_the_build_needs_is_copied():
    contents = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, wheel = contents["project"], contents["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {project["readme"], *project["license-files"], *wheel["packages"], "pyproject.toml", "constraints.txt"}
    assert needed <= set(copied())


def test_packages_are_pinned_and_their_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, second = pip_installs()
    for arguments in (first, second):
        assert arguments[:2] == ["-c", "constraints.txt"]
    assert extras_of(first[2]) <= project["optional-dependencies"].keys()
    assert {"torch", *second[3:]} <= {line.partition("==")[0] for line in constraints()}


def test_the_image_is_installed_as_make_does_it():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    by_make = [
        shlex.split(line.partition(" install ")[2]) for line in makefile.splitlines() if "$(PIP) install" in line
    ]
    everything, without_dependencies = (
        [x for x in line if x not in ("--quiet", "--progress-bar", "off")] for line in by_make
    )
    first, second = pip_installs()
    assert extras_of(first[2]) <= extras_of(everything[-1])
    assert second == without_dependencies


def test_the_image_runs_the_command_as_somebody_else_than_root():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [entry_point] = instructions("ENTRYPOINT")
    assert entry_point == '["actsparse"]'
    assert "actsparse" in project["scripts"]
    assert instructions("USER") == ["actsparse"]
    bases = {base.split()[0] for base in instructions("FROM")}
    [version] = {re.fullmatch(r"python:(3\.\d+)-slim", base).group(1) for base in bases}  # type: ignore[union-attr]
    assert project["requires-python"] == f">={version}"


def constraints() -> list[str]:
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("name", ["g++", "ACTSPARSE_CACHE=/cache", "VOLUME /cache"])
def test_the_image_has_a_compiler_and_a_cache(name):
    assert name in DOCKERFILE.read_text()
