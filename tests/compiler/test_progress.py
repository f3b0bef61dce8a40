"""What is being done shows on a terminal, while it is done, unless --quiet."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from memcompile.compiler.progress import bar, doing, note, shown
from memcompile.compiler.report import stage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes stderr a terminal, from when it is called."""

    def put() -> Terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", made := Terminal())
        return made

    return put


def work() -> None:
    with stage({}, "capture"):
        pass
    with doing("scout"), stage({}, "kernels"):
        pass
    with bar(2) as advance:
        advance("half")
    note("kept")


def test_stages_show_one_within_another(terminal: Any) -> None:
    drawn = terminal()
    with shown():
        work()
    for part in ("capture", "scout: kernels", "half", "kept\n"):
        assert part in drawn.getvalue()
    # The cursor is back, and the line of the stages is gone.
    assert drawn.getvalue().count("\x1b[?25h") == drawn.getvalue().count("\x1b[?25l") > 0


def test_a_stage_that_fails_leaves_the_terminal_as_it_was(terminal: Any) -> None:
    drawn = terminal()
    with shown(), pytest.raises(ValueError, match="broken"), stage({}, "capture"):
        raise ValueError("broken")
    assert drawn.getvalue().count("\x1b[?25h") == drawn.getvalue().count("\x1b[?25l") > 0


def test_quiet_shows_nothing(terminal: Any) -> None:
    drawn = terminal()
    with shown(quiet=True):
        work()
    assert drawn.getvalue() == ""


def test_nothing_is_drawn_for_a_caller_who_did_not_ask(terminal: Any) -> None:
    drawn = terminal()
    work()
    assert drawn.getvalue() == "kept\n"


def test_a_pipe_gets_lines_that_stay_and_nothing_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with shown():
        work()
    assert capsys.readouterr() == ("", "kept\n")


@pytest.mark.parametrize("quiet", [True, False])
def test_commands_show_stages_unless_quiet(say: Any, terminal: Any, quiet: bool) -> None:
    drawn = terminal()
    assert say("inspect", "missing.pt", *(["--quiet"] if quiet else [])).code == 2
    assert "missing.pt: there is no such file" in drawn.getvalue()
    assert ("load" in drawn.getvalue()) == (not quiet)
