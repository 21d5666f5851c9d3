"""Data flows one way: no file imports in a circle, and no folder imports one that stands above it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "actsparse"
# From the ground up: each may import what stands before it, and itself.
ORDER = (
    "errors",
    "runtime",
    "scopes",
    "mask",
    "algorithms",
    "storage",
    "sparsity_report",
    "calibration",
    "torch",
    "texts",
    "openvino",
    "backend",
    "evaluation",
    "sparsify",
    "thresholds",
    "models",
    "console",
    "recovery",
    "budget",
    "distributed",
    "commands",
    "cli",
    "__init__",
    "__main__",
)


def find_modules() -> dict[str, Path]:
    modules = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


MODULES = find_modules()


def find_imports(name: str) -> set[str]:
    """List what a file imports of the package, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names = [f"{node.module}.{x}" if f"{node.module}.{x}" in MODULES else str(node.module) for x in names]
        found |= {x for x in names if x in MODULES}
    return found - {name}


IMPORTS = {name: find_imports(name) for name in MODULES}


def place_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def test_the_package_was_found() -> None:
    assert len(MODULES) > 100
    assert sum(map(len, IMPORTS.values())) > 300


def test_no_file_imports_in_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_file_and_folder_at_the_top_has_a_place() -> None:
    assert {place_of(name) for name in MODULES} == {*ORDER}


def test_no_import_runs_back_up() -> None:
    level = {place: number for number, place in enumerate(ORDER)}
    arrows = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if level[place_of(other)] > level[place_of(name)]
    ]
    assert not arrows


def test_only_the_door_asks_which_framework_a_model_is_of() -> None:
    asking = [name for name, path in MODULES.items() if "find_openvino_model" in path.read_text()]
    assert asking == ["actsparse.backend"]


def test_the_top_level_holds_the_nouns_of_the_design_alone() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12
