"""What is being done, on stderr: a line while a stage lasts, a bar where the steps are counted.

Whoever works says so with `doing`, `bar` and `note`; whether anything is shown is for whoever calls
from a terminal to say, with `shown`. Without it nothing is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_listener: ContextVar[_Listener | None] = ContextVar("listener", default=None)


class _Listener:
    """Shows the stages that are under way, the innermost last, in one line that goes again."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.draws = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self._stages: list[str] = []
        self._line: Progress | None = None

    def enter(self, words: str) -> None:
        self._stages.append(words)
        self._draw()

    def leave(self) -> None:
        self._stages.pop()
        self._draw()

    def _draw(self) -> None:
        if not self.draws:
            return
        if not self._stages:
            if self._line is not None:
                self._line.stop()
            self._line = None
            return
        if self._line is None:
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            # What a stage prints to stdout is no part of the line.
            self._line = Progress(
                *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
            )
            self._line.add_task("", total=None)
            self._line.start()
        self._line.reset(self._line.task_ids[0], description=": ".join(self._stages))


@contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """Shows what is done within, where stderr is a terminal; with `quiet`, nothing at all."""
    token = _listener.set(_Listener(quiet))
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def doing(words: str) -> Iterator[None]:
    """Says what the block does, in a word or two, while it does it."""
    listener = _listener.get()
    if listener is None:
        yield
        return
    listener.enter(words)
    try:
        yield
    finally:
        listener.leave()


def note(text: str) -> None:
    """A line on stderr that stays, terminal or not; nothing under `--quiet`."""
    listener = _listener.get()
    if listener is None or not listener.quiet:
        print(text, file=sys.stderr)


@contextmanager
def bar(total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """A bar for `total` steps, `done` of them already; call what it gives after each further one,
    with a few words. Not within `doing`: a terminal has one place to draw."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    listener = _listener.get()
    draws = listener is not None and listener.draws
    with Progress(*columns, console=Console(stderr=True), disable=not draws) as progress:
        task = progress.add_task("starting", total=total, completed=done)

        def advance(words: str) -> None:
            progress.update(task, description=words, advance=1)

        yield advance
