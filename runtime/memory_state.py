"""The state of an engine's memories: page pools, page tables, and which page belongs to whom.

The host assigns pages before a step and kernels never allocate. Sites alike in KV heads, page size
and recycling share one page table and the same physical page numbers, so that assigning pages costs
the same for two layers as for eighty, and only in steps where a sequence enters a new page.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from ..models.memory.parts import field_width
from ..models.memory.spec import Memory
from . import huge_pages


@dataclass(frozen=True)
class SiteLayout:
    """What the state must hold for one attention site.

    Attributes:
        name: the site's name, unique in a model.
        kv_heads, key_dim, value_dim, dtype: shape and element type of its keys and values.
        memory: what it remembers.
        window: the site's own sliding window; tokens out of it are never read again. 0 = none.
    """

    name: str
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    memory: Memory
    window: int = 0

    @property
    def table_key(self) -> tuple[int, int, int]:
        """Sites with the same KV heads, page size and window share one page table."""
        return (self.kv_heads, self.memory.page_size, self.window)

    def serves(self, other: SiteLayout) -> bool:
        """Whether what is held for this site is all that `other` has to hold for it."""
        mine, others = ((x.name, x.key_dim, x.value_dim, x.dtype) for x in (self, other))
        pages = self.table_key == other.table_key
        return mine == others and pages and {*other.memory.fields} <= {*self.memory.fields}

    def pools(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape of a page in, and element type of, each pool: keys, values, index fields."""
        dims = (self.key_dim, self.value_dim)
        pools: list[tuple[tuple[int, ...], torch.dtype]]
        pools = [((self.memory.page_size, dim), self.dtype) for dim in dims]
        for field in self.memory.fields:
            dtype = torch.float32 if field == "log_count" else self.dtype
            pools.append(((field_width(field, *dims),), dtype))
        return pools


def _places(old: SiteLayout, new: SiteLayout) -> list[int]:
    """Where the pools of `new` stand among those of `old`: keys, values, index fields."""
    return [0, 1, *(2 + old.memory.fields.index(field) for field in new.memory.fields)]


def poisoned() -> bool:
    """Whether unwritten slots are filled with NaN, to show any read of them (MEMCOMPILE_POISON)."""
    return os.environ.get("MEMCOMPILE_POISON", "0") not in ("", "0")


