"""The documentation: it builds, its links lead somewhere, it has every public name, and the code is as it says."""

import ast
import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import actsparse
import actsparse.openvino
from actsparse import cli

from .test_architecture import ORDER

ROOT = Path(__file__).parents[1]
MARKDOWN = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(file for folder in ("docs", "benchmarks", "examples") for file in sorted((ROOT / folder).rglob("*.md"))),
]
# What a page loads by itself, unlike what a reader may follow.
LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src")}


@dataclass
class Page(HTMLParser):
    """What a page links to, loads, and can be linked to by."""

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id":
                self.anchors.add(value)
            if name in ("href", "src"):
                self.links.append(value)
            if (tag, name) in LOADED and not (tag == "link" and ("rel", "canonical") in attrs):
                self.loaded.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # A proxy that nobody listens at: what asks the network fails.
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    pages = {}
    for file in site.rglob("*.html"):
        pages[file] = Page()
        pages[file].feed(file.read_text())
    return pages


def broken_links(pages: dict[Path, Page]) -> list[str]:
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            # The page of a missing page has absolute links, for wherever it is shown.
            if parts.scheme or parts.netloc or link.startswith("/"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            is_anchored = not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            if not target.is_file() or not is_anchored:
                broken.append(f"{file.name}: {link}")
    return broken


def test_every_link_and_anchor_leads_somewhere(pages):
    assert len(pages) > 10
    assert broken_links(pages) == []


def test_a_broken_link_and_a_broken_anchor_are_found(tmp_path):
    page = Page()
    page.feed('<a href="other.html">x</a><a href="#here">x</a><a id="there" href="#there">x</a>')
    (tmp_path / "page.html").touch()
    assert broken_links({tmp_path / "page.html": page}) == ["page.html: other.html", "page.html: #here"]


def test_pages_load_nothing_from_elsewhere(pages):
    elsewhere = [link for page in pages.values() for link in page.loaded if urlsplit(link).netloc]
    assert elsewhere == []


def test_every_public_name_is_in_the_reference(pages):
    anchors = {anchor for page in pages.values() for anchor in page.anchors}
    of_openvino = {
        name
        for name, value in vars(actsparse.openvino).items()
        if getattr(value, "__module__", "").startswith("actsparse.") and not name.startswith("_")
    }
    assert {"accelerate", "deploy_model"} <= of_openvino
    wanted = {f"actsparse.{name}" for name in actsparse._HOMES} | {f"actsparse.openvino.{name}" for name in of_openvino}
    assert wanted - anchors == set()


def test_every_command_and_its_options_are_in_the_reference(site):
    text = (site / "reference" / "command_line.html").read_text()
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert f"actsparse {command.callback.__name__}</code>" in text
    assert "--fail-above P" in text


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_in_markdown_lead_to_files_and_headings(file):
    text = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        assert target.exists(), link
        if parts.fragment:
            assert parts.fragment in headings(target), link


def headings(file: Path) -> set[str]:
    """Name a file's headings as the places that show Markdown do."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_page_begins_with_the_two_commands_and_fits_on_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line.partition(" #")[0].strip() for line in lines[3:5]] == ["make demo", "make test"]
    assert len(lines) <= 120


@pytest.mark.parametrize("file", MARKDOWN, ids=lambda file: str(file.relative_to(ROOT)))
def test_python_in_markdown_imports_what_there_is(file):
    for code in re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_architecture_lists_the_folders_in_their_order():
    listed = (ROOT / "docs" / "architecture.md").read_text().partition("## Folders")[2].split("```")[1]
    names = [line.split()[0].removesuffix("/").removesuffix(".py") for line in listed.splitlines() if line]
    assert (*names, "__init__", "__main__") == ORDER
