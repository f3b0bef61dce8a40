"""Runs a graph that reads somebody else's caches through memories: what the host does for it.

Before each call: what the queries see is read off the mask's values, the indexes are made true, and
tables say where pages lie. A mask that hides keys in the midst of a context, or a call of many
tokens, goes to the graph as it was, which reads everything.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.memory.spec import Memory
from .cache_index import CacheIndex, Indexes

log = logging.getLogger("memcompile")
# Calls in a row that found their caches changed, after which a graph reads them densely.
GIVE_UP_AFTER = 4
# Calls that it does so for, before it looks again.
REST = 64


@dataclass(frozen=True)
class SitePlan:
    """One attention: its memory, and which arguments of the graph are its cache.

    Attributes:
        layer: of the model, 0 the first.
        group: number of the group that has its tables.
        keys, values: positions among the graph's arguments.
        grown: positions among its results of the longer caches that it makes of keys and values,
            or None where it writes into the caches.
        places: where it does, the numbers among what is looked at of the rows it writes.
    """

    name: str
    layer: int
    memory: Memory
    group: int
    keys: int
    values: int
    grown: tuple[int, int] | None
    places: tuple[int, ...]


@dataclass(frozen=True)
class GroupPlan:
    """Sites that share page tables.

    Attributes:
        mask: number of the mask among what is looked at beforehand; None: the one query sees every
            key.
        record_sizes: tokens of the records that have a table.
    """

    mask: int | None
    kv_heads: int
    page_size: int
    record_sizes: tuple[int, ...]


@dataclass
class Calls:
    """What a compiled graph has run.

    Attributes:
        policy, dense: calls read through the policy, and densely.
        pages_read: pages that selecting sites read exactly, per KV head, over all calls.
        pages_held: pages that those sites had to choose from.
        rebuilt: full pages whose records were written anew, since the cache had changed.
        why_dense: reasons of dense calls, with their number.
    """

    policy: int = 0
    dense: int = 0
    pages_held: int = 0
    rebuilt: int = 0
    why_dense: dict[str, int] = field(default_factory=dict)
    # Counts stay tensors until asked for, so that a call never waits for them.
    _read: int = 0
    _counts: list[Tensor] = field(default_factory=list, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    @property
    def pages_read(self) -> int:
        with self._lock:
            self._read += sum(int(count.sum()) for count in self._counts)
            self._counts = []
            return self._read

    def note(self, counts: Tensor) -> None:
        """Adds the pages [sites, B] of one call."""
        self._counts.append(counts)
        if len(self._counts) >= 256:
            _ = self.pages_read

    def to_json(self) -> dict[str, Any]:
        names = ("policy", "dense", "pages_read", "pages_held", "rebuilt", "why_dense")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Seen:
    """What the queries of a call see, by row of the batch.

    Attributes:
        start: the first visible key.
        position: the token that the first query stands at, counted from there.
        rows: queries of each row.
    """

    start: tuple[int, ...]
    position: tuple[int, ...]
    rows: int


def seen_through(mask: Tensor, batch: int, hidden: float) -> Seen | None:
    """What a mask [B or 1, 1, n, L] lets n queries see, or None where that is not one run of keys
    a row, ending at the query's own.

    Args:
        mask: bool, True = visible; or added to the logits, 0 = visible.
        hidden: added logits hide a key when they are not above this.
    """
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((visible | (mask <= hidden)).all()):
        return None
    see = visible[:, 0].cpu().numpy()  # [B, n, L]
    rows, length = see.shape[1:]
    first = see.argmax(2)
    last = length - 1 - see[:, :, ::-1].argmax(2)
    count = np.count_nonzero(see, axis=2)
    ahead = np.arange(rows)
    runs = (count == last - first + 1).all() and (count > 0).all()
    if not runs or (first != first[:, :1]).any() or (last != last[:, :1] + ahead).any():
        return None
    start, position = first[:, 0], (last - first)[:, 0]
    if len(start) == 1 < batch:
        start, position = start.repeat(batch), position.repeat(batch)
    return Seen(tuple(start.tolist()), tuple(position.tolist()), rows)


class Tables:
    """Where the pages of a group's caches lie, [B, Hkv, L, D] seen from one start a row."""

    def __init__(
        self, group: GroupPlan, seen: Seen, length: int, aligned: bool, device: torch.device
    ) -> None:
        self.group, self.length, self.device = group, length, device
        self.start = np.array(seen.start)
        self.aligned, self.heads = aligned, group.kv_heads
        size = group.page_size
        batch = len(self.start)
        row = np.arange(batch * self.heads).reshape(batch, self.heads, 1)
        self.row = row
        column = np.arange(-(-length // size))
        # Pages that the cache holds whole.
        self.whole = (length - self.start) // size
        if aligned:
            table = row * (length // size) + column
        else:
            begin = row * length + self.start[:, None, None] + column * size
            table = np.where(column < self.whole[:, None, None], begin, -1)
        self.page_table = self._tensor(table)
        self.records = [self._records(of) for of in group.record_sizes]
        if not aligned:
            # The keys behind the last whole page.
            behind = self.start + self.whole * size
            key = behind[:, None, None] + np.arange(size)
            self.tail_table = self._tensor(np.where(key < length, row * length + key, -1))

    def inputs(self, seen: Seen) -> list[Tensor]:
        """What the graph takes for the group, in the order of `passes.read_cached`."""
        position = np.array(seen.position)
        batch = len(position)
        given = [self._tensor(position), self._tensor(np.full(batch, seen.rows)), self.page_table]
        given += self.records
        if not self.aligned:
            given.append(self._tensor(position - self.whole * self.group.page_size))
            given.append(self.tail_table)
        return given

    def fits(self, seen: Seen, length: int) -> bool:
        return self.length == length and np.array_equal(self.start, seen.start)

    def _records(self, size: int) -> Tensor:
        column = np.arange(-(-self.length // size))
        if self.aligned:
            return self._tensor(self.row * (self.length // size) + column)
        return self._tensor(column * self.row.size + self.row)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int32)).to(self.device)


class CachedRun:
    """A compiled graph over caches, called with the arguments of the graph that it was made of.

    Args:
        read: makes the graph that reads through memories, for aligned pages or not.
        dense: makes the graph as it was.
        look: computes from the arguments what is looked at beforehand: masks, and the rows that
            the graph writes.
        most_rows: queries a row that are still read through the policy.
    """

    def __init__(
        self,
        sites: Sequence[SitePlan],
        groups: Sequence[GroupPlan],
        read: Callable[[bool], Callable[..., Any]],
        dense: Callable[[], Callable[..., Any]],
        look: Callable[..., Sequence[Tensor]] | None,
        indexes: Indexes,
        most_rows: int,
        hidden: float,
    ) -> None:
        self.sites, self.groups, self.indexes = list(sites), list(groups), indexes
        self.most_rows, self.hidden, self.look = most_rows, hidden, look
        self.calls = Calls()
        self._make = {True: lambda: read(True), False: lambda: read(False), None: dense}
        self._made: dict[bool | None, Callable[..., Any]] = {}
        self._lock = threading.RLock()
        self._tables: dict[int, Tables] = {}
        self._changed = 0
        self._given_up = ""
        self._resting = 0

    def __call__(self, *args: Any) -> Any:
        why, seen = self._look(args)
        if why:
            self.indexes.distrust([args[site.keys] for site in self.sites if site.memory.fields])
            with self._lock:
                self.calls.dense += 1
                self.calls.why_dense[why] = self.calls.why_dense.get(why, 0) + 1
            return self.graph(None)(*args)
        return self._read(args, seen)

    def graph(self, which: bool | None) -> Callable[..., Any]:
        """The graph for aligned pages (True), any pages (False), or as it was (None)."""
        made = self._made.get(which)
        if made is None:
            with self._lock:
                if which not in self._made:
                    self._made[which] = self._make[which]()
                made = self._made[which]
        return made

    def _look(self, args: Sequence[Any]) -> tuple[str, list[Seen]]:
        """What each group's queries see; or why this call reads densely."""
        if self._given_up:
            why = self._given_up
            with self._lock:
                self._resting -= 1
                if self._resting <= 0:
                    self._given_up = ""
            return why, []
        looked = self.look(*args) if self.look is not None else ()
        read: dict[int, Seen | None] = {}
        seen: list[Seen] = []
        for number, group in enumerate(self.groups):
            keys = self._first_keys(number, args)
            if group.mask is None:
                batch = keys.shape[0]
                seen.append(Seen((0,) * batch, (self._length(number, args, 1) - 1,) * batch, 1))
                continue
            mask = looked[group.mask]
            if mask.shape[2] > self.most_rows:
                return f"more than {self.most_rows} tokens at a time", []
            if group.mask not in read:
                read[group.mask] = seen_through(mask, keys.shape[0], self.hidden)
            found = read[group.mask]
            if found is None:
                return "the mask hides keys in the midst of a context", []
            seen.append(found)
        for number, (group, found) in enumerate(zip(self.groups, seen, strict=True)):
            length = self._length(number, args, found.rows)
            if length < group.page_size:
                return f"the cache is shorter than a page of {group.page_size}", []
        for site, first in zip(self.sites, self._first_written(args, looked), strict=True):
            found = seen[site.group]
            if any(s + p > first for s, p in zip(found.start, found.position, strict=True)):
                return "the graph writes over keys that come before the query's own", []
        return "", seen

    def _first_written(self, args: Sequence[Any], looked: Sequence[Tensor]) -> list[int]:
        """For each site the first of the rows that the graph writes to its caches."""
        numbers = sorted({place for site in self.sites for place in site.places})
        first: dict[int, int] = {}
        if numbers:  # one wait for all of them
            rows = torch.stack([looked[number].amin() for number in numbers]).tolist()
            first = dict(zip(numbers, rows, strict=True))
        return [
            min(first[place] for place in site.places)
            if site.places
            else int(args[site.keys].shape[2])
            for site in self.sites
        ]

    def _first_keys(self, group: int, args: Sequence[Any]) -> Tensor:
        site = next(site for site in self.sites if site.group == group)
        keys: Tensor = args[site.keys]
        return keys

    def _length(self, group: int, args: Sequence[Any], rows: int) -> int:
        """Keys that the cache of a group has room for while the graph reads it."""
        site = next(site for site in self.sites if site.group == group)
        length = int(args[site.keys].shape[2])
        return length + rows if site.grown is not None else length

    def _read(self, args: Sequence[Any], seen: list[Seen]) -> Any:
        lengths = [self._length(i, args, found.rows) for i, found in enumerate(seen)]
        aligned = all(
            length % group.page_size == 0
            and all(length % size == 0 for size in group.record_sizes)
            and not any(found.start)
            for group, length, found in zip(self.groups, lengths, seen, strict=True)
        ) and all(site.grown is None for site in self.sites)
        given: list[Tensor] = []
        with self._lock:
            for number, (group, found) in enumerate(zip(self.groups, seen, strict=True)):
                tables = self._tables.get(number)
                keys = self._first_keys(number, args)
                if (
                    tables is None
                    or tables.aligned != aligned
                    or not tables.fits(found, lengths[number])
                ):
                    tables = Tables(group, found, lengths[number], aligned, keys.device)
                    self._tables[number] = tables
                given += tables.inputs(found)
        of, records = self._records(args, seen, lengths, aligned)
        results = self.graph(aligned)(*args, *given, *records)
        return self._finish(args, results, of, seen)

    def _records(
        self, args: Sequence[Any], seen: list[Seen], lengths: list[int], aligned: bool
    ) -> tuple[dict[str, CacheIndex], list[Tensor]]:
        """The index of each site that has one, made true, and what the graph takes of them."""
        recorded = [site for site in self.sites if site.memory.fields]
        if not recorded:
            return {}, []
        given: list[Tensor] = []
        # Other threads may look for their own caches' rows in these indexes.
        with self.indexes.lock:
            indexes, rebuilt = self.indexes.find(
                [(site.name, site.memory, aligned) for site in recorded],
                [(args[site.keys], args[site.values]) for site in recorded],
                [seen[site.group].start for site in recorded],
                [seen[site.group].position for site in recorded],
                deep=any(site.layer for site in recorded),
            )
            of = dict(zip((site.name for site in recorded), indexes, strict=True))
            for number in range(len(self.groups)):
                for site in recorded:
                    if site.group == number:
                        index = of[site.name]
                        for size in index.sizes:
                            given += index.pools(size, lengths[number])
        self._note(rebuilt)
        return of, given

    def _finish(
        self, args: Sequence[Any], results: Any, of: dict[str, CacheIndex], seen: list[Seen]
    ) -> Any:
        for site in self.sites:
            if site.name in of:
                places = site.grown or (site.keys, site.values)
                keys, values = ((results if site.grown else args)[place] for place in places)
                held = [position + seen[site.group].rows for position in seen[site.group].position]
                of[site.name].bind(keys, values, held)
        selecting = [site for site in self.sites if site.memory.selects]
        with self._lock:
            self.calls.policy += 1
            for site in selecting:
                found = seen[site.group]
                size, heads = site.memory.page_size, self.groups[site.group].kv_heads
                for position in found.position:
                    pages = sum((position + i) // size + 1 for i in range(found.rows))
                    self.calls.pages_held += heads * pages
            if selecting:
                *results, counts = results
                self.calls.note(counts)
        return results

    def _note(self, rebuilt: int) -> None:
        """Gives up on caches that change under every call, such as a rolling window's."""
        with self._lock:
            self.calls.rebuilt += rebuilt
            self._changed = self._changed + 1 if rebuilt else 0
            if self._changed > GIVE_UP_AFTER and not self._given_up:
                self._resting = REST
                self._given_up = (
                    f"its caches had changed before {GIVE_UP_AFTER + 1} calls in a row, so their "
                    f"indexes never hold: the next {REST} calls read densely"
                )
                log.info(
                    "a graph of %d attentions reads densely: %s", len(self.sites), self._given_up
                )
