"""Checks of given values, whose texts say what was given and what would do."""

from __future__ import annotations

import difflib
from typing import Any


def known(what: str, given: object, names: Any) -> None:
    """Refuses a name that is not in `names`, with the closest one and all of them."""
    if given not in [*names]:
        raise ValueError(f"unknown {what} {given!r}; {nearest(given, names)}")


def nearest(given: object, names: Any) -> str:
    """The end of a message about an unknown name: the closest one, and all of them."""
    listed = [str(name) for name in names]
    word = given if isinstance(given, str) else ""
    close = difflib.get_close_matches(word, listed, n=1, cutoff=0.7)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}known: {', '.join(listed)}"


# Positions are int32, and so is every count of tokens, pages and layers.
LARGEST = 2**31 - 1


def whole(what: str, given: object, least: int) -> None:
    """Refuses anything but an int (a bool is not one) from `least` to `LARGEST`."""
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {given!r}")
    if given > LARGEST:
        raise ValueError(f"{what} must be at most {LARGEST}: positions are 32 bit; got {given!r}")


def number(what: str, given: object, low: float, high: float) -> None:
    """Refuses anything but a real number in [low, high]."""
    real = isinstance(given, int | float) and not isinstance(given, bool)
    if not real or not low <= given <= high:  # type: ignore[operator]
        raise ValueError(f"{what} must be a number from {low} to {high}, got {given!r}")


def flag(what: str, given: object) -> None:
    """Refuses anything but True or False."""
    if not isinstance(given, bool):
        raise ValueError(f"{what} must be True or False, got {given!r}")
