"""The vocabulary of memories: tiers and operations as frozen, validated, JSON-able dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

# Which record of a page a score reads, and what a page's summary needs to stand in for the page.
SCORE_FIELDS: dict[str, tuple[str, ...]] = {
    "mean": ("mean",),
    "mean-std": ("mean", "std"),
    "box": ("min", "max"),
    "ball": ("mean", "radius"),
}
SUMMARY_FIELDS: tuple[str, ...] = ("mean", "value_mean", "log_count")
INDEX_FIELDS: tuple[str, ...] = ("mean", "std", "min", "max", "radius", "value_mean", "log_count")


def fields_for(score: str, compensate: bool) -> tuple[str, ...]:
    """Index fields, in storage order, that a page score and compensation need.

    Raises:
        ValueError: unknown score; the known ones are listed.
    """
    known("score", score, SCORE_FIELDS)
    wanted = {*SCORE_FIELDS[score], *(SUMMARY_FIELDS if compensate else ())}
    return tuple(field for field in INDEX_FIELDS if field in wanted)


def field_width(field: str, key_dim: int, value_dim: int) -> int:
    """Elements one page's record holds for `field`."""
    known("index field", field, INDEX_FIELDS)
    if field in ("radius", "log_count"):
        return 1
    return value_dim if field == "value_mean" else key_dim


def known(what: str, given: object, names: Any) -> None:
    """Refuses a name that is not in `names`, listing those that are."""
    if given not in [*names]:
        raise ValueError(f"unknown {what} {given!r}; known: {', '.join(map(str, names))}")


def whole(what: str, given: object, least: int) -> None:
    """Refuses anything but an int (a bool is not one) that is at least `least`."""
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise ValueError(f"{what} must be a whole number of at least {least}, got {given!r}")


def number(what: str, given: object, low: float, high: float) -> None:
    """Refuses anything but a real number in [low, high]."""
    real = isinstance(given, int | float) and not isinstance(given, bool)
    if not real or not low <= given <= high:  # type: ignore[operator]
        raise ValueError(f"{what} must be a number from {low} to {high}, got {given!r}")


def flag(what: str, given: object) -> None:
    """Refuses anything but True or False."""
    if not isinstance(given, bool):
        raise ValueError(f"{what} must be True or False, got {given!r}")


@dataclass(frozen=True)
class Part:
    """A tier or an operation; `kind_name` is its name in JSON."""

    kind_name: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"part": self.kind_name, **plain}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Rebuilds the part; `cls` may be Part itself, which reads the kind from the data.

        Raises:
            ValueError: unknown kind or key; the known ones are listed.
        """
        if not isinstance(data, dict) or "part" not in data:
            raise ValueError(f'a part of a memory is {{"part": ..., ...}}, got {data!r}')
        known("part", data["part"], PARTS)
        kind = PARTS[data["part"]]
        if not issubclass(kind, cls):
            raise ValueError(f"expected the part {cls.kind_name!r}, got {data['part']!r}")
        names = [f.name for f in dataclasses.fields(kind)]
        given = {k: v for k, v in data.items() if k != "part"}
        for name in given:
            known(f"key of {kind.kind_name}", name, names)
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


# Tiers: what a site remembers, per layer and KV head.


@dataclass(frozen=True)
class Sinks(Part):
    """The first `tokens` tokens, read exactly by every query and never evicted."""

    kind_name = "sinks"
    tokens: int

    def __post_init__(self) -> None:
        whole("sinks.tokens", self.tokens, 1)


@dataclass(frozen=True)
class Window(Part):
    """The most recent `tokens` tokens, read exactly by every query."""

    kind_name = "window"
    tokens: int

    def __post_init__(self) -> None:
        whole("window.tokens", self.tokens, 1)


@dataclass(frozen=True)
class Pages(Part):
    """Exact keys and values in pages of `page_size` tokens behind a page table."""

    kind_name = "pages"
    page_size: int = 64

    def __post_init__(self) -> None:
        whole("page_size", self.page_size, 1)
        if not 8 <= self.page_size <= 1024 or self.page_size & (self.page_size - 1):
            raise ValueError(
                f"page_size must be a power of two from 8 to 1024, got {self.page_size}; "
                "64 suits most models"
            )


@dataclass(frozen=True)
class Index(Part):
    """One record a page, holding `fields` (some of INDEX_FIELDS)."""

    kind_name = "index"
    fields: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.fields, tuple) or not self.fields:
            raise ValueError(f"index.fields must name some of {INDEX_FIELDS}, got {self.fields!r}")
        for name in self.fields:
            known("index field", name, INDEX_FIELDS)
        if len(set(self.fields)) != len(self.fields):
            raise ValueError(f"index.fields names a field twice: {self.fields!r}; name each once")


@dataclass(frozen=True)
class State(Part):
    """Fixed-size recurrent state, written by `rule`, with keys passed through `feature_map`."""

    kind_name = "state"
    RULES: ClassVar[tuple[str, ...]] = ("linear", "decay", "gated", "delta", "gated-delta", "ssm")
    MAPS: ClassVar[tuple[str, ...]] = ("identity", "elu", "softmax", "relu")
    rule: str
    feature_map: str = "identity"
    normalised: bool = False

    def __post_init__(self) -> None:
        known("state rule", self.rule, self.RULES)
        known("feature map", self.feature_map, self.MAPS)
        flag("state.normalised", self.normalised)


@dataclass(frozen=True)
class Archive(Part):
    """What consolidation left: compacted (key, bias, value) triples, or one state a segment."""

    kind_name = "archive"
    HOLDS: ClassVar[tuple[str, ...]] = ("compacted", "states")
    holds: str
    slots: int

    def __post_init__(self) -> None:
        known("archive content", self.holds, self.HOLDS)
        whole("archive.slots", self.slots, 1)


@dataclass(frozen=True)
class Prefix(Part):
    """`tokens` learned keys and values in front of every sequence."""

    kind_name = "prefix"
    tokens: int

    def __post_init__(self) -> None:
        whole("prefix.tokens", self.tokens, 1)


# Operations: what is done to the tiers.


@dataclass(frozen=True)
class Write(Part):
    """How a new token enters: appended, admitted by a gate, or merged into the last slot."""

    kind_name = "write"
    KINDS: ClassVar[tuple[str, ...]] = ("append", "admit", "merge")
    kind: str = "append"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        known("write", self.kind, self.KINDS)
        number("write.threshold", self.threshold, 0, 1)


@dataclass(frozen=True)
class Score(Part):
    """How a page's record is turned into a score for a query (SCORE_FIELDS names the kinds)."""

    kind_name = "score"
    kind: str = "mean-std"

    def __post_init__(self) -> None:
        known("score", self.kind, SCORE_FIELDS)


