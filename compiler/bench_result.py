"""What `memcompile bench` measured: as data, as JSON, as a table for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .report import bytes_of, size_of

if TYPE_CHECKING:
    from rich.console import Group

FORMAT, VERSION = "memcompile-bench", 1
FILLS = {
    "random": "random keys and values were written into the memory; the model read no context",
    "prefill": "random tokens were read by the model",
}
SAME = "the same engine, which reads every page"
OTHER = "the same model compiled with policy dense: a state cannot be read densely"


@dataclass(frozen=True)
class Seconds:
    """What a number of runs took: their median, the shortest, the longest."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, runs: Sequence[float]) -> Seconds:
        return cls(statistics.median(runs), min(runs), max(runs))


@dataclass(frozen=True)
class Point:
    """A step at one context.

    Attributes:
        context: tokens that the last of the timed steps had in reach, its own included.
        policy, dense: what a step took.
        policy_bytes, dense_bytes: what it read of the memory, as the engine counted.
        resident_bytes: what the policy's memory takes.
    """

    context: int
    policy: Seconds
    dense: Seconds
    policy_bytes: float
    dense_bytes: float
    resident_bytes: int

    @property
    def speedup(self) -> float:
        return self.dense.median / self.policy.median


@dataclass(frozen=True)
class Bench:
    """What was measured, and all that it depends on.

    Attributes:
        command: what was typed, with the folder's name alone.
        device, processor, threads, cache_bytes: where; the last-level cache is 0 where unknown.
        fill, baseline: how the memory was filled, and what dense is, in words.
        weight_bytes: the model's weights.
        rounds: steps timed at each context.
        prefill_tokens, prefill: a prefill of an empty memory, three times.
        points: one a context.
        notes: what a reader of the figures has to know.
    """

    date: str
    command: str
    model: str
    policy: str
    device: str
    processor: str
    threads: int
    cache_bytes: int
    memcompile: str
    torch: str
    kernels: str
    fill: str
    baseline: str
    weight_bytes: int
    rounds: int
    prefill_tokens: int
    prefill: Seconds
    points: list[Point] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def prefill_rate(self) -> float:
        """Tokens a second."""
        return self.prefill_tokens / self.prefill.median

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Bench:
        """Rebuilds it from `to_json`.

        Raises:
            ValueError: it is something else, of another version, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ValueError("not what `memcompile bench` writes")
        if data.get("version") != VERSION:
            raise ValueError(f"version {data.get('version')!r}, expected {VERSION}: bench it again")
        values = {key: value for key, value in data.items() if key not in ("format", "version")}
        try:
            values["prefill"] = _seconds(values["prefill"])
            values["points"] = [_point(point) for point in values["points"]]
            found = cls(**values)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"damaged: {error}") from error
        for name, kind in cls.__annotations__.items():
            value = getattr(found, name)
            if kind in ("str", "int") and type(value).__name__ != kind:
                raise ValueError(f"damaged: its {name!r} is {value!r:.40}")
        if not isinstance(found.notes, list) or not all(isinstance(n, str) for n in found.notes):
            raise ValueError(f"damaged: its 'notes' is {found.notes!r:.40}")
        return found


def _point(data: Mapping[str, Any]) -> Point:
    read = {**data, "policy": _seconds(data["policy"]), "dense": _seconds(data["dense"])}
    for name in ("context", "policy_bytes", "dense_bytes", "resident_bytes"):
        read[name] = _positive(name, read[name])
    return Point(**{**read, "context": int(read["context"])})


def _seconds(data: Mapping[str, Any]) -> Seconds:
    return Seconds(**{name: _positive(name, value) for name, value in data.items()})


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e18:
        raise ValueError(f"its {name!r} is {value!r:.40}")
    return value


def table(bench: Bench) -> Group:
    """The points as a table for the terminal, and what they depend on."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=f"{bench.model}, policy {bench.policy}: a decoded token",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for head in ("context", "policy, ms", "min - max", "dense, ms", "min - max", "dense / policy"):
        shown.add_column(head, justify="right", no_wrap=True)
    for head in ("read", "dense", "GB/s", "dense"):
        shown.add_column(head, justify="right", no_wrap=True)
    for point in bench.points:
        shown.add_row(*cells(point))
    lines = [
        f"prefill of {bench.prefill_tokens} tokens: {bench.prefill_rate:.0f} tokens/s",
        f"dense is {bench.baseline}; {bench.fill}",
        f"{bench.processor}; {threads_of(bench)}; {bench.device}; torch {bench.torch}; "
        f"kernels={bench.kernels}; {bench.rounds} rounds, medians",
        "GB/s: bytes read of the memory over the time of the whole step, weights left out",
    ]
    return Group(shown, *(Text(line) for line in (*lines, *(f"note: {n}" for n in bench.notes))))


def cells(point: Point) -> tuple[str, ...]:
    """A point as a row of words."""
    times = []
    for taken in (point.policy, point.dense):
        least, median, most = (
            milliseconds(seconds, "") for seconds in (taken.least, taken.median, taken.most)
        )
        times += [median, f"{least} - {most}"]
    return (
        size_of(point.context),
        *times,
        f"{point.speedup:.2f}",
        *(bytes_of(count) for count in (point.policy_bytes, point.dense_bytes)),
        f"{point.policy_bytes / point.policy.median / 1e9:.2f}",
        f"{point.dense_bytes / point.dense.median / 1e9:.2f}",
    )


def threads_of(bench: Bench) -> str:
    return f"{bench.threads} thread{'s' * (bench.threads != 1)}"


def milliseconds(seconds: float, unit: str = " ms") -> str:
    """With three digits: 0.0123 -> 12.3 ms."""
    count = seconds * 1000
    return f"{count:.0f}{unit}" if count >= 100 else f"{count:.3g}{unit}"
