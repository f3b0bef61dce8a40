"""Exact values of position-only tensors: affine in an index, or piecewise constant in a distance.

Two shapes of function cover the positions and masks of decoder models. An `Affine` value is
``offset + sum(coefficient[d] * index[d])`` over the token or batch axes of a tensor (arange,
position ids, ``ones.cumsum``). A `Steps` value is a function of ``index[row] - index[col]`` that is
constant between integer break points (every comparison of two affine values, every mask made of
them). Both are closed under the operations that mask code uses, so a mask rule is computed, never
matched against known spellings.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .result import MaskRule

Number = int | float | bool

# Hidden keys are given minus infinity, the dtype's minimum, or a large negative number; -1e4 is the
# weakest that models in use rely on (exp(-1e4) is 0 in every precision).
HIDDEN_LOGIT = -1e4
_MAX_PIECES = 64


@dataclass(frozen=True)
class Affine:
    """``offset + sum(coefficients[d] * index[d])``; `coefficients` has no zeros."""

    offset: Number
    coefficients: tuple[tuple[int, Number], ...]

    @staticmethod
    def of(offset: Number, coefficients: dict[int, Number]) -> Affine | Steps:
        """The affine value, or the constant it is when every coefficient vanishes."""
        kept = tuple(sorted((d, c) for d, c in coefficients.items() if c != 0))
        return Affine(offset, kept) if kept else Steps.uniform(offset)

    def moved(self, where: Callable[[int], int | None]) -> Affine | None:
        """The same value after its axes moved; None when an axis it depends on is gone."""
        moved = {}
        for axis, coefficient in self.coefficients:
            target = where(axis)
            if target is None:
                return None
            moved[target] = coefficient
        return Affine(self.offset, tuple(sorted(moved.items())))


@dataclass(frozen=True)
class Steps:
    """``values[i]`` where `i` counts the breaks <= ``index[row] - index[col]``."""

    breaks: tuple[int, ...]
    values: tuple[Number, ...]
    row: int = -1
    col: int = -1

    @staticmethod
    def uniform(value: Number) -> Steps:
        return Steps((), (value,))

    @property
    def is_uniform(self) -> bool:
        return not self.breaks

    @property
    def value(self) -> Number:
        """The one value of a uniform tensor."""
        return self.values[0]

    def at(self, distance: int) -> Number:
        return self.values[bisect.bisect_right(self.breaks, distance)]

    def flipped(self) -> Steps:
        """The same tensor seen as a function of ``index[col] - index[row]``."""
        breaks = tuple(1 - b for b in reversed(self.breaks))
        return Steps(breaks, tuple(reversed(self.values)), self.col, self.row)

    def moved(self, where: Callable[[int], int | None]) -> Steps | None:
        """The same value after its axes moved; None when an axis it depends on is gone."""
        if self.is_uniform:
            return self
        row, col = where(self.row), where(self.col)
        return None if row is None or col is None else Steps(self.breaks, self.values, row, col)


Exact = Affine | Steps


def compact(steps: Steps) -> Steps:
    """Drop breaks between equal values."""
    breaks: list[int] = []
    values = [steps.values[0]]
    for at, value in zip(steps.breaks, steps.values[1:], strict=True):
        if value != values[-1] or type(value) is not type(values[-1]):
            breaks.append(at)
            values.append(value)
    if not breaks:
        return Steps.uniform(values[0])
    return Steps(tuple(breaks), tuple(values), steps.row, steps.col)


def align(operands: Sequence[Steps]) -> tuple[tuple[int, ...], list[list[Number]], int, int] | None:
    """Operands over one common set of breaks, or None when they speak of different axes."""
    axes = {(s.row, s.col) for s in operands if not s.is_uniform}
    if len({frozenset(a) for a in axes}) > 1:
        return None
    row, col = next(iter(axes), (-1, -1))
    turned = [s if s.is_uniform or s.row == row else s.flipped() for s in operands]
    breaks = tuple(sorted({b for s in turned for b in s.breaks}))
    if len(breaks) > _MAX_PIECES:
        return None
    points = [(breaks[0] - 1) if breaks else 0, *breaks]
    return breaks, [[s.at(p) for p in points] for s in turned], row, col


def compare(relation: Callable[[Number, Number], bool], a: Exact, b: Exact) -> Steps | None:
    """``relation(a, b)`` elementwise, or None when it is no function of one distance."""
    difference = add(a, b, -1)
    if difference is None:
        return None
    if isinstance(difference, Steps):
        return Steps.uniform(relation(difference.value, 0)) if difference.is_uniform else None
    if len(difference.coefficients) != 2:
        return None
    (row, slope), (col, other) = difference.coefficients
    if slope != -other:
        return None
    if slope < 0:
        row, col, slope = col, row, other
    # slope * distance + offset against 0: below, at and above the root.
    root = -difference.offset / slope
    below, at, above = relation(-1, 0), relation(0, 0), relation(1, 0)
    if root == math.floor(root):
        r = int(root)
        return compact(Steps((r, r + 1), (below, at, above), row, col))
    return compact(Steps((math.ceil(root),), (below, above), row, col))


def add(a: Exact, b: Exact, sign: Number = 1) -> Exact | None:
    """``a + sign * b`` when one of them is affine or both are uniform."""
    parts = []
    for operand in (a, b):
        if isinstance(operand, Affine):
            parts.append((operand.offset, dict(operand.coefficients)))
        elif operand.is_uniform:
            parts.append((operand.value, {}))
        else:
            return None
    (offset, coefficients), (other_offset, other) = parts
    for axis, coefficient in other.items():
        coefficients[axis] = coefficients.get(axis, 0) + sign * coefficient
    return Affine.of(offset + sign * other_offset, coefficients)


def scale(a: Exact, factor: Number) -> Exact:
    """``factor * a`` for an affine value."""
    assert isinstance(a, Affine)
    return Affine.of(a.offset * factor, {axis: c * factor for axis, c in a.coefficients})


def mask_rule(mask: Steps, rank: int) -> MaskRule | str:
    """The rule of an attention mask over (query, key) = the last two axes, or why it is none.

    Boolean masks show a key where True; additive ones where 0, and hide it at or below -1e4.
    """
    if not mask.is_uniform and (mask.row, mask.col) == (rank - 1, rank - 2):
        mask = mask.flipped()
    if not mask.is_uniform and (mask.row, mask.col) != (rank - 2, rank - 1):
        return "the mask does not run over the query and the key axis"
    visible = []
    for value in mask.values:
        if isinstance(value, bool):
            visible.append(value)
        elif value == 0:
            visible.append(True)
        elif value <= HIDDEN_LOGIT:
            visible.append(False)
        else:
            return f"the mask adds {value:g} to some logits: a bias by distance, not a mask"
    seen = compact(Steps(mask.breaks, tuple(visible), mask.row, mask.col))
    if seen.breaks == (0,) and seen.values == (False, True):
        return MaskRule("causal")
    if len(seen.breaks) == 2 and seen.breaks[0] == 0 and seen.values == (False, True, False):
        return MaskRule("window", seen.breaks[1])
    if seen.is_uniform and seen.value:
        return MaskRule("full")
    return f"keys are visible at distances {_intervals(seen)}: known are >= 0 and 0 <= d < window"


def _intervals(seen: Steps) -> str:
    edges = [-math.inf, *seen.breaks, math.inf]
    shown = [
        f"[{low:g}, {high:g})"
        for low, high, value in zip(edges, edges[1:], seen.values, strict=False)
        if value
    ]
    return " or ".join(shown) or "none"
