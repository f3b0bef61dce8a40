"""The rules of timing, held on a clock that only moves when it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest

from memcompile.benchmarks.rules import (
    CACHES,
    CALLS_A_TURN,
    PACED,
    Bar,
    Contender,
    Timing,
    cache_sizes,
    measure,
    near_the_best,
    states_for,
)


class Work:
    """Contenders whose calls take as long as they are told, on a clock of their own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float, states: int = 3, after: float = 0) -> Contender:
        def call(state: int) -> None:
            self.calls.append((name, state))
            self.now += seconds

        def restore(_: int) -> None:
            self.now += after

        return Contender(name, call, states, 1, restore if after else None)


def turns(calls: list[tuple[str, int]]) -> list[str]:
    """The names in the order of their turns."""
    names = [name for name, _ in calls]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def test_every_round_starts_with_the_next_contender() -> None:
    work = Work()
    contenders = [work.contender(name, 1.0) for name in "abc"]
    measure(contenders, 3, clock=work.clock)
    # The first calls of each set how many a turn holds; then three rounds, each from another start.
    assert turns(work.calls[3 * (1 + PACED) :]) == [*"abc", *"bca", *"cab"]


def test_states_rotate_over_warm_up_and_turns() -> None:
    work = Work()
    measure([work.contender("a", 1.0, 3), work.contender("b", 1.0, 5)], 4, clock=work.clock)
    for name, states in (("a", 3), ("b", 5)):
        seen = [state for who, state in work.calls if who == name]
        assert seen == [i % states for i in range(len(seen))]


def test_the_first_call_of_a_turn_is_not_timed() -> None:
    work = Work()
    timing = measure([work.contender("a", 1.0), work.contender("b", 2.0)], 5, clock=work.clock)
    assert timing["a"].seconds == (1.0,) * 5
    assert timing["b"].seconds == (2.0,) * 5
    assert sum(name == "a" for name, _ in work.calls) == 1 + PACED + 5 * 2


def test_slow_first_calls_do_not_make_turns_short() -> None:
    work = Work()
    slow = iter((8.0, 4.0))

    def call(state: int) -> None:
        work.now += next(slow, 0.125)

    timing = measure([Contender("a", call, 1, 1)], 1, turn_seconds=0.5, clock=work.clock)
    assert timing["a"].seconds == (0.125,) * 4


def test_short_calls_fill_a_turn_and_long_ones_are_called_once() -> None:
    work = Work()
    contenders = [work.contender("short", 0.125), work.contender("long", 9.0)]
    timing = measure(contenders, 2, turn_seconds=0.5, clock=work.clock)
    assert len(timing["short"].seconds) == 2 * 4
    assert len(timing["long"].seconds) == 2
    work = Work()
    timing = measure([work.contender("tiny", 2.0**-20)], 1, clock=work.clock)
    assert len(timing["tiny"].seconds) == CALLS_A_TURN


def test_putting_a_state_back_takes_no_time() -> None:
    work = Work()
    timing = measure([work.contender("a", 1.0, after=50.0)], 3, clock=work.clock)
    assert set(timing["a"].seconds) == {1.0}
    assert work.now > 150


def test_what_is_far_behind_is_timed_once_and_left_out() -> None:
    work = Work()
    every = [work.contender(name, seconds) for name, seconds in (("a", 1), ("b", 3), ("c", 5))]
    kept, behind = near_the_best(every, 4.0, work.clock)
    assert [contender.name for contender in kept] == ["a", "b"]
    assert behind == {"c": 5.0}
    assert len(work.calls) == 6


def test_measure_refuses_what_means_nothing() -> None:
    work = Work()
    with pytest.raises(ValueError, match=r"names of their own.*\['a', 'a'\]"):
        measure([work.contender("a", 1), work.contender("a", 1)], 1)
    with pytest.raises(ValueError, match="at least one, got"):
        measure([], 1)
    with pytest.raises(ValueError, match="rounds is 0"):
        measure([work.contender("a", 1)], 0)


@pytest.mark.parametrize("size", [1, 1000, (1 << 20) - 1, 1 << 20, 3 << 20, 1 << 30])
def test_a_rotation_reads_more_than_four_caches(size: int) -> None:
    cache = 1 << 20
    states = states_for(size, cache)
    assert states * size > CACHES * cache
    assert states == 1 or (states - 1) * size <= CACHES * cache


def test_nothing_cannot_be_rotated() -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        states_for(0, 1)


def test_quartiles() -> None:
    assert Timing((5.0, 1.0, 4.0, 2.0, 3.0)).quartiles == (2.0, 3.0, 4.0)
    assert Timing((7.0,)).quartiles == (7.0, 7.0, 7.0)
    told = Timing((0.001, 0.002, 0.003)).to_json()
    assert told == {"ms": 2.0, "ms_quartiles": [1.5, 2.5], "samples": 3}


def test_cache_sizes_are_read_by_level_without_instructions(tmp_path: Path) -> None:
    caches = (("1", "Data", "32K"), ("1", "Instruction", "64K"), ("3", "Unified", "32M"))
    for i, (level, kind, size) in enumerate(caches):
        (tmp_path / f"index{i}").mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (tmp_path / f"index{i}" / name).write_text(text + "\n")
    assert cache_sizes(tmp_path) == {1: 32 << 10, 3: 32 << 20}
    assert cache_sizes(tmp_path / "nowhere") == {}


def test_bars() -> None:
    assert Bar("x", 2.0, 1.8).met is True
    assert Bar("x", 1.7, 1.8).met is False
    assert Bar("x", 1.9, 2.0, at_least=False).met is True
    assert Bar("x", 2.1, 2.0, at_least=False).met is False
    assert Bar("x", None, 2.0).met is None
    assert str(Bar("x", 1.7, 1.8)) == "x: 1.7 (≥ 1.8) MISSED"
    assert Bar("x", None, 2.0, at_least=False).to_json() == {
        "what": "x",
        "value": None,
        "at most": 2.0,
        "met": None,
    }
