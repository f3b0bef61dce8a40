"""The index of a cache that somebody else owns: records of its pages, found again and kept true.

A cache of transformers holds keys and values and knows nothing of pages. What a memory needs beside
it is kept here: records of its full pages, written when a page is full and only then, and marks by
which a page is known again. Before a call it is made sure that the records still hold: a cache that
was cropped, reordered, reset or filled anew is noticed, and what no longer holds is written again.

A tensor tells by its version whether something wrote to it. Inference tensors have none: there the
newest page's mark must agree, and the call must begin where the last one ended; in the first layer,
whose keys tell nothing of the tokens before them, every page is compared.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..models.memory.paged import row_blocks
from ..models.memory.parts import field_width
from ..models.memory.records import page_records
from ..models.memory.spec import Memory


class CacheIndex:
    """Records and marks for one attention's cache, keys [B, Hkv, L, Dk] and values [B, Hkv, L, Dv].

    Args:
        memory: what is recorded: `memory.fields`, for pages or for each of `memory.levels`.
        aligned: records of a page lie in the order of pages, row by row of the cache, with room for
            all that the cache holds. Else page by page, all rows of the cache beside each other,
            and the room grows.
        keys, values: the cache, for its shapes.
    """

    def __init__(self, memory: Memory, aligned: bool, keys: Tensor, values: Tensor) -> None:
        self.memory, self.aligned = memory, aligned
        self.sizes = memory.levels or ((memory.page_size,) if memory.fields else ())
        self.batch, self.kv_heads = keys.shape[:2]
        self.dtype, self.device = keys.dtype, keys.device
        self.dims = (keys.shape[3], values.shape[3])
        self.start = [0] * self.batch
        # Full groups that have a record, by their size and row.
        self.filled = {size: [0] * self.batch for size in self.sizes}
        self.pages = [0] * self.batch
        self.capacity = dict.fromkeys(self.sizes, 0)
        # Tensors that outlive the call must not be inference tensors, which nothing may write to.
        with torch.inference_mode(False):
            self.records = {size: [self._empty(0, f) for f in memory.fields] for size in self.sizes}
            self.marks = torch.empty((self.batch, self.kv_heads, 0), dtype=torch.int64)
            self.marks = self.marks.to(self.device)
        self.bind(keys, values, None)
        if aligned:
            for size in self.sizes:
                self._grow(size, keys.shape[2] // size)

    def bind(
        self, keys: Tensor, values: Tensor, held: Sequence[int] | None, writes: int = 0
    ) -> None:
        """From now on the index is of these tensors, which hold what the last ones held.

        Args:
            held: keys of each row by now, from its start; None: not to be trusted before all of
                its pages were compared.
            writes: to each tensor, with which new rows will have come before the next call.
        """
        self.storage = StorageWeakRef(keys.untyped_storage())
        self.layout = (keys.storage_offset(), keys.shape[1], keys.stride())
        found = _versions(keys, values)
        self.versions = None if found is None else (found[0] + writes, found[1] + writes)
        self.held = None if held is None else list(held)

    def is_of(self, keys: Tensor) -> bool:
        """Whether this is the index of the tensor's very memory."""
        same = StorageWeakRef(keys.untyped_storage()).cdata == self.storage.cdata
        layout = (keys.storage_offset(), keys.shape[1], keys.stride())
        return same and not self.gone and layout == self.layout

    @property
    def offset(self) -> int:
        """Of the keys in their storage."""
        return int(self.layout[0])

    def untouched(self, keys: Tensor, values: Tensor, held: Sequence[int], deep: bool) -> bool:
        """Whether nothing is known to have written to the cache since the last call.

        Args:
            held: keys of each row, from its start.
            deep: the keys of some site tell of the tokens before them.
        """
        if self.held is None or self.versions != _versions(keys, values):
            return False
        return self.versions is not None or (deep and self.held == list(held))

    @property
    def gone(self) -> bool:
        """Whether the cache is no more."""
        return bool(self.storage.expired())

    @property
    def nbytes(self) -> int:
        records = sum(pool.nbytes for pools in self.records.values() for pool in pools)
        return records + self.marks.nbytes

    def could_be_of(self, keys: Tensor) -> bool:
        """Whether a cache with rows like these may hold some of what is recorded here."""
        alike = keys.shape[1] == self.kv_heads and keys.shape[3] == self.dims[0]
        return alike and keys.dtype == self.dtype and keys.device == self.device

    # --- what still holds ---

    def last_page_holds(self, keys: Tensor, values: Tensor, start: Sequence[int]) -> Tensor | None:
        """A bool: whether each row's newest page is as it was; None: it must be looked into.

        A tensor, so that many sites can be asked before anything waits for an answer.
        """
        size = self.memory.page_size
        if list(start) != self.start or len(start) != self.batch:
            return None
        size, last = self.memory.page_size, [max(p - 1, 0) for p in self.pages]
        begin = [first + page * size for first, page in zip(start, last, strict=True)]
        if max(begin) + size > keys.shape[2]:
            return None
        found = self._marks(keys, values, begin, 0, 1)[:, :, 0]
        at = torch.tensor(last, device=self.device)[:, None, None].expand(-1, self.kv_heads, 1)
        same = found == self.marks.gather(2, at)[:, :, 0]
        recorded = torch.tensor(self.pages, device=self.device) > 0
        return (same | ~recorded[:, None]).all()

    def matching_pages(
        self, keys: Tensor, values: Tensor, start: Sequence[int], held: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """For each row of a cache, the row of this index that begins as it does, and how far.

        Args:
            start: the first key of each row that is no padding.
            held: keys of each row, from there.

        Returns:
            rows of this index, and pages for which the marks agree.
        """
        size, most = self.memory.page_size, self.marks.shape[2]
        rows, agreed = [], []
        for row, (first, tokens) in enumerate(zip(start, held, strict=True)):
            pages = min(tokens // size, most)
            if not pages:
                rows.append(min(row, self.batch - 1))
                agreed.append(0)
                continue
            one = slice(row, row + 1)
            found = self._marks(keys[one], values[one], [first], 0, pages)
            same = (found == self.marks[:, :, :pages]).all(1)  # [rows here, pages]
            recorded = torch.tensor(self.pages, device=same.device)
            same &= torch.arange(pages, device=same.device) < recorded[:, None]
            lengths = same.long().cumprod(1).sum(1)
            # Its own row, where another agrees no further.
            best = int(lengths.argmax())
            own = row < self.batch and int(lengths[row]) == int(lengths[best])
            rows.append(row if own else best)
            agreed.append(int(lengths[best]))
        return rows, agreed

    def moved_to(self, keys: Tensor, values: Tensor, rows: Sequence[int]) -> CacheIndex:
        """The index of another cache, whose rows begin like `rows` of this one's."""
        other = CacheIndex(self.memory, self.aligned, keys, values)
        at = torch.tensor(rows, device=self.device)
        with torch.inference_mode(False), torch.no_grad():
            other.marks = self.marks[at].clone()
            for size in self.sizes:
                if not self.aligned:  # where the cache itself says how much there is room for
                    other._grow(size, self.capacity[size])
                held = min(self.capacity[size], other.capacity[size])
                for new, old in zip(other.records[size], self.records[size], strict=True):
                    by_row = self._by_row(old, size)[at]
                    other._by_row(new, size)[:, :, :held].copy_(by_row[:, :, :held])
        other.pages = [self.pages[row] for row in rows]
        other.filled = {size: [self.filled[size][row] for row in rows] for size in self.sizes}
        return other

    def keep(self, start: Sequence[int], pages: Sequence[int]) -> None:
        """Only the first `pages` pages of each row still hold, and those end where they did."""
        self.start = list(start)
        self.pages = [min(old, new) for old, new in zip(self.pages, pages, strict=True)]
        for size in self.sizes:
            ends = [p * self.memory.page_size // size for p in self.pages]
            self.filled[size] = [min(f, e) for f, e in zip(self.filled[size], ends, strict=True)]

    # --- writing ---

    @torch.no_grad()
    def fill(self, keys: Tensor, values: Tensor, held: Sequence[int]) -> int:
        """Writes what is missing for the first `held` keys of each row; records that it wrote.

        Args:
            held: keys of each row, counted from its start.
        """
        written = 0
        with torch.inference_mode(False):
            for size in self.sizes:
                self._grow(size, max(h // size for h in held))
                for row in range(self.batch):
                    first, stop = self.filled[size][row], held[row] // size
                    if stop > first:
                        self._write(keys, values, size, row, first, stop)
                        self.filled[size][row] = stop
                        written += stop - first
            self._mark(keys, values, [h // self.memory.page_size for h in held])
        return written

    def pools(self, size: int, length: int) -> list[Tensor]:
        """The records of one size, for a cache of `length` keys."""
        rows = self.batch * self.kv_heads * -(-length // size)
        self._grow(size, -(-length // size))
        return [pool[:rows] for pool in self.records[size]]

    def _write(
        self, keys: Tensor, values: Tensor, size: int, row: int, first: int, stop: int
    ) -> None:
        """Records `first` .. `stop` - 1 of one row, a bounded number at a time."""
        begin = self.start[row] + first * size
        wide = self.kv_heads * size * sum(self.dims) * 8
        for block in row_blocks(stop - first, wide):
            at = slice(begin + block.start * size, begin + block.stop * size)
            parts = [x[row, :, at].unflatten(1, (-1, size)).flatten(0, 1) for x in (keys, values)]
            made = page_records(parts[0], parts[1], list(self.memory.fields))
            for pool, record in zip(self.records[size], made, strict=True):
                of_heads = record.to(pool.dtype).unflatten(0, (self.kv_heads, -1))
                target = self._by_row(pool, size)[row, :, first + block.start : first + block.stop]
                target.copy_(of_heads)

    def _by_row(self, pool: Tensor, size: int) -> Tensor:
        """A pool of records as [B, Hkv, capacity, width]."""
        if self.aligned:
            return pool.view(self.batch, self.kv_heads, self.capacity[size], -1)
        shape = (self.capacity[size], self.batch, self.kv_heads, pool.shape[1])
        return pool.view(shape).permute(1, 2, 0, 3)

    def _empty(self, rows: int, field: str) -> Tensor:
        width = field_width(field, *self.dims)
        dtype = torch.float32 if field == "log_count" else self.dtype
        return torch.zeros((rows, width), dtype=dtype, device=self.device)

    def _grow(self, size: int, groups: int) -> None:
        held = self.capacity[size]
        if groups <= held:
            return
        wanted = groups if self.aligned else max(groups, 2 * held, 16)
        old = [self._by_row(pool, size) if held else None for pool in self.records[size]]
        self.capacity[size] = wanted
        with torch.inference_mode(False), torch.no_grad():
            rows = wanted * self.batch * self.kv_heads
            self.records[size] = [self._empty(rows, field) for field in self.memory.fields]
            for new, before in zip(self.records[size], old, strict=True):
                if before is not None:
                    self._by_row(new, size)[:, :, :held].copy_(before)

    # --- marks ---

    def _mark(self, keys: Tensor, values: Tensor, pages: Sequence[int]) -> None:
        short, most = self.marks.shape[2], max(pages)
        if most > short:
            more = max(most, 2 * short, 16) - short
            self.marks = torch.nn.functional.pad(self.marks, (0, more))
        first, stop = min(self.pages), min(pages)
        if self.pages == [first] * self.batch and list(pages) == [stop] * self.batch:
            if stop > first:
                found = self._marks(keys, values, self.start, first, stop)
                self.marks[:, :, first:stop] = found
        else:
            for row, (have, want) in enumerate(zip(self.pages, pages, strict=True)):
                if want > have:
                    one = slice(row, row + 1)
                    start = self.start[one]
                    found = self._marks(keys[one], values[one], start, have, want)
                    self.marks[one, :, have:want] = found
        self.pages = [max(have, want) for have, want in zip(self.pages, pages, strict=True)]

    def _marks(
        self, keys: Tensor, values: Tensor, start: Sequence[int], first: int, stop: int
    ) -> Tensor:
        """int64 [B, Hkv, pages]: the bits of some of a page's rows, hashed."""
        size, count, marks = self.memory.page_size, stop - first, []
        begin = [row + first * size for row in start]
        if len({*begin}) > 1:
            keys, values = (
                torch.stack([x[row, :, at : at + count * size] for row, at in enumerate(begin)])
                for x in (keys, values)
            )
            begin = [0]
        wide = len(start) * self.kv_heads * size * sum(self.dims) * 8
        for block in row_blocks(count, wide):
            at = slice(begin[0] + block.start * size, begin[0] + block.stop * size)
            parts = [x[:, :, at].unflatten(2, (-1, size)).flatten(3) for x in (keys, values)]
            marks.append(_hash(parts[0], 0) + _hash(parts[1], 1))
        return torch.cat(marks, 2)


def _versions(keys: Tensor, values: Tensor) -> tuple[int, int] | None:
    """Counts of what wrote to them, or None where that is not counted."""
    if keys.is_inference() or values.is_inference():
        return None
    return keys._version, values._version


def _hash(rows: Tensor, salt: int) -> Tensor:
    """int64 [...]: the bits of the last axis, weighted; what overflows wraps around."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
    kind = torch.int32 if rows.shape[-1] * rows.element_size() % 4 == 0 else None
    bits = rows.contiguous().view(kind or kinds[rows.element_size()]).long()
    return (bits * _weights(bits.shape[-1], salt, rows.device)).sum(-1)


@cache
def _weights(count: int, salt: int, device: torch.device) -> Tensor:
    """Odd random numbers, the same in every process."""
    drawn = torch.Generator().manual_seed(9029 + salt)
    with torch.inference_mode(False):
        numbers = torch.randint(-(2**62), 2**62, (count,), generator=drawn) * 2 + 1
        return numbers.to(device)


class Indexes:
    """The indexes of all caches that one policy reads; shared by the graphs of a process."""

    _all: ClassVar[weakref.WeakSet[Indexes]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._held: dict[Any, list[CacheIndex]] = {}
        self._all.add(self)

    def find(
        self,
        sites: Sequence[tuple[Any, Memory, bool]],
        caches: Sequence[tuple[Tensor, Tensor]],
        start: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
        deep: bool = True,
    ) -> tuple[list[CacheIndex], int]:
        """The indexes of a graph's caches, true for the first `held` keys of each row.

        What one site shows to have changed has changed for all of them: a token that differs
        changes the keys of its own row in the first layer, and of every later row in the others.

        Args:
            sites: for each a name that tells it from others of its shape, its memory, and whether
                pages are aligned.
            caches: keys and values.
            start, held: for each site, by row.
            deep: one of the sites at least is behind others of its model.

        Returns:
            one index a site, and how many pages of caches that were known held something else.
        """
        with self.lock:
            found = [self._of(site, pair[0]) for site, pair in zip(sites, caches, strict=True)]
            rebuilt = 0
            if not self._trusted(found, caches, start, held, deep):
                found, rebuilt = self._verified(sites, found, caches, start, held)
            result: list[CacheIndex] = []
            for index, pair, tokens in zip(found, caches, held, strict=True):
                assert index is not None
                index.fill(*pair, tokens)
                result.append(index)
            return result, rebuilt

    def knows(self, site: Any, keys: Tensor) -> bool:
        """Whether there is an index of the tensor's very memory."""
        with self.lock:
            return self._of(site, keys) is not None

    def follow(
        self,
        site: Any,
        pair: tuple[Tensor, Tensor],
        start: Sequence[int],
        held: Sequence[int],
    ) -> None:
        """Binds an index whose cache is gone to the longer copy that took its place, if these
        tensors are one: they hold as much more as was said, and the newest page is the same.

        For sites behind others of their model, whose keys tell of all the tokens before them.

        Args:
            site, pair: a name and memory, and keys and values, as for `find`.
            start, held: by row, as for `find`.
        """
        with self.lock:
            if self._of(site, pair[0]) is not None:
                return
            for index in self._held.get(site, ()):
                if index.gone and index.held == list(held) and index.could_be_of(pair[0]):
                    answer = index.last_page_holds(*pair, start)
                    if answer is not None and bool(answer):
                        index.bind(*pair, held)
                        return

    def distrust(self, caches: Sequence[Tensor]) -> None:
        """Something writes to these caches that this does not follow: compare before use."""
        with self.lock:
            for held in self._held.values():
                for index in held:
                    if index.held is not None and any(map(index.is_of, caches)):
                        index.held = None

    def drop(self, gone: Callable[[CacheIndex], bool]) -> int:
        """Forgets the indexes for which `gone` is true; how many."""
        with self.lock:
            before = sum(map(len, self._held.values()))
            self._held = {
                key: [index for index in held if not gone(index)]
                for key, held in self._held.items()
            }
            return before - sum(map(len, self._held.values()))

    @classmethod
    def everywhere(cls) -> Iterable[Indexes]:
        """Those of every policy in this process."""
        return list(cls._all)

    @property
    def nbytes(self) -> int:
        with self.lock:
            return sum(index.nbytes for held in self._held.values() for index in held)

    def _of(self, site: Any, keys: Tensor) -> CacheIndex | None:
        return next((x for x in self._held.get(site, ()) if x.is_of(keys)), None)

    def _trusted(
        self,
        found: Sequence[CacheIndex | None],
        caches: Sequence[tuple[Tensor, Tensor]],
        start: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
        deep: bool,
    ) -> bool:
        """Whether every cache is the one it was, with nothing but more rows."""
        answers = []
        for index, pair, first, tokens in zip(found, caches, start, held, strict=True):
            if index is None or index.batch != len(first):
                return False
            if not index.untouched(*pair, tokens, deep):
                return False
            size = index.memory.page_size
            if any(t // size < p for t, p in zip(tokens, index.pages, strict=True)):
                return False
            counted = index.versions is not None  # then the tensors themselves tell
            if index.start == list(first) and (counted or not any(index.pages)):
                continue
            answer = index.last_page_holds(*pair, first)
            if answer is None:
                return False
            answers.append(answer)
        return not answers or bool(torch.stack(answers).all())

    def _verified(
        self,
        sites: Sequence[tuple[Any, Memory, bool]],
        found: Sequence[CacheIndex | None],
        caches: Sequence[tuple[Tensor, Tensor]],
        start: Sequence[Sequence[int]],
        held: Sequence[Sequence[int]],
    ) -> tuple[list[CacheIndex | None], int]:
        """Indexes that hold only what every site's marks confirm."""
        matches = []
        for site, index, pair, first, tokens in zip(sites, found, caches, start, held, strict=True):
            known = [index] if index is not None else []
            known += [x for x in self._held.get(site, ()) if x is not index]
            best: tuple[CacheIndex | None, list[int], list[int]]
            best = (None, [], [0] * len(first))
            for candidate in known:
                if candidate.could_be_of(pair[0]):
                    rows, agreed = candidate.matching_pages(*pair, first, tokens)
                    if sum(agreed) > sum(best[2]):
                        best = (candidate, rows, agreed)
            matches.append(best)
        rebuilt = 0
        result: list[CacheIndex | None] = []
        batch = len(start[0])
        # Tokens that hold at every site, by row: sites may have pages of different sizes.
        sure = [
            min(
                agreed[row] * site[1].page_size
                for site, (_, _, agreed) in zip(sites, matches, strict=True)
            )
            for row in range(batch)
        ]
        for site, index, match, pair, first, tokens in zip(
            sites, found, matches, caches, start, held, strict=True
        ):
            candidate, rows, _ = match
            _, memory, aligned = site
            size, known = memory.page_size, [] if index is None else [*index.pages]
            in_place = candidate is index and rows == list(range(batch))
            mine = index if index is not None and index.batch == batch else None
            if candidate is None or not any(sure):
                new = mine or CacheIndex(memory, aligned, *pair)
            elif in_place and mine is not None:
                new = mine
            else:
                new = candidate.moved_to(*pair, rows)
            new.keep(first, [tokens_ // size for tokens_ in sure])
            if index is not None:
                rebuilt += sum(
                    max(0, min(recorded, t // size) - s // size)
                    for recorded, t, s in zip(known, tokens, sure, strict=False)
                )
            result.append(new)
            self._put(site, new, index)
        return result, rebuilt

    def _put(self, site: Any, new: CacheIndex, old: CacheIndex | None) -> None:
        kept = [x for x in self._held.get(site, ()) if x not in (new, old) and not x.gone]
        self._held[site] = [*kept, new]
