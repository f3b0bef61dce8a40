"""One site's memory: the tiers it has, the operations on them, and the page counts they imply."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .parts import (
    PARTS,
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
    known,
    whole,
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
class Memory:
    """What one attention site remembers and how it reads it; every KV head alike.

    Without `select` every page is read (dense). With it, a query at token p standing in page
    o = p // page_size reads the sink pages, pages o - window_pages .. o, and the best-scoring full
    pages, `budget_pages` in all; below `min_context` tokens it reads every page.

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
            return
        if self.score is None or self.index is None:
            raise ValueError("a selection needs a Score and an Index; give both")
        needed = fields_for(self.score.kind, self.read.compensate)
        missing = [field for field in needed if field not in self.index.fields]
        if missing:
            raise ValueError(
                f"score {self.score.kind!r} with compensate={self.read.compensate} needs the index "
                f"fields {needed}, got {self.index.fields}; add {missing}"
            )
        size, held = self.page_size, self.sink_pages + self.window_pages + 1
        if self.budget_pages < held:
            raise ValueError(
                f"budget of {self.select.budget} tokens is {self.budget_pages} pages of {size}, "
                f"but sinks ({self.sink_pages}), window ({self.window_pages}) and the open page "
                f"already take {held}; give budget >= {held * size}, or fewer sinks, a smaller "
                "window, or smaller pages"
            )
        if self.min_context is not None:
            whole("min_context", self.min_context, 1)
            if self.min_context < self.select.budget:
                raise ValueError(
                    f"min_context={self.min_context} is below the budget of {self.select.budget} "
                    "tokens, where every page is read anyway; give at least the budget, or leave "
                    "min_context out"
                )

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.pages.page_size

    @property
    def selects(self) -> bool:
        """Whether a policy read may skip pages."""
        return self.select is not None

    @property
    def compensate(self) -> bool:
        """Whether skipped pages enter the softmax through their summary."""
        return self.read.compensate

    @property
    def fields(self) -> tuple[str, ...]:
        """Index fields in the order their pools are stored."""
        return self.index.fields if self.index else ()

    @property
    def sink_pages(self) -> int:
        """Pages that hold the sinks, rounded up."""
        return -(-self.sinks.tokens // self.page_size) if self.sinks else 0

    @property
    def window_pages(self) -> int:
        """Full pages before the open one that hold the window, rounded up."""
        return -(-self.window.tokens // self.page_size) if self.window else 0

    @property
    def budget_pages(self) -> int:
        """Pages a query reads once the context is long; 0 where nothing is selected."""
        return self.select.budget // self.page_size if self.select else 0

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

    def check_lowered(self) -> None:
        """Refuses vocabulary for which no operation exists yet.

        Raises:
            ValueError: names the part and the memories that can be built.
        """
        unbuilt = [
            name
            for name in ("state", "archive", "prefix", "account", "consolidate", "evict", "refresh")
            if getattr(self, name) is not None
        ]
        if self.select is not None and self.select.kind != "top-k":
            unbuilt.append(f"select {self.select.kind!r}")
        if self.write.kind != "append":
            unbuilt.append(f"write {self.write.kind!r}")
        if self.budget.kind != "uniform":
            unbuilt.append(f"budget {self.budget.kind!r}")
        if unbuilt:
            raise ValueError(
                f"memory {self.name!r} cannot be built: no operation reads or writes "
                f"{', '.join(unbuilt)}; what can be built: append, pages, sinks, window, index, "
                "score, top-k selection, compensated read, uniform budget"
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