class PageTable:
    """Pages of the sites that share a table: for each sequence, logical pages first .. held - 1.

    Attributes:
        table: int32 [B, Hkv, columns] on the device, -1 where no page is assigned.
        pages: physical pages the pools of these sites have.
    """

    def __init__(
        self, batch: int, kv_heads: int, page_size: int, window: int, device: torch.device
    ) -> None:
        self.batch, self.kv_heads = batch, kv_heads
        self.page_size, self.window = page_size, window
        self.device = device
        self.pages = 0
        self.free = np.empty(0, np.int32)
        self.first = np.zeros(batch, np.int64)
        self.held = np.zeros(batch, np.int64)
        self.host = np.full((batch, kv_heads, 0), -1, np.int32)
        self.table = torch.full((batch, kv_heads, 0), -1, dtype=torch.int32, device=device)

    def shortage(self, end: np.ndarray, position: np.ndarray) -> tuple[int, int]:
        """Columns, and physical pages beyond the free ones, that tokens up to `end` need."""
        columns = -(-end // self.page_size)
        new = int(np.maximum(columns - self.held, 0).sum()) * self.kv_heads
        gone = int(np.maximum(self.first_needed(position) - self.first, 0).sum()) * self.kv_heads
        return int(columns.max(initial=0)), max(0, new - len(self.free) - gone)

    def first_needed(self, position: np.ndarray) -> np.ndarray:
        """The first page that a query at `position` or later may read."""
        if not self.window:
            return np.zeros_like(position)
        oldest = np.maximum(position - self.window + 1, 0)
        needed: np.ndarray = np.minimum(oldest // self.page_size, self.held)
        return needed

    def widen(self, columns: int) -> None:
        """Gives the table room for `columns` logical pages."""
        more = columns - self.host.shape[2]
        if more > 0:
            self.host = np.pad(self.host, ((0, 0), (0, 0), (0, more)), constant_values=-1)
            self.table = torch.tensor(self.host, device=self.device)

    def add_pages(self, count: int) -> None:
        """Declares `count` more physical pages free."""
        new = np.arange(self.pages + count - 1, self.pages - 1, -1, dtype=np.int32)
        self.free = np.concatenate([new, self.free])
        self.pages += count

    def assign(self, end: np.ndarray) -> None:
        """Gives every sequence pages up to its token `end`; enough must be free."""
        columns = -(-end // self.page_size)
        for row in np.flatnonzero(columns > self.held):
            low, high = int(self.held[row]), int(columns[row])
            split = len(self.free) - (high - low) * self.kv_heads
            # The list is a stack; reversed, a head's pages in one call follow each other.
            pages, self.free = self.free[split:][::-1].copy(), self.free[:split]
            self.put(int(row), low, high, pages.reshape(self.kv_heads, high - low))
            self.held[row] = high

    def release(self, row: int, low: int, high: int) -> np.ndarray:
        """Frees logical pages low .. high - 1 of a sequence; returns their physical numbers."""
        pages = self.host[row, :, low:high].flatten()
        self.free = np.concatenate([self.free, pages[::-1]])
        self.put(row, low, high, np.full((self.kv_heads, high - low), -1, np.int32))
        return pages

    def recycle(self, position: np.ndarray) -> np.ndarray:
        """Frees the pages that slid out of the window of every query to come."""
        needed = self.first_needed(position)
        freed = [np.empty(0, np.int32)]
        for row in np.flatnonzero(needed > self.first):
            freed.append(self.release(int(row), int(self.first[row]), int(needed[row])))
            self.first[row] = needed[row]
        return np.concatenate(freed)

    def truncate(self, end: np.ndarray) -> np.ndarray:
        """Frees the pages that hold no token below `end`."""
        keep = -(-end // self.page_size)
        freed = [np.empty(0, np.int32)]
        for row in np.flatnonzero(keep < self.held):
            low = max(int(keep[row]), int(self.first[row]))
            freed.append(self.release(int(row), low, int(self.held[row])))
            self.held[row] = keep[row]
            self.first[row] = min(self.first[row], keep[row])
        return np.concatenate(freed)

    def put(self, row: int, low: int, high: int, pages: np.ndarray) -> None:
        self.host[row, :, low:high] = pages
        self.table[row, :, low:high] = torch.tensor(pages, device=self.device)


class MemoryState:
    """Pools, tables and positions for `batch` sequences over all sites of a model.

    Args:
        layouts: the model's sites, in graph order.
        batch: sequences.
        device: where pools and tables live.
        max_context: preallocates for this many tokens a sequence, and refuses more. Sites with a
            sliding window preallocate what their window needs, and grow only for a call that is
            longer. None: everything grows by doubling, between steps.

    Raises:
        ValueError: no sites, a name twice, a batch or max_context below 1, or a memory for which
            no operation exists.
    """

    def __init__(
        self,
        layouts: Sequence[SiteLayout],
        batch: int,
        device: torch.device | str,
        max_context: int | None = None,
    ) -> None:
        names = [layout.name for layout in layouts]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"site names must be unique and at least one, got {names}")
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if max_context is not None and max_context < 1:
            raise ValueError(f"max_context must be at least 1 or None, got {max_context}")
        for layout in layouts:
            layout.memory.check_lowered()
        self.layouts = tuple(layouts)
        self.batch, self.max_context = batch, max_context
        self.device = torch.device(device)
        self._position = np.zeros(batch, np.int64)
        self._tables: dict[tuple[int, int, int], PageTable] = {}
        self._pools: list[list[Tensor]] = []
        for layout in self.layouts:
            key = layout.table_key
            if key not in self._tables:
                self._tables[key] = PageTable(batch, *key, self.device)
            self._pools.append(self._new_pools(layout, 0))
        if max_context is not None:
            self._preallocate(max_context)

    @property
    def position(self) -> list[int]:
        """Tokens each sequence holds, which is the position of its next token."""
        return [int(p) for p in self._position]

    def reserve(self, lengths: Sequence[int]) -> None:
        """Assigns pages for `lengths` more tokens a sequence; changes nothing when it raises.

        Raises:
            ValueError: wrong number of lengths, a negative one, or more than max_context tokens.
        """
        end = self._position + self._checked(lengths)
        if self.max_context is not None and int(end.max()) > self.max_context:
            row = int(end.argmax())
            raise ValueError(
                f"sequence {row} would hold {int(end[row])} tokens, but max_context is "
                f"{self.max_context}; compile with a larger max_context, or reset or rewind first"
            )
        growth = {}
        for key, table in self._tables.items():
            columns, pages = table.shortage(end, self._position)
            if columns > table.host.shape[2]:
                columns = max(columns, 2 * table.host.shape[2])
            if pages and self.max_context is None:
                pages = max(pages, table.pages)
            growth[key] = (columns, pages)
        # New pools are made before anything changes: running out of memory leaves the state whole.
        grown = [
            self._grown_pools(layout, pools, growth[layout.table_key][1])
            for layout, pools in zip(self.layouts, self._pools, strict=True)
        ]
        self._pools = grown
        for key, table in self._tables.items():
            columns, pages = growth[key]
            table.widen(columns)
            table.add_pages(pages)
            self._poison(key, table.recycle(self._position))
            table.assign(end)

    def advance(self, lengths: Sequence[int]) -> None:
        """Counts `lengths` tokens a sequence as written.

        Raises:
            ValueError: wrong number of lengths, a negative one, or tokens that were not reserved.
        """
        end = self._position + self._checked(lengths)
        for table in self._tables.values():
            if bool((end > table.held * table.page_size).any()):
                raise ValueError(
                    f"advancing to {end.tolist()} tokens, but pages are assigned for "
                    f"{(table.held * table.page_size).tolist()}; reserve the tokens first"
                )
        self._position = end

    def rewind(self, position: int | Sequence[int]) -> None:
        """Forgets every token from `position` on (one for all sequences, or one each).

        The pages behind it are freed. The page that is open afterwards may have a record of
        forgotten tokens: none is read before its page is full, and filling it writes a new one.

        Raises:
            ValueError: positions beyond the tokens held, or whose window was already recycled.
        """
        wanted = [position] * self.batch if isinstance(position, int) else position
        target = self._checked(wanted)
        if bool((target > self._position).any()):
            raise ValueError(
                f"cannot rewind to {target.tolist()}: the sequences hold {self.position} tokens; "
                "give positions no larger than those"
            )
        for table in self._tables.values():
            lost = table.first_needed(target) < table.first
            if bool((lost & (target > 0) & (target < self._position)).any()):
                raise ValueError(
                    f"cannot rewind to {target.tolist()}: pages before tokens "
                    f"{(table.first * table.page_size).tolist()} slid out of a window of "
                    f"{table.window} and were recycled; reset, or fork before going on"
                )
        self._truncate(target)

    def reset(self) -> None:
        """Forgets everything; pools and tables keep their size."""
        self._truncate(np.zeros(self.batch, np.int64))

    def fork(self, layouts: Sequence[SiteLayout] | None = None) -> MemoryState:
        """An independent copy: what is written to one is never seen by the other.

        Args:
            layouts: the same sites under other memories, for a state that these can go on with;
                None: as they are.

        Raises:
            ValueError: a site is another, has other pages, or an index field that is not here.
        """
        chosen = self.layouts if layouts is None else tuple(layouts)
        for own, other in zip_longest(self.layouts, chosen):
            if own is None or other is None or not own.serves(other):
                raise ValueError(
                    f"a memory of {own} cannot go on as one of {other}: give the same sites, with "
                    "pages of one size and index fields that are among those held"
                )
        forked = copy.copy(self)
        forked.layouts = chosen
        forked._position = self._position.copy()
        forked._tables = copy.deepcopy(self._tables)
        forked._pools = [
            self._grown_pools(new, [pools[i] for i in _places(old, new)], 0, copy=True)
            for old, new, pools in zip(self.layouts, chosen, self._pools, strict=True)
        ]
        return forked

    def tensors(self) -> list[Tensor]:
        """Per site: page_table, key_pages, value_pages, then its index fields in order."""
        return [
            tensor
            for layout, pools in zip(self.layouts, self._pools, strict=True)
            for tensor in (self._tables[layout.table_key].table, *pools)
        ]

    def memory_bytes(self) -> int:
        """Bytes of all pools and tables, assigned or not."""
        pools = sum(pool.nbytes for pools in self._pools for pool in pools)
        return pools + sum(table.table.nbytes for table in self._tables.values())

    def _checked(self, counts: Sequence[int]) -> np.ndarray:
        given = np.asarray(counts)
        if given.shape != (self.batch,) or given.dtype.kind not in "iu" or bool((given < 0).any()):
            raise ValueError(
                f"expected {self.batch} whole numbers of at least 0, one a sequence, got {counts!r}"
            )
        return given.astype(np.int64)

    def _new_pools(self, layout: SiteLayout, pages: int) -> list[Tensor]:
        """Key and value pools and index records of `pages` pages."""
        pools = [
            huge_pages.zeros((pages, *shape), dtype, self.device) for shape, dtype in layout.pools()
        ]
        return [pool.fill_(float("nan")) for pool in pools] if poisoned() else pools

    def _grown_pools(
        self, layout: SiteLayout, pools: list[Tensor], pages: int, *, copy: bool = False
    ) -> list[Tensor]:
        """The pools with room for `pages` more; the same ones if none are needed."""
        if not pages and not copy:
            return pools
        held = len(pools[0])
        grown = self._new_pools(layout, held + pages)
        for new, old in zip(grown, pools, strict=True):
            new[:held] = old
        return grown

    def _preallocate(self, max_context: int) -> None:
        for (heads, size, window), table in self._tables.items():
            table.widen(-(-max_context // size))
            reach = min(max_context, window + 2 * size) if window else max_context
            table.add_pages(-(-reach // size) * heads * self.batch)
        self._pools = [
            self._new_pools(layout, self._tables[layout.table_key].pages) for layout in self.layouts
        ]

    def _truncate(self, end: np.ndarray) -> None:
        for key, table in self._tables.items():
            self._poison(key, table.truncate(end))
        self._position = end

    def _poison(self, key: tuple[int, int, int], pages: np.ndarray) -> None:
        if not len(pages) or not poisoned():
            return
        for layout, pools in zip(self.layouts, self._pools, strict=True):
            if layout.table_key == key:
                for pool in pools:
                    pool[torch.tensor(pages, device=self.device).long()] = float("nan")
