"""Where the pages of a site lie in a state without page tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .site import state_names
from .spec import Memory


@dataclass(frozen=True)
class Place:
    """How one table's pages are laid out, see `models/contiguous/`.

    Attributes:
        size: tokens a page, or a record of a level.
        pinned: pages that keep their columns where the others take turns; -1: every page does.
        reach: tokens behind a query that it reads, where pages take turns.
    """

    size: int
    pinned: int = -1
    reach: int = 0

    @property
    def grows(self) -> bool:
        """Whether the state has a column for every page of the context."""
        return self.pinned < 0

    def columns(self, tokens: int) -> int:
        """Columns for calls of up to `tokens` tokens, where pages take turns: `contiguous.append`
        refuses longer ones."""
        return self.pinned + 1 - (-(self.reach + tokens) // self.size)


@dataclass(frozen=True)
class SitePlaces:
    """One site of a step graph: the number in its inputs' names, its memory, and its places.

    Attributes:
        kv_heads: of its keys and values.
        places: of keys and values, then of each level's records.
    """

    layer: int
    memory: Memory
    kv_heads: int
    places: tuple[Place, ...]


def contiguous_names(memory: Memory) -> list[str]:
    """Names of one site's contiguous state: those of `state_names` without tables."""
    return [contiguous_name(name) for name in state_names(memory) if not is_table(name)]


def contiguous_name(name: str) -> str:
    """What a tensor of `state_names`, no table, is called in contiguous state."""
    return {"key_pages": "keys", "value_pages": "values"}.get(name, name)


def is_table(name: str) -> bool:
    """Whether one of `state_names` is a table."""
    return name == "page_table" or name.startswith("table_")


def splits_at(memories: Iterable[Memory]) -> int | None:
    """Tokens at whose multiples a call must end, since accounts let go of pages there; or None."""
    sizes = [memory.page_size for memory in memories if memory.account is not None]
    return math.gcd(*sizes) if sizes else None
