"""The vocabulary of memories: tiers and operations as frozen, validated, JSON-able dataclasses."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from .features import feature_map
from .names import flag, known, number, whole

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
        sizes = (1, *(1 << power for power in range(3, 11)))
        if self.page_size not in sizes:
            raise ValueError(
                f"page_size must be 1 or a power of two from 8 to 1024, got {self.page_size}; "
                "64 suits most models"
            )


@dataclass(frozen=True)
class Index(Part):
    """Records of `fields` (some of INDEX_FIELDS): one a page, or one for every size in `levels`.

    Attributes:
        levels: tokens that a record stands for, level by level, each a multiple of the one before;
            the first is the page size. () keeps one record a page, and none above.
    """

    kind_name = "index"
    fields: tuple[str, ...]
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.fields, tuple) or not self.fields:
            raise ValueError(f"index.fields must name some of {INDEX_FIELDS}, got {self.fields!r}")
        for name in self.fields:
            known("index field", name, INDEX_FIELDS)
        if len(set(self.fields)) != len(self.fields):
            raise ValueError(f"index.fields names a field twice: {self.fields!r}; name each once")
        if not isinstance(self.levels, tuple):
            raise ValueError(f"levels must be a tuple of token counts, got {self.levels!r}")
        for size in self.levels:
            whole("levels", size, 1)
        for below, size in itertools.pairwise(self.levels):
            if size <= below or size % below:
                raise ValueError(
                    f"levels must grow, each a multiple of the one before, got {self.levels}; "
                    "(64, 512, 4096) is one choice"
                )


@dataclass(frozen=True)
class State(Part):
    """A recurrent state of fixed size that takes in what leaves the window (`recurrent.py`).

    Attributes:
        decay: "none"; "constant", one learned factor a KV head; "gate", one a token, of its key.
        write: "additive" adds the outer product of key and value; "delta" replaces what the state
            already answers to the key (2102.11174), by a learned share of it.
        feature_map: a name of `features.FEATURE_MAPS`, applied to projected queries and keys.
        features: width r of the learned projection of queries and keys; None: the key's width.
        normalised: the read divides by the sum of feature products and joins the window in one
            softmax; otherwise it joins by a learned gate.
    """

    kind_name = "state"
    DECAYS: ClassVar[tuple[str, ...]] = ("none", "constant", "gate")
    WRITES: ClassVar[tuple[str, ...]] = ("additive", "delta")
    decay: str = "none"
    write: str = "additive"
    feature_map: str = "softmax"
    features: int | None = None
    normalised: bool = True

    def __post_init__(self) -> None:
        known("decay", self.decay, self.DECAYS)
        known("write", self.write, self.WRITES)
        feature_map(self.feature_map)
        flag("normalised", self.normalised)
        if self.features is not None:
            whole("features", self.features, 8)
            if self.features % 8:
                raise ValueError(f"features must be a multiple of 8, got {self.features}")
        if self.normalised and self.write == "delta":
            raise ValueError(
                "a delta rule subtracts from the state, so the sum that a normalised read divides "
                "by means nothing; give normalised=False, or write='additive'"
            )
        if self.normalised and not feature_map(self.feature_map).positive:
            raise ValueError(
                f"a normalised read needs features that are not negative, and {self.feature_map!r} "
                "may give negative ones; give normalised=False, or the map elu, relu or softmax"
            )


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
    """Which pages are read: `budget` tokens in all, sinks, window and open page included.

    "held" reads sinks, window and open page alone, and has no budget of its own.
    """

    kind_name = "select"
    KINDS: ClassVar[tuple[str, ...]] = ("top-k", "top-p", "threshold", "held")
    kind: str = "top-k"
    budget: int | None = 2048

    def __post_init__(self) -> None:
        known("selection", self.kind, self.KINDS)
        if self.kind != "held":
            whole("budget", self.budget, 1)
        elif self.budget is not None:
            raise ValueError(
                f"a selection of what is held anyway has no budget, got {self.budget!r}; "
                "give budget=None, or another kind of selection"
            )


@dataclass(frozen=True)
class Read(Part):
    """How the kept and the skipped enter one softmax; `compensate` reads skipped pages' summary."""

    kind_name = "read"
    compensate: bool = False

    def __post_init__(self) -> None:
        flag("compensate", self.compensate)


@dataclass(frozen=True)
class Account(Part):
    """What is kept about each page's use; `decay` is the factor a token applies to what was there.

    "mass" sums the attention that the queries of a KV head gave to a page.
    """

    kind_name = "account"
    KINDS: ClassVar[tuple[str, ...]] = ("mass", "salience", "last-use")
    kind: str = "mass"
    decay: float = 1.0

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
    """How pages leave the memory.

    "oldest" frees every page that no later query reads; "lowest" the pages with the lowest account,
    until `tokens` are left to a KV head, sinks, window and open page included. `delay` and
    "threshold" are words only.
    """

    kind_name = "evict"
    RULES: ClassVar[tuple[str, ...]] = ("oldest", "lowest", "threshold")
    rule: str
    tokens: int | None = None
    delay: int = 0

    def __post_init__(self) -> None:
        known("eviction", self.rule, self.RULES)
        whole("evict.delay", self.delay, 0)
        if (self.rule == "lowest") != (self.tokens is not None):
            raise ValueError(
                f"eviction {self.rule!r} with tokens={self.tokens!r}: 'lowest' needs the number of "
                "tokens that are kept, the others take none"
            )
        if self.tokens is not None:
            whole("evict.tokens", self.tokens, 1)


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
