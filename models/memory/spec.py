"""One site's memory: the tiers it has, the operations on them, and the page counts they imply."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

from .names import known, whole
from .parts import (
    PARTS,
    SUMMARY_FIELDS,
    Account,
    Archive,
    Budget,
    Consolidate,
    Evict,
    Index,
    Pages,
    Part,
    Prefix,
    Read,
    Refresh,
    Score,
    Select,
    Sinks,
    State,
    Window,
    Write,
    fields_for,
)

__all__ = [
    "Account",
    "Archive",
    "Budget",
    "Consolidate",
    "Evict",
    "Index",
    "Memory",
    "Pages",
    "Prefix",
    "Read",
    "Refresh",
    "Score",
    "Select",
    "Sinks",
    "State",
    "Window",
    "Write",
]


@dataclass(frozen=True)
class Level:
    """One resolution of a memory of several.

    Attributes:
        size: tokens that a record stands for.
        sinks, window: records at the start, and full ones before the open one, that are always
            opened: what they stand for is read at the level below.
        budget: records that are opened in all, the open one included.
    """

    size: int
    sinks: int
    window: int
    budget: int


@dataclass(frozen=True)
class Memory:
    """What one attention site remembers and how it reads it; every KV head alike.

    Without `select` every page is read that is there. With it, a query at token p standing in page
    o = p // page_size reads the sink pages, pages o - window_pages .. o, and the best-scoring full
    pages, `budget_pages` in all; below `min_context` tokens it reads every page.

    With `index.levels`, what is not read exactly is read as records, each token in one: the
    coarsest level is scored and read whole, but for the records that are opened (`level`), whose
    children one level below are read instead, but for those that are opened in turn.

    With `state`, the window is one of tokens, and everything before it is in the state.

    Raises:
        ValueError: parts that contradict each other; the text says which and how to mend.
    """

    name: str
    pages: Pages
    sinks: Sinks | None = None
    window: Window | None = None
    index: Index | None = None
    score: Score | None = None
    select: Select | None = None
    read: Read = field(default_factory=Read)
    min_context: int | None = None
    state: State | None = None
    archive: Archive | None = None
    prefix: Prefix | None = None
    write: Write = field(default_factory=Write)
    account: Account | None = None
    consolidate: Consolidate | None = None
    evict: Evict | None = None
    refresh: Refresh | None = None
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        self._check_evict()
        self._check_levels()
        if self.state is not None:
            self._check_state()
        if self.select is None:
            for part in ("score", "index", "min_context"):
                if getattr(self, part) is not None:
                    raise ValueError(
                        f"{part} is given but nothing is selected; add a Select or drop {part}"
                    )
            if self.read.compensate:
                raise ValueError(
                    "compensate=True stands in for skipped pages, but nothing is selected and so "
                    "nothing is skipped; add a Select or give compensate=False"
                )
            if self.evict is None or self.evict.tokens is None:
                return
        elif self.select.kind == "held":
            for part in ("score", "min_context"):
                if getattr(self, part) is not None:
                    raise ValueError(
                        f"{part} is given, but a selection of what is held anyway has nothing to "
                        f"choose; drop {part}, or select top-k"
                    )
            if self.compensate:
                self._check_fields(SUMMARY_FIELDS)
            return
        elif self.score is None or self.index is None:
            raise ValueError("a selection needs a Score and an Index; give both")
        else:
            self._check_fields(fields_for(self.score.kind, self.read.compensate))
        self._check_budget()

    def _check_evict(self) -> None:
        evict = self.evict
        if evict is None:
            return
        if evict.rule == "oldest" and (self.select is None or self.select.kind != "held"):
            raise ValueError(
                "evicting the oldest pages needs a read that never comes back to them: give "
                "Select('held', None), or no Evict"
            )
        if evict.rule == "lowest" and (self.account is None or self.select is not None):
            raise ValueError(
                "evicting the lowest pages needs an Account to tell them by, and reads every page "
                "that is left: give an Account and no Select"
            )

    def _check_levels(self) -> None:
        if not self.levels:
            return
        if self.levels[0] != self.page_size or not self.compensate:
            raise ValueError(
                f"levels {self.levels} stand in for pages of {self.page_size} tokens that are not "
                "read: the first must be the page size, and read.compensate True"
            )

    def _check_state(self) -> None:
        given = [name for name in ("sinks", "index", "select", "evict") if getattr(self, name)]
        if given or self.window is None:
            raise ValueError(
                "a state takes in the tokens that leave its window: it needs a Window, and has "
                f"no {', '.join(given) or 'other part'} beside it"
            )

    def _check_fields(self, needed: tuple[str, ...]) -> None:
        missing = [field for field in needed if field not in self.fields]
        if missing:
            score = f"score {self.score.kind!r}" if self.score else "a read"
            raise ValueError(
                f"{score} with compensate={self.compensate} needs the index "
                f"fields {needed}, got {self.fields}; add {missing}"
            )

    def _check_budget(self) -> None:
        assert self.budget_tokens is not None
        size, held = self.page_size, self.held_pages
        if self.budget_pages < held:
            raise ValueError(
                f"budget of {self.budget_tokens} tokens is {self.budget_pages} pages of {size}, "
                f"but sinks ({self.sink_pages}), window ({self.window_pages}) and the open page "
                f"already take {held}; give budget >= {held * size}, or fewer sinks, a smaller "
                "window, or smaller pages"
            )
        if self.min_context is not None:
            whole("min_context", self.min_context, 1)
            if self.levels:
                raise ValueError(
                    "min_context is not there for memories of several levels: what fits the budget "
                    "is read exactly anyway; leave min_context out"
                )
            if self.min_context < self.budget_tokens:
                raise ValueError(
                    f"min_context={self.min_context} is below the budget of {self.budget_tokens} "
                    "tokens, where every page is read anyway; give at least the budget, or leave "
                    "min_context out"
                )

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.pages.page_size

    @property
    def selects(self) -> bool:
        """Whether a policy read may leave out pages of the context."""
        return self.select is not None or self.budget_tokens is not None

    @property
    def exact(self) -> bool:
        """Whether a read of everything is the model's own attention."""
        return self.state is None

    @property
    def compensate(self) -> bool:
        """Whether skipped pages enter the softmax through their summary."""
        return self.read.compensate

    @property
    def fields(self) -> tuple[str, ...]:
        """Index fields in the order their pools are stored."""
        return self.index.fields if self.index else ()

    @property
    def levels(self) -> tuple[int, ...]:
        """Tokens that a record stands for, level by level; () without levels of their own."""
        return self.index.levels if self.index else ()

    @property
    def sink_pages(self) -> int:
        """Pages that hold the sinks, rounded up."""
        return -(-self.sinks.tokens // self.page_size) if self.sinks else 0

    @property
    def window_pages(self) -> int:
        """Full pages before the open one that hold the window, rounded up."""
        return -(-self.window.tokens // self.page_size) if self.window else 0

    @property
    def held_pages(self) -> int:
        """Sinks, window and open page."""
        return self.sink_pages + self.window_pages + 1

    @property
    def budget_tokens(self) -> int | None:
        """The tokens that a selection reads or an eviction keeps, as they were given."""
        if self.select is not None:
            return self.select.budget
        return self.evict.tokens if self.evict else None

    @property
    def budget_pages(self) -> int:
        """Pages a query reads exactly once the context is long; 0 where none is left out."""
        if self.select is not None and self.select.kind == "held":
            return self.held_pages
        return (self.budget_tokens or 0) // self.page_size

    @property
    def own_window(self) -> int:
        """Tokens that an exact read reaches back where a state holds what is older; 0 = all."""
        return self.window.tokens if self.state and self.window else 0

    @property
    def dense_below(self) -> int:
        """Queries at tokens below this read every page, whatever the budget."""
        return self.min_context or 0

    @property
    def reads_all_below(self) -> int:
        """Contexts of up to this many tokens are read in full, by budget or by min_context."""
        return max(self.budget_pages * self.page_size, self.dense_below)

    @property
    def capacity(self) -> int:
        """Width of the page list: the budget, or what `dense_below` tokens fill if that is more."""
        return max(self.budget_pages, -(-self.dense_below // self.page_size))

    def level(self, number: int) -> Level:
        """What is always opened and how much by score at level `number`, 0 for the pages."""
        sinks, window = self.sink_pages, self.window_pages
        refined = self.budget_pages - self.held_pages
        for below, size in itertools.pairwise(self.levels[: number + 1]):
            ratio = size // below
            sinks, window = -(-sinks // ratio), -(-window // ratio)
        return Level(self.levels[number], sinks, window, sinks + window + 1 + refined)

    def check_lowered(self) -> None:
        """Refuses vocabulary for which no operation exists yet.

        Raises:
            ValueError: names the part and the memories that can be built.
        """
        unbuilt = [
            name
            for name in ("archive", "prefix", "consolidate", "refresh")
            if getattr(self, name) is not None
        ]
        for name, part, built in (
            ("select", self.select and self.select.kind, ("top-k", "held")),
            ("write", self.write.kind, ("append",)),
            ("budget", self.budget.kind, ("uniform",)),
            ("account", self.account and self.account.kind, ("mass",)),
            ("evict", self.evict and self.evict.rule, ("oldest", "lowest")),
        ):
            if part is not None and part not in built:
                unbuilt.append(f"{name} {part!r}")
        if self.evict is not None and self.evict.delay:
            unbuilt.append(f"evict with a delay of {self.evict.delay}")
        if unbuilt:
            raise ValueError(
                f"memory {self.name!r} cannot be built: no operation reads or writes "
                f"{', '.join(unbuilt)}; what can be built: append, pages, sinks, window, index and "
                "its levels, score, top-k selection, compensated read, uniform budget, state, "
                "account of mass, eviction of the oldest or the lowest"
            )

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v.to_json() if isinstance(v, Part) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Memory:
        """Rebuilds a memory from `to_json`.

        Raises:
            ValueError: unknown keys or parts; the known ones are listed.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        given: dict[str, Any] = {}
        for name, value in data.items():
            known("key of a memory", name, names)
            if isinstance(value, dict):
                known("part of a memory", name, PARTS)
                value = PARTS[name].from_json(value)
            given[name] = value
        return cls(**given)
