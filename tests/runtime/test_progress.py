"""The progress bar: on a terminal only, and gone afterwards."""

import io
import sys

import pytest

from actsparse.runtime.progress import progress_bar


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    # Not a fixture: pytest takes stderr back between the phases of a test.
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def run_steps(*, total: int | None, is_wanted: bool = True) -> None:
    with progress_bar("counting", total=total, unit="sheep", is_wanted=is_wanted) as advance:
        for _ in range(3):
            advance(2)


@pytest.mark.parametrize("total", [6, None])
def test_a_terminal_shows_what_is_done_and_how_far_and_nothing_stays(
    monkeypatch: pytest.MonkeyPatch, total: int | None
) -> None:
    terminal = open_terminal(monkeypatch)
    run_steps(total=total)
    shown = terminal.getvalue()
    assert "counting" in shown
    assert "sheep" in shown
    assert ("6/6" if total else "6/?") in shown
    # The last thing written erases the line.
    assert shown.endswith("\x1b[2K")


def test_nothing_is_shown_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    run_steps(total=6, is_wanted=False)
    assert terminal.getvalue() == ""


def test_nothing_is_shown_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    run_steps(total=6)
    assert capfd.readouterr() == ("", "")


def test_an_error_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    open_terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress_bar("counting", total=6):
        raise KeyboardInterrupt
