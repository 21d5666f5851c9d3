"""The history of a job: a file for each case and commit, in the order of commits, and a plot for each case."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actsparse.commands.regression.figures import KINDS, CaseResult
from actsparse.commands.regression.job import append_result, draw_history, read_history
from actsparse.console.plot import _HISTORY
from actsparse.errors import SourceError


def test_results_are_kept_by_commit_and_drawn_in_its_order(
    make_result: Callable[..., CaseResult], tmp_path: Path
) -> None:
    for number, commit in enumerate("cab"):
        append_result(
            tmp_path, make_result(0.1 * number, commit=commit * 40, when=f"2026-11-0{number + 1}T00:00:00+02:00")
        )
    append_result(tmp_path, make_result(0.5, commit="a" * 40, when="2026-11-02T00:00:00+02:00"))
    append_result(tmp_path, make_result(name="other"))
    found = read_history(tmp_path)
    assert [result.git["commit"][0] for result in found["small"]] == ["c", "a", "b"]
    assert found["small"][1] == make_result(0.5, commit="a" * 40, when="2026-11-02T00:00:00+02:00")
    assert [path.name for path in draw_history(tmp_path)] == ["other.png", "small.png"]
    assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_or_damaged_history_is_told(make_result: Callable[..., CaseResult], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no results"):
        draw_history(tmp_path)
    for when in ("0001-01-01T00:00:00+14:00", "yesterday"):
        path = append_result(tmp_path, make_result(when=when))
        with pytest.raises(SourceError, match="does not say when"):
            draw_history(tmp_path)
    path.write_text("{}")
    with pytest.raises(SourceError, match="lacks the key"):
        draw_history(tmp_path)


def test_every_figure_has_its_place_in_the_plot() -> None:
    panels = [name for names in _HISTORY.values() for name in names]
    assert sorted(panels) == sorted(KINDS)
