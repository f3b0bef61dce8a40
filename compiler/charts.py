"""Line charts over contexts, both axes logarithmic: where everything stands, for a template."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 16, 12, 46
_TICKS = 6


@dataclass(frozen=True)
class Series:
    """A line to draw.

    Attributes:
        name: what the legend calls it.
        style: a class of the page's style sheet.
        points: context, value, and the least and the most seen where it was measured.
    """

    name: str
    style: str
    points: Sequence[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Mark:
    """A point of a line: where it stands, how far it was seen to reach, and what it says."""

    x: float
    y: float
    top: float
    bottom: float
    text: str


@dataclass(frozen=True)
class Line:
    name: str
    style: str
    path: str
    marks: list[Mark]


@dataclass(frozen=True)
class Chart:
    """A chart in the units of its view box.

    Attributes:
        key: unique on a page: its title and description are found by it.
        x_ticks, y_ticks: place and label.
        limit: where contexts end that the model has positions for, or None.
    """

    key: str
    title: str
    text: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]
    limit: float | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def chart(
    key: str,
    title: str,
    series: Sequence[Series],
    *,
    size_of: Callable[[int], str],
    value_of: Callable[[float], str],
    base: float = 2,
    limit: int | None = None,
) -> Chart:
    """A chart of `series`, whose values are positive.

    Args:
        size_of, value_of: a context and a value in words.
        base: what values on the axis are powers of.
    """
    contexts = sorted({point[0] for line in series for point in line.points})
    values = [value for line in series for point in line.points for value in point[1:]]
    left, right = math.log2(contexts[0]), math.log2(contexts[-1])
    if left == right:
        left, right = left - 1, right + 1
    low = math.floor(math.log(min(values), base))
    high = max(low + 1, math.ceil(math.log(max(values), base) - 1e-9))
    every = max(1, -(-(high - low) // _TICKS))
    high = low + -(-(high - low) // every) * every

    def across(context: float) -> float:
        share = (math.log2(context) - left) / (right - left)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def up(value: float) -> float:
        share = (math.log(value, base) - low) / (high - low)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    lines = []
    for given in series:
        marks = [
            Mark(
                *(across(context), up(value), up(most), up(least)),
                f"{given.name}, {size_of(context)} tokens: {value_of(value)}",
            )
            for context, value, least, most in given.points
        ]
        path = "M" + " L".join(f"{mark.x} {mark.y}" for mark in marks)
        lines.append(Line(given.name, given.style, path, marks))
    step = max(1, -(-len(contexts) // 6))
    shown = contexts[::-step][::-1]
    inside = limit is not None and contexts[0] < limit < contexts[-1]
    return Chart(
        key,
        title,
        ". ".join(
            f"{line.name}: {value_of(line.points[0][1])} at {size_of(line.points[0][0])} tokens, "
            f"{value_of(line.points[-1][1])} at {size_of(line.points[-1][0])}"
            for line in series
        ),
        [(across(context), size_of(context)) for context in shown],
        [(up(base**at), value_of(base**at)) for at in range(low, high + 1, every)],
        lines,
        across(limit) if inside and limit is not None else None,
    )
