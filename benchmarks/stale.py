"""Whether a result is still one of the code that is here: of what its program imports, not of what else changed."""

import ast
import hashlib
import io
import subprocess
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bars import ROOT

FOLDER = Path(__file__).resolve().parent
# How results are written, not what is measured.
_PLUMBING = {"bars", "command"}
# What a module builds and runs without importing it.
_BUILT = {"actsparse/openvino/build.py": "actsparse/openvino/extension"}


def find_sources(*roots: Path) -> list[Path]:
    """
    List what a result is made of: files of this package and of the benchmarks.

    :param roots: The programs, and what else they read; of a folder, all its files.
    :return: The roots, and what they import, themselves or through others.
    """
    found: set[Path] = set()
    waiting = list(roots)
    while waiting:
        path = waiting.pop()
        if path.is_dir():
            waiting += [file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc"]
        elif path not in found:
            found.add(path)
            waiting += _imports_of(path) if path.suffix == ".py" else []
            waiting += [ROOT / built for module, built in _BUILT.items() if path == ROOT / module]
    return sorted(found)


def find_reason(git: dict[str, Any] | None, sources: list[Path]) -> str | None:
    """
    Tell why a result is stale.

    Functions, classes and other statements of a module are compared one by one with all that there were, without
    docstrings, comments and imports: code that only moved is the same.

    :param git: What the result says of the code that it was measured on.
    :param sources: What it is made of.
    :return: The reason; None for a result that is up to date.
    """
    commit = (git or {}).get("commit")
    if not isinstance(commit, str):
        return "does not say which commit was measured"
    short = commit[:10]
    if (git or {}).get("is_dirty") is not False:
        return f"was measured on {short} with changes that are in no commit"
    before = _statements_at(commit)
    if before is None:
        return f"was measured on {short}, which this checkout does not have"
    changed = [path for path in sources if not _statements_of(path.suffix, path.read_bytes()) <= before]
    if not changed:
        return None
    others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"was measured on {short}, and {changed[0].relative_to(ROOT)}{others} changed since"


def _imports_of(path: Path) -> Iterator[Path]:
    for module, name in _imported_names(path.read_bytes()):
        if module.partition(".")[0] == "actsparse":
            yield from _find(ROOT, module, name)
        elif path.parent == FOLDER and module not in _PLUMBING:
            yield from _find(FOLDER, module, name)


@cache
def _imported_names(contents: bytes) -> tuple[tuple[str, str], ...]:
    names: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(contents)):
        if isinstance(node, ast.ImportFrom):
            names += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.Constant) and str(node.value).startswith("actsparse."):  # as behind python -m
            names.append((str(node.value), ""))
    return tuple(names)


def _find(top: Path, module: str, name: str) -> Iterator[Path]:
    """Find where a name of a module is: a package often only hands it on."""
    place = top.joinpath(*module.split("."))
    package = place / "__init__.py"
    if place.with_name(f"{place.name}.py").is_file():
        yield place.with_name(f"{place.name}.py")
    elif (place / f"{name}.py").is_file():
        yield place / f"{name}.py"
    elif (place / name / "__init__.py").is_file() and name:
        yield place / name / "__init__.py"
    elif package.is_file():
        nodes = [node for node in ast.walk(ast.parse(package.read_bytes())) if isinstance(node, ast.ImportFrom)]
        homes = [(n.module, alias.name) for n in nodes for alias in n.names if (alias.asname or alias.name) == name]
        for home, original in homes:
            yield from _find(top, home or "", original)
        if not homes:
            yield package


class _Bare(ast.NodeTransformer):
    def visit_Import(self, _node: ast.Import) -> None: ...

    def visit_ImportFrom(self, _node: ast.ImportFrom) -> None: ...

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)


@cache
def _statements_of(suffix: str, contents: bytes) -> frozenset[str]:
    if suffix != ".py":
        return frozenset({hashlib.sha256(contents).hexdigest()})
    return frozenset(ast.dump(node) for node in _Bare().visit(ast.parse(contents)).body)


@cache
def _statements_at(commit: str) -> frozenset[str] | None:
    command = ["git", "--no-optional-locks", "archive", commit]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    if done.returncode != 0:
        return None
    found: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        for member in archive:
            contents = archive.extractfile(member)
            if contents is not None and not member.name.startswith(("tests/", "docs/")):
                found |= _statements_of(Path(member.name).suffix, contents.read())
    return frozenset(found)