@dataclass(frozen=True)
class Select(Part):
    """Which pages are read: `budget` tokens in all, sinks, window and open page included."""

    kind_name = "select"
    KINDS: ClassVar[tuple[str, ...]] = ("top-k", "top-p", "threshold")
    kind: str = "top-k"
    budget: int = 2048

    def __post_init__(self) -> None:
        known("selection", self.kind, self.KINDS)
        whole("budget", self.budget, 1)


@dataclass(frozen=True)
class Read(Part):
    """How the kept and the skipped enter one softmax; `compensate` reads skipped pages' summary."""

    kind_name = "read"
    compensate: bool = False

    def __post_init__(self) -> None:
        flag("compensate", self.compensate)


@dataclass(frozen=True)
class Account(Part):
    """What is kept about each page's use, as an average with factor `decay`."""

    kind_name = "account"
    KINDS: ClassVar[tuple[str, ...]] = ("mass", "salience", "last-use")
    kind: str
    decay: float = 0.9

    def __post_init__(self) -> None:
        known("account", self.kind, self.KINDS)
        number("account.decay", self.decay, 0, 1)


@dataclass(frozen=True)
class Consolidate(Part):
    """How pages become archive or state, and the event that starts it."""

    kind_name = "consolidate"
    RULES: ClassVar[tuple[str, ...]] = ("attention-match", "pool", "state")
    TRIGGERS: ClassVar[tuple[str, ...]] = ("full", "segment", "idle", "event")
    rule: str
    trigger: str = "idle"

    def __post_init__(self) -> None:
        known("consolidation", self.rule, self.RULES)
        known("trigger", self.trigger, self.TRIGGERS)


@dataclass(frozen=True)
class Evict(Part):
    """How pages leave: oldest first, lowest account first, or below a threshold; after `delay`."""

    kind_name = "evict"
    RULES: ClassVar[tuple[str, ...]] = ("oldest", "lowest", "threshold")
    rule: str
    delay: int = 0

    def __post_init__(self) -> None:
        known("eviction", self.rule, self.RULES)
        whole("evict.delay", self.delay, 0)


@dataclass(frozen=True)
class Refresh(Part):
    """Every `every` tokens the selection, or the memory itself, is computed anew."""

    kind_name = "refresh"
    every: int

    def __post_init__(self) -> None:
        whole("refresh.every", self.every, 1)


@dataclass(frozen=True)
class Budget(Part):
    """How one budget is shared: the same for every KV head, or `shares` of it measured."""

    kind_name = "budget"
    KINDS: ClassVar[tuple[str, ...]] = ("uniform", "measured")
    kind: str = "uniform"
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known("budget rule", self.kind, self.KINDS)
        for share in self.shares:
            number("budget.shares", share, 0, 1)
        if (self.kind == "measured") != bool(self.shares):
            raise ValueError(
                f"budget {self.kind!r} with shares={self.shares!r}: "
                "'measured' needs one share a KV head, 'uniform' takes none"
            )


PARTS: dict[str, type[Part]] = {
    part.kind_name: part
    for part in (
        *(Sinks, Window, Pages, Index, State, Archive, Prefix),
        *(Write, Score, Select, Read, Account, Consolidate, Evict, Refresh, Budget),
    )
}
