"""The state of an engine's memories: page pools, page tables, and which page belongs to whom.

The host assigns pages before a step and kernels never allocate. Sites alike in KV heads, page size
and recycling share one page table and the same physical page numbers, so that assigning pages costs
the same for two layers as for eighty, and only in steps where a sequence enters a new page.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from . import huge_pages
from .page_table import PageTable, TableKey
from .site_layout import SiteLayout, Store


def _places(old: SiteLayout, new: SiteLayout) -> list[list[int]]:
    """Where the pools of `new` stand among those of `old`, store by store."""
    records = [old.memory.fields.index(field) for field in new.memory.fields]
    if old.memory.levels:
        return [[0, 1], *(records for _ in old.memory.levels)]
    return [[0, 1, *(2 + i for i in records)]]


def poisoned() -> bool:
    """Whether unwritten slots are filled with NaN, to show any read of them (MEMCOMPILE_POISON)."""
    return os.environ.get("MEMCOMPILE_POISON", "0") not in ("", "0")


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
        self.pages_evicted = 0
        self.forgot = False
        self._position = np.zeros(batch, np.int64)
        self._mark: np.ndarray | None = None
        self._tables: dict[TableKey, PageTable] = {}
        self._pools: list[list[list[Tensor]]] = []  # site by site, store by store
        self._accounts: dict[str, Tensor] = {}
        self._rows: list[list[Tensor]] = []
        for layout in self.layouts:
            for store in layout.stores():
                if store.key not in self._tables:
                    self._tables[store.key] = PageTable(batch, store.key, self.device)
            self._pools.append([self._new_pools(store, 0) for store in layout.stores()])
            self._rows.append(
                [torch.zeros((batch, *s), dtype=d, device=self.device) for s, d in layout.rows()]
            )
            if layout.memory.account is not None:
                shape = self._tables[layout.table_key].host.shape
                self._accounts[layout.name] = torch.zeros(shape, device=self.device)
        if max_context is not None:
            self._preallocate(max_context)

    @property
    def position(self) -> list[int]:
        """Tokens each sequence holds, which is the position of its next token."""
        return [int(p) for p in self._position]

    def reserve(self, lengths: Sequence[int], *, policy: bool = False) -> None:
        """Assigns pages for `lengths` more tokens a sequence; changes nothing when it raises.

        Args:
            policy: the tokens read through the policy: pages that no such read needs are let go,
                and accounts decide which of the others have to make room. `forgot` is True from
                the first time on; a dense read would then miss what is gone.

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
        lost = self._lowest(end) if policy else []
        since = self._position
        if self._mark is not None:
            since = np.minimum(since, self._mark)
        growth, needed = {}, {}
        for key, table in self._tables.items():
            needed[key] = table.first_needed(since, policy)
            columns, pages = table.shortage(end, needed[key])
            pages = max(0, pages - sum(len(p) for k, _, _, p in lost if k == key))
            if columns > table.host.shape[2]:
                columns = max(columns, 2 * table.host.shape[2])
            if pages and key.lets_go:
                pages = max(pages, table.pages // 8)  # what it lets go it needs again
            elif pages and self.max_context is None:
                pages = max(pages, table.pages)
            growth[key] = (columns, pages)
        # New pools are made before anything changes: running out of memory leaves the state whole.
        self._pools = self._all_grown({key: pages for key, (_, pages) in growth.items()})
        for key, row, head, gone in lost:
            self._let_go(key, self._tables[key].lose(row, head, gone))
        for key, table in self._tables.items():
            columns, pages = growth[key]
            table.widen(columns)
            table.add_pages(pages)
            gone = table.recycle(needed[key])
            self._let_go(key, gone) if key.lets_go else self._poison(key, gone)
            table.assign(end)
        self._widen_accounts()
        if policy:
            self._compact()

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

    def hold(self) -> None:
        """Keeps what a rewind to here or later needs, until the next call of this."""
        self._mark = self._position.copy()

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
        back = (target > 0) & (target < self._position)
        for layout in self.layouts:
            kept = "a state" if layout.memory.state else "an account"
            if (layout.memory.state or layout.memory.account) and bool(back.any()):
                raise ValueError(
                    f"cannot rewind to {target.tolist()}: {layout.name} keeps {kept}, which "
                    "cannot give back what it took in; reset, or fork before going on"
                )
        for key, table in self._tables.items():
            lost = table.first_needed(target, True) < table.first
            if bool((lost & back).any()):
                raise ValueError(
                    f"cannot rewind to {target.tolist()}: pages before tokens "
                    f"{(table.first * table.page_size).tolist()} slid out of a window of "
                    f"{1 + (key.reach or 0)} and were recycled; reset, or fork before going on"
                )
        self._truncate(target)

    def reset(self) -> None:
        """Forgets everything; pools and tables keep their size."""
        self._truncate(np.zeros(self.batch, np.int64))
        self.pages_evicted, self.forgot = 0, False

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
        forked._accounts = {name: held.clone() for name, held in self._accounts.items()}
        forked._rows = [[held.clone() for held in rows] for rows in self._rows]
        forked._pools = [
            [
                self._grown_pools(store, [pools[i] for i in places], 0, copy=True)
                for store, pools, places in zip(
                    new.stores(), stores, _places(old, new), strict=True
                )
            ]
            for old, new, stores in zip(self.layouts, chosen, self._pools, strict=True)
        ]
        return forked

    def select(self, rows: Sequence[int]) -> None:
        """Makes sequence i what sequence rows[i] was: reorders, drops and repeats them.

        A sequence's first taker has its pages, by the page table alone; others get copies.

        Raises:
            ValueError: no rows, or one that is not there.
        """
        taken = np.asarray(rows)
        if taken.ndim != 1 or not taken.size or taken.dtype.kind not in "iu":
            raise ValueError(f"expected the numbers of one or more sequences, got {rows!r}")
        if int(taken.min()) < 0 or int(taken.max()) >= self.batch:
            raise ValueError(f"rows {taken.tolist()}: give numbers of 0 .. {self.batch - 1}")
        taken = taken.astype(np.int64)
        if np.array_equal(taken, np.arange(self.batch)):
            return
        growth = {}
        for key, table in self._tables.items():
            pages = table.rows_copied(taken)[1]
            if self.max_context is not None and not key.lets_go:
                pages = max(pages, self._capacity(key, self.max_context, len(taken)) - table.pages)
            growth[key] = pages
        self._pools = self._all_grown(growth)
        at = torch.tensor(taken, device=self.device)
        self.batch, self._position = len(taken), self._position[taken]
        if self._mark is not None:
            self._mark = self._mark[taken]
        self._accounts = {name: held[at] for name, held in self._accounts.items()}
        self._rows = [[held[at] for held in rows] for rows in self._rows]
        for key, table in self._tables.items():
            table.add_pages(growth[key])
            freed, old, new = table.select(taken)
            self._poison(key, np.setdiff1d(freed, new))
            self._copy_pages(key, old, new)

    def tensors(self) -> list[Tensor]:
        """Per site what `site.state_names` lists, in its order."""
        listed: list[Tensor] = []
        for layout, stores, rows in zip(self.layouts, self._pools, self._rows, strict=True):
            for store, pools in zip(layout.stores(), stores, strict=True):
                listed += [self._tables[store.key].table, *pools]
            if layout.name in self._accounts:
                listed.append(self._accounts[layout.name])
            listed += rows
        return listed

    def memory_bytes(self) -> int:
        """Bytes of all pools, tables, accounts and states, assigned or not."""
        pools = sum(pool.nbytes for stores in self._pools for pools in stores for pool in pools)
        tables = sum(table.table.nbytes for table in self._tables.values())
        return pools + tables + sum(x.nbytes for x in self._accounts.values()) + self.state_bytes()

    def state_bytes(self) -> int:
        """Bytes of the recurrent states, which no context makes larger."""
        return sum(held.nbytes for rows in self._rows for held in rows)

    def _checked(self, counts: Sequence[int]) -> np.ndarray:
        given = np.asarray(counts)
        if given.shape != (self.batch,) or given.dtype.kind not in "iu" or bool((given < 0).any()):
            raise ValueError(
                f"expected {self.batch} whole numbers of at least 0, one a sequence, got {counts!r}"
            )
        return given.astype(np.int64)

    def _new_pools(self, store: Store, pages: int) -> list[Tensor]:
        """The pools of a store, of `pages` pages."""
        pools = [
            huge_pages.zeros((pages, *shape), dtype, self.device) for shape, dtype in store.pools
        ]
        return [pool.fill_(float("nan")) for pool in pools] if poisoned() else pools

    def _grown_pools(
        self, store: Store, pools: list[Tensor], pages: int, *, copy: bool = False
    ) -> list[Tensor]:
        """The pools with room for `pages` more; the same ones if none are needed."""
        if not pages and not copy:
            return pools
        held = len(pools[0])
        grown = self._new_pools(store, held + pages)
        for new, old in zip(grown, pools, strict=True):
            new[:held] = old
        return grown

    def _all_grown(self, growth: Mapping[TableKey, int]) -> list[list[list[Tensor]]]:
        """All pools, with room for so many pages more by table."""
        return [
            [
                self._grown_pools(store, pools, growth[store.key])
                for store, pools in zip(layout.stores(), stores, strict=True)
            ]
            for layout, stores in zip(self.layouts, self._pools, strict=True)
        ]

    def _copy_pages(self, key: TableKey, old: np.ndarray, new: np.ndarray) -> None:
        if not len(old):
            return
        source, target = (torch.tensor(at, device=self.device).long() for at in (old, new))
        for layout, stores in zip(self.layouts, self._pools, strict=True):
            for store, pools in zip(layout.stores(), stores, strict=True):
                if store.key == key:
                    for pool in pools:
                        pool[target] = pool[source]

    @staticmethod
    def _capacity(key: TableKey, max_context: int, batch: int) -> int:
        """Pages that are preallocated for a table."""
        reach = max_context if key.reach is None else key.reach + 1 + 2 * key.page_size
        return -(-min(max_context, reach) // key.page_size) * key.kv_heads * batch

    def _preallocate(self, max_context: int) -> None:
        for key, table in self._tables.items():
            table.widen(-(-max_context // key.page_size))
            if key.lets_go:
                continue  # it grows for a dense read only, and shrinks when that is over
            table.add_pages(self._capacity(key, max_context, self.batch))
        self._pools = [
            [self._new_pools(store, self._tables[store.key].pages) for store in layout.stores()]
            for layout in self.layouts
        ]
        self._widen_accounts()

    def _widen_accounts(self) -> None:
        for layout in self.layouts:
            held = self._accounts.get(layout.name)
            columns = self._tables[layout.table_key].host.shape[2]
            if held is not None and held.shape[2] < columns:
                more = columns - held.shape[2]
                self._accounts[layout.name] = torch.nn.functional.pad(held, (0, more))

    def _lowest(self, end: np.ndarray) -> list[tuple[TableKey, int, int, np.ndarray]]:
        """What has to make room for tokens up to `end`: table, sequence, head and logical pages."""
        lost = []
        for layout in self.layouts:
            memory, table = layout.memory, self._tables[layout.table_key]
            if memory.account is None:
                continue
            columns = -(-end // memory.page_size)
            resident = (table.host >= 0).sum(-1)  # [B, Hkv]
            excess = resident + (columns - table.held)[:, None] - memory.budget_pages
            excess[end == self._position] = 0
            if not bool((excess > 0).any()):
                continue  # the account stays where it is
            mass = self._accounts[layout.name].cpu().numpy()
            for row, head in np.argwhere(excess > 0):
                low, high = memory.sink_pages, int(columns[row]) - 1 - memory.window_pages
                free = low + np.flatnonzero(table.host[row, head, low : max(low, high)] >= 0)
                order = np.argsort(mass[row, head, free], kind="stable")
                pages = free[order[: int(excess[row, head])]]
                lost.append((layout.table_key, int(row), int(head), pages))
        return lost

    def _let_go(self, key: TableKey, pages: np.ndarray) -> None:
        if not len(pages):
            return
        self.forgot = True
        exact = sum(layout.table_key == key for layout in self.layouts)
        self.pages_evicted += len(pages) * exact
        self._poison(key, pages)

    def _compact(self) -> None:
        """Gives back the memory of pages that were let go, once most of a pool is free."""
        for key, table in self._tables.items():
            live = table.compact(spare=self.batch * key.kv_heads) if key.lets_go else None
            if live is None:
                continue
            at = torch.tensor(live, device=self.device).long()
            for layout, stores in zip(self.layouts, self._pools, strict=True):
                for i, store in enumerate(layout.stores()):
                    if store.key == key:
                        fresh = self._new_pools(store, len(live))
                        for new, old in zip(fresh, stores[i], strict=True):
                            torch.index_select(old, 0, at, out=new)
                        stores[i] = fresh

    def _truncate(self, end: np.ndarray) -> None:
        for key, table in self._tables.items():
            self._poison(key, table.truncate(end))
        for row in np.flatnonzero((end == 0) & (self._position > 0)):
            for held in (*self._accounts.values(), *(x for rows in self._rows for x in rows)):
                held[int(row)] = 0
        self._position = end

    def _poison(self, key: TableKey, pages: np.ndarray) -> None:
        if not len(pages) or not poisoned():
            return
        for layout, stores in zip(self.layouts, self._pools, strict=True):
            for store, pools in zip(layout.stores(), stores, strict=True):
                if store.key == key:
                    for pool in pools:
                        pool[torch.tensor(pages, device=self.device).long()] = float("nan")
