"""How to compile, as the environment says it: MEMCOMPILE_KERNELS and MEMCOMPILE_DEBUG."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

KERNELS = ("auto", "required", "off")


def kernels(given: str | None) -> str:
    """`given`, or MEMCOMPILE_KERNELS, or "auto".

    auto generates kernels and falls back on the references, saying so; required raises instead;
    off runs the references and lowers nothing.
    """
    chosen = given if given is not None else os.environ.get("MEMCOMPILE_KERNELS") or "auto"
    if chosen not in KERNELS:
        raise ValueError(f"kernels is {chosen!r}; known: {', '.join(KERNELS)}")
    return chosen


def debug(level: int, text: Callable[[], str]) -> None:
    """Print `text` to stderr when MEMCOMPILE_DEBUG is at least `level`.

    1 report, 2 graph after each pass, 3 where generated sources lie.
    """
    given = os.environ.get("MEMCOMPILE_DEBUG") or "0"
    if not given.isdecimal():
        raise ValueError(f"MEMCOMPILE_DEBUG is {given!r}; give 0, 1, 2 or 3")
    if int(given) >= level:
        print(text(), file=sys.stderr)
