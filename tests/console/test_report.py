"""What tables and pictures show of a sparsity report, and reports as Markdown."""

from pathlib import Path
from typing import Any

import pytest

from actsparse.console import plot
from actsparse.console.report import sparsity_table, table_markdown
from actsparse.sparsity_report import LayerSparsity, SparsityReport


@pytest.fixture
def report() -> SparsityReport:
    """Two layers that are asked for one sparsity and given two, and one that nothing is known of."""
    layers = [
        LayerSparsity("a", "a", ("ffn.down",), 0.5, 0.375, 0.36, 1.0),
        LayerSparsity("b", "b", ("ffn.down",), 0.5, 0.625, 0.64, 1.0),
        LayerSparsity("c", "c", (), None, None, 0.2, 1.0),
    ]
    return SparsityReport(tuple(layers), 4.0, "all")


def test_a_table_shows_what_was_asked_for_beside_what_was_allocated(report: SparsityReport) -> None:
    columns = {str(column.header): list(column.cells) for column in sparsity_table(report, "title").columns}
    assert columns["role"][:2] == ["ffn.down", "other"]
    assert columns["target"] == ["50.0%", "–", "", ""]
    assert columns["allocated"] == ["37.5% – 62.5%", "–", "", ""]
    assert columns["measured"] == ["50.0%", "20.0%", "40.0%", "30.0%"]


def test_a_picture_shows_what_was_asked_for_beside_what_was_allocated(
    report: SparsityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, _path: figures.append(figure))
    plot.plot_sparsity_by_layer({"a text": report}, tmp_path / "x.png")
    (panel,) = figures[0].axes
    lines = {(line.get_color(), line.get_linestyle()): list(line.get_ydata()) for line in panel.get_lines()}
    assert lines["C0", "-"] == pytest.approx([36, 64])
    assert lines["C0", "--"] == pytest.approx([37.5, 62.5])
    assert lines["C0", ":"] == pytest.approx([50, 50])


def test_markdown_is_a_table_with_its_settings_below() -> None:
    text = table_markdown(("model", "sparsity"), [("dense", "–"), ("sparse", "50.0%")], {"threads": 2, "text": "a"})
    assert text.splitlines() == [
        "| model | sparsity |",
        "| --- | ---: |",
        "| dense | – |",
        "| sparse | 50.0% |",
        "",
        "- threads: 2",
        "- text: a",
    ]
