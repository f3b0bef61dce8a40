"""Where the pages of a site lie in a state without page tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

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
    names = ["keys", "values"]
    if memory.levels:
        names += [f"{name}_{size}" for size in memory.levels for name in memory.fields]
    else:
        names += [f"index_{name}" for name in memory.fields]
    if memory.account is not None:
        names.append("account")
    if memory.state is not None:
        names += ["state", "norm"] if memory.state.normalised else ["state"]
    return names


def splits_at(memories: Iterable[Memory]) -> int | None:
    """Tokens at whose multiples a call must end, since accounts let go of pages there; or None."""
    sizes = [memory.page_size for memory in memories if memory.account is not None]
    return math.gcd(*sizes) if sizes else None
