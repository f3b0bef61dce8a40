"""The rules every timing obeys: contenders in turns, states in rotation, medians with quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CACHES = 4  # times the last-level cache: what a contender reads before it reads a byte again
ASSUMED_CACHE = 64 << 20  # where the machine does not say
CALLS_A_TURN = 24
PACED = 3  # calls whose fastest says how many a turn holds: those of a new session are slow
TURN_SECONDS = 0.02
FAR_BEHIND = 4.0


def cache_sizes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[int, int]:
    """Bytes of each data cache of a core by level; empty where the machine does not say."""
    sizes: dict[int, int] = {}
    for folder in sorted(root.glob("index*")):
        try:
            kind, level, size = (
                (folder / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
            sizes[int(level)] = int(size.rstrip("KMG")) * unit
    return sizes


def last_level_cache() -> int:
    """Bytes of the last-level cache."""
    sizes = cache_sizes()
    return sizes[max(sizes)] if sizes else ASSUMED_CACHE


def states_for(bytes_a_call: int, cache: int | None = None) -> int:
    """States to rotate over so that a round over them reads more than CACHES x the cache."""
    if bytes_a_call < 1:
        raise ValueError(f"a call that reads {bytes_a_call} bytes rotates over nothing")
    return CACHES * (last_level_cache() if cache is None else cache) // bytes_a_call + 1


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name: unique in its run.
        call: does the work once on the state of that number.
        states: how many there are; calls take them in order, round and round.
        floor: bytes that a call cannot but read, counted from shapes.
        after: puts the state back as it was, outside of the time.
    """

    name: str
    call: Callable[[int], Any]
    states: int
    floor: int
    after: Callable[[int], Any] | None = None
    at: int = field(default=0, init=False)

    def step(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """One call on the next state; the seconds that it took."""
        started = clock()
        self.call(self.at)
        seconds = clock() - started
        if self.after is not None:
            self.after(self.at)
        self.at = (self.at + 1) % self.states
        return seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of each measured call of one contender, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, middle, high

    @property
    def median(self) -> float:
        return self.quartiles[1]

    def to_json(self) -> dict[str, Any]:
        low, middle, high = (1e3 * q for q in self.quartiles)
        return {"ms": middle, "ms_quartiles": [low, high], "samples": len(self.seconds)}


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    *,
    turn_seconds: float = TURN_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times every contender in every round; each round starts with the next one.

    A turn is one call that is not timed, since the caches are full of another's code and data, and
    then timed calls: as many as fill `turn_seconds`, one at least and CALLS_A_TURN at most, their
    number set once, in a round before the first, by the fastest of PACED. A machine that slows down
    slows all of them.

    Raises:
        ValueError: no contenders, two of one name, or no rounds.
    """
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"contenders need names of their own and at least one, got {names}")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; give at least 1")
    calls = {}
    for contender in contenders:
        contender.step(clock)
        once = min(contender.step(clock) for _ in range(PACED))
        fitting = int(turn_seconds / once) if once > 0 else CALLS_A_TURN
        calls[contender.name] = min(max(1, fitting), CALLS_A_TURN)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                contender.step(clock)
                taken = [contender.step(clock) for _ in range(calls[contender.name])]
                seconds[contender.name] += taken
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def near_the_best(
    contenders: Sequence[Contender],
    factor: float = FAR_BEHIND,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Contender], dict[str, float]]:
    """Leaves out baselines so far behind that no round could make one the fastest.

    Returns:
        the contenders within `factor` of the fastest, and the others' seconds: of a second call,
        the first being warm-up.
    """
    seconds = {}
    for contender in contenders:
        contender.step(clock)
        seconds[contender.name] = contender.step(clock)
    most = factor * min(seconds.values())
    kept = [contender for contender in contenders if seconds[contender.name] <= most]
    return kept, {name: taken for name, taken in seconds.items() if taken > most}


@dataclass(frozen=True)
class Bar:
    """A figure that was asked for. `value` None: not measured in this run, neither met nor missed.

    Attributes:
        what: the figure and where it is taken.
        value: what was measured.
        bound: what was asked.
        at_least: whether the bound is the least or the most that will do.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        got = "not measured" if self.value is None else f"{self.value:.3g}"
        verdict = {None: "-", True: "met", False: "MISSED"}[self.met]
        return f"{self.what}: {got} ({sign} {self.bound:g}) {verdict}"

    def to_json(self) -> dict[str, Any]:
        kind = "at least" if self.at_least else "at most"
        return {"what": self.what, "value": self.value, kind: self.bound, "met": self.met}
