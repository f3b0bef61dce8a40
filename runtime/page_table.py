"""Which physical page holds which logical page of which sequence and head: host and device copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class TableKey(NamedTuple):
    """What sites have in common that share one page table.

    Attributes:
        kv_heads, page_size: heads, and tokens a page.
        reach: tokens behind the next query whose pages are needed; None: all of them.
        sinks: pages at the start that are needed whatever the reach.
        lets_go: pages out of reach are let go only when the policy reads; a dense read before that
            needs them all.
        owner: the site whose pages are freed by its own account, and so are in no other's table.
    """

    kv_heads: int
    page_size: int
    reach: int | None = None
    sinks: int = 0
    lets_go: bool = False
    owner: str = ""


class PageTable:
    """Pages of the sites that share a table: for each sequence, logical pages first .. held - 1,
    and the sinks before them; a head may have lost some of them.

    Attributes:
        table: int32 [B, Hkv, columns] on the device, -1 where no page is assigned.
        pages: physical pages the pools of these sites have.
    """

    def __init__(self, batch: int, key: TableKey, device: torch.device) -> None:
        self.batch, self.key, self.device = batch, key, device
        self.kv_heads, self.page_size = key.kv_heads, key.page_size
        self.pages = 0
        self.free = np.empty(0, np.int32)
        self.first = np.zeros(batch, np.int64)
        self.held = np.zeros(batch, np.int64)
        self.host = np.full((batch, self.kv_heads, 0), -1, np.int32)
        self.table = torch.full((batch, self.kv_heads, 0), -1, dtype=torch.int32, device=device)

    def shortage(self, end: np.ndarray, needed: np.ndarray) -> tuple[int, int]:
        """Columns, and physical pages beyond the free ones, that tokens up to `end` need once the
        pages before `needed` are freed."""
        columns = -(-end // self.page_size)
        new = int(np.maximum(columns - self.held, 0).sum()) * self.kv_heads
        gone = sum(self._recycled(row, int(at)).size for row, at in enumerate(needed))
        return int(columns.max(initial=0)), max(0, new - len(self.free) - gone)

    def first_needed(self, position: np.ndarray, policy: bool) -> np.ndarray:
        """The first page that a query at `position` or later may read, apart from sinks.

        Args:
            policy: the query reads through the policy.
        """
        if self.key.reach is None or (self.key.lets_go and not policy):
            return self.first.copy()
        oldest = np.maximum(position - self.key.reach, 0)
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
            self._put(int(row), low, high, pages.reshape(self.kv_heads, high - low))
            self.held[row] = high

    def recycle(self, needed: np.ndarray) -> np.ndarray:
        """Frees the pages before `needed`, sinks apart; returns their physical numbers."""
        freed = [np.empty(0, np.int32)]
        for row in np.flatnonzero(needed > self.first):
            low, high = max(int(self.first[row]), self.key.sinks), int(needed[row])
            freed.append(self._release(int(row), low, high))
            self.first[row] = high
        return np.concatenate(freed)

    def lose(self, row: int, head: int, pages: np.ndarray) -> np.ndarray:
        """Frees these logical pages of one head; returns their physical numbers."""
        lost: np.ndarray = self.host[row, head, pages]
        self.host[row, head, pages] = -1
        at = torch.tensor(pages, device=self.device)
        self.table[row, head, at] = -1
        self.free = np.concatenate([self.free, lost[::-1]])
        return lost

    def truncate(self, end: np.ndarray) -> np.ndarray:
        """Frees the pages that hold no token below `end`; returns their physical numbers."""
        keep = -(-end // self.page_size)
        freed = [np.empty(0, np.int32)]
        for row in np.flatnonzero(keep < self.held):
            freed.append(self._release(int(row), int(keep[row]), int(self.held[row])))
            self.held[row] = keep[row]
            self.first[row] = min(self.first[row], keep[row])
        return np.concatenate(freed)

    def rows_copied(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Which of `rows` of a selection need pages of their own, for another has the row's; and
        how many pages beyond the free ones that takes, once rows in no selection are freed."""
        copied = np.ones(len(rows), bool)
        copied[np.unique(rows, return_index=True)[1]] = False
        counts = (self.host >= 0).sum((1, 2))
        freed = counts.sum() - counts[np.unique(rows)].sum()
        needed = int(counts[rows[copied]].sum())
        return copied, max(0, needed - len(self.free) - int(freed))

    def select(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Makes sequence i what sequence rows[i] was; enough pages must be free.

        Returns:
            The pages freed; and for pages that were copied, the old numbers and the new ones.
        """
        copied, _ = self.rows_copied(rows)
        gone = np.setdiff1d(np.arange(self.batch), rows)
        freed = self.host[gone][self.host[gone] >= 0]
        self.free = np.concatenate([self.free, freed[::-1]])
        self.host = self.host[rows]
        self.first, self.held, self.batch = self.first[rows], self.held[rows], len(rows)
        mask = (self.host >= 0) & copied[:, None, None]
        old: np.ndarray = self.host[mask]
        split = len(self.free) - len(old)
        new, self.free = self.free[split:][::-1].copy(), self.free[:split]
        self.host[mask] = new
        self.table = torch.tensor(self.host, device=self.device)
        return freed, old, new

    def compact(self, spare: int) -> np.ndarray | None:
        """Numbers the assigned pages anew, so that they fit pools with `spare` free pages more.

        Returns:
            the old number of each page that is left; None where that would free too little.
        """
        live: np.ndarray = self.host[self.host >= 0]
        if 2 * self.pages <= 3 * (len(live) + spare):
            return None
        self.host[self.host >= 0] = np.arange(len(live), dtype=np.int32)
        self.table = torch.tensor(self.host, device=self.device)
        self.pages, self.free = len(live), np.empty(0, np.int32)
        return live

    def _recycled(self, row: int, needed: int) -> np.ndarray:
        pages = self.host[row, :, max(int(self.first[row]), self.key.sinks) : needed]
        return pages[pages >= 0]

    def _release(self, row: int, low: int, high: int) -> np.ndarray:
        """Frees logical pages low .. high - 1 of a sequence; returns their physical numbers."""
        if high <= low:
            return np.empty(0, np.int32)
        pages = self.host[row, :, low:high].flatten()
        pages = pages[pages >= 0]
        self.free = np.concatenate([self.free, pages[::-1]])
        self._put(row, low, high, np.full((self.kv_heads, high - low), -1, np.int32))
        return pages

    def _put(self, row: int, low: int, high: int, pages: np.ndarray) -> None:
        self.host[row, :, low:high] = pages
        self.table[row, :, low:high] = torch.tensor(pages, device=self.device)
