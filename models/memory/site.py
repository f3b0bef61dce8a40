"""One site's state, as a flat list of tensors or graph nodes, and by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .spec import Memory


def state_names(memory: Memory) -> list[str]:
    """Names of one site's state, in the order `MemoryState.tensors()` lists it."""
    names = ["page_table", "key_pages", "value_pages"]
    if memory.levels:
        for size in memory.levels:
            names += [f"table_{size}", *(f"{name}_{size}" for name in memory.fields)]
    else:
        names += [f"index_{name}" for name in memory.fields]
    if memory.account is not None:
        names.append("account")
    if memory.state is not None:
        names += ["state", "norm"] if memory.state.normalised else ["state"]
    return names


@dataclass(frozen=True)
class SiteTensors:
    """One site's state; tensors or graph nodes.

    Attributes:
        index: the index fields, where records belong to pages.
        levels: (table, index fields) of each level.
        account: [B, Hkv, pages of the table].
        state, norm: see `state_step` in `ops.py`.
        weights: of a state, see `hybrid.state_weights`; not part of the flat list.
        record_table: rows of the index, where they are not those of the pages; not part of it
            either.
    """

    page_table: Any
    key_pages: Any
    value_pages: Any
    index: tuple[Any, ...] = ()
    levels: tuple[tuple[Any, tuple[Any, ...]], ...] = ()
    account: Any = None
    state: Any = None
    norm: Any = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    record_table: Any = None

    @classmethod
    def take(
        cls, memory: Memory, flat: Sequence[Any], weights: Mapping[str, Any] | None = None
    ) -> SiteTensors:
        """The site's part of a flat list that starts with it."""
        names = state_names(memory)
        if len(flat) < len(names):
            raise ValueError(f"{memory.name!r} has {len(names)} state tensors, got {len(flat)}")
        given = dict(zip(names, flat, strict=False))
        levels = tuple(
            (given[f"table_{size}"], tuple(given[f"{name}_{size}"] for name in memory.fields))
            for size in memory.levels
        )
        return cls(
            given["page_table"],
            given["key_pages"],
            given["value_pages"],
            () if levels else tuple(given[f"index_{name}"] for name in memory.fields),
            levels,
            given.get("account"),
            given.get("state"),
            given.get("norm"),
            weights or {},
        )
