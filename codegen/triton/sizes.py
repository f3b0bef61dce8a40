"""Sizes that are not known yet: what launchers compute from shapes, kept as formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

# Sizes are whole and not negative, so that C's division is the launchers' floor division.
_PRECEDENCE = {"max": 3, "min": 3, "//": 2, "*": 2, "+": 1, "-": 1}


class Size:
    """A named size, or what is computed from some: +, -, *, // with sizes and whole numbers.

    It cannot be compared or made a number: a launcher that decides by a size does so by the
    functions of `shapes.py`, or is found out.
    """

    __slots__ = ("given", "op")  # op: "name", "number", or a key of _VALUES

    def __init__(self, op: str, *given: Size | int | str) -> None:
        self.op, self.given = op, given

    @property
    def names(self) -> tuple[str, ...]:
        """The named sizes in it, in order."""
        if self.op in ("name", "number"):
            return (str(self.given[0]),) if self.op == "name" else ()
        inner = (part.names for part in self.given if isinstance(part, Size))
        return tuple(dict.fromkeys(name for names in inner for name in names))

    def value(self, sizes: Mapping[str, int]) -> int:
        """What it is for given sizes."""
        if self.op in ("name", "number"):
            known = self.given[0]
            return sizes[str(known)] if self.op == "name" else int(str(known))
        left, right = (evaluate(part, sizes) for part in self.given)
        return _VALUES[self.op](left, right)

    def bound(self, known: Mapping[str, Size | int]) -> Size | int:
        """With sizes in place of names that are known."""
        if self.op == "name":
            return known.get(str(self.given[0]), self)
        if self.op == "number":
            return int(str(self.given[0]))
        left, right = (
            part.bound(known) if isinstance(part, Size) else int(part) for part in self.given
        )
        if isinstance(left, int) and isinstance(right, int):
            return _VALUES[self.op](left, right)
        made: Size = _MADE[self.op](left, right)
        return made

    def text(self, division: str = "//", name: Callable[[str], str] = str, inside: int = 0) -> str:
        """As Python reads it; for C, with `division` "/" and a spelling of names.

        `max` and `min` are written as calls.
        """
        if self.op in ("name", "number"):
            return name(str(self.given[0])) if self.op == "name" else str(self.given[0])
        own = _PRECEDENCE[self.op]
        call = own == 3
        # The right side of a difference or product, and both of a division, keep their brackets.
        bounds = (0, 0) if call else (own, own + (self.op != "+"))
        if self.op == "//":
            bounds = (3, 3)
        sides = [
            part.text(division, name, bound) if isinstance(part, Size) else str(part)
            for part, bound in zip(self.given, bounds, strict=True)
        ]
        if call:
            return f"{self.op}({', '.join(sides)})"
        sign = division if self.op == "//" else self.op
        written = f" {sign} ".join(sides)
        return f"({written})" if own < inside else written

    __str__ = text

    def __repr__(self) -> str:
        return f"Size({self.text()})"

    def __add__(self, other: Size | int) -> Size:
        return self._shifted(other) if isinstance(other, int) else Size("+", self, other)

    def __sub__(self, other: Size | int) -> Size:
        return self._shifted(-other) if isinstance(other, int) else Size("-", self, other)

    def _shifted(self, by: int) -> Size:
        """Itself and a number, which joins one that was added before."""
        base, held = self, 0
        if self.op in ("+", "-") and isinstance(self.given[1], int):
            assert isinstance(self.given[0], Size)
            base, held = self.given[0], self.given[1] * (1 if self.op == "+" else -1)
        total = held + by
        if total == 0:
            return base
        return Size("+", base, total) if total > 0 else Size("-", base, -total)

    def __mul__(self, other: Size | int) -> Size:
        return self if isinstance(other, int) and other == 1 else Size("*", self, other)

    def __rmul__(self, other: int) -> Size:
        return self if other == 1 else Size("*", other, self)

    def __floordiv__(self, other: Size | int) -> Size:
        return self if isinstance(other, int) and other == 1 else Size("//", self, other)

    def __rfloordiv__(self, other: int) -> Size:
        return Size("//", other, self)

    __radd__ = __add__

    def __rsub__(self, other: int) -> Size:
        return Size("-", other, self)

    def _undecided(self, *_: Any) -> Any:
        raise TypeError(f"a launcher decides by {self!r}, which is not known")

    __bool__ = __int__ = __index__ = __lt__ = __le__ = __gt__ = __ge__ = _undecided

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Size):
            return self.text() == other.text()
        self._undecided()
        return False

    def __hash__(self) -> int:
        return hash(self.text())

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # sym_max and sym_min are how launchers bound what is not known.
        for known, op in ((torch.sym_max, "max"), (torch.sym_min, "min")):
            if function is known:
                return cls(op, *args)
        return NotImplemented


_VALUES: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "max": max,
    "min": min,
}


_MADE: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "max": lambda a, b: Size("max", a, b),
    "min": lambda a, b: Size("min", a, b),
}


def evaluate(part: Size | int | str, sizes: Mapping[str, int]) -> int:
    """A size or a number as a number."""
    return part.value(sizes) if isinstance(part, Size) else int(part)
