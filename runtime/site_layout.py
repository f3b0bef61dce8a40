"""What the state holds for one attention site: its tables, pools, and tensors of fixed size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..models.memory.parts import field_width
from ..models.memory.spec import Memory
from .page_table import TableKey


class Store(NamedTuple):
    """A page table with the pools that its pages number.

    Attributes:
        pools: shape of a page in, and element type of, each pool.
    """

    key: TableKey
    pools: list[tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class SiteLayout:
    """What the state must hold for one attention site.

    Attributes:
        name: the site's name, unique in a model.
        kv_heads, key_dim, value_dim, dtype: shape and element type of its keys and values.
        memory: what it remembers.
        window: the site's own sliding window; tokens out of it are never read again. 0 = none.
        features: width of what a state's feature map makes of a key; 0 without a state.
    """

    name: str
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    memory: Memory
    window: int = 0
    features: int = 0

    @property
    def reads_within(self) -> int:
        """Tokens that an exact read of this site reaches back, in every mode; 0 = all."""
        return self.window or self.memory.own_window

    @property
    def table_key(self) -> TableKey:
        """The table of keys and values."""
        memory = self.memory
        key = TableKey(self.kv_heads, memory.page_size)
        if memory.state is not None:
            # The token that enters the state stands one behind the window.
            return key._replace(reach=memory.own_window)
        if self.window:
            return key._replace(reach=self.window - 1)
        if memory.evict is None:
            return key
        if memory.evict.rule == "lowest":
            return key._replace(lets_go=True, owner=self.name)
        reach = memory.window_pages * memory.page_size
        return key._replace(reach=reach, sinks=memory.sink_pages, lets_go=True)

    def level_key(self, number: int) -> TableKey:
        """The table of one level's records."""
        memory = self.memory
        size = memory.levels[number]
        key = TableKey(self.kv_heads, size)
        if memory.evict is None or number + 1 == len(memory.levels):
            return key
        # Read where the level above is opened: its sinks, its window, and its open record.
        above = memory.level(number + 1)
        reach, ratio = (above.window + 1) * above.size - 1, above.size // size
        return key._replace(reach=reach, sinks=above.sinks * ratio, lets_go=True)

    def stores(self) -> list[Store]:
        """Tables and pools: keys, values and their index, then one a level."""
        dims = (self.key_dim, self.value_dim)
        exact: list[tuple[tuple[int, ...], torch.dtype]]
        records: list[tuple[tuple[int, ...], torch.dtype]]
        exact = [((self.memory.page_size, dim), self.dtype) for dim in dims]
        records = [
            ((field_width(field, *dims),), torch.float32 if field == "log_count" else self.dtype)
            for field in self.memory.fields
        ]
        if not self.memory.levels:
            return [Store(self.table_key, exact + records)]
        levels = [Store(self.level_key(i), records) for i in range(len(self.memory.levels))]
        return [Store(self.table_key, exact), *levels]

    def rows(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape for one sequence, and element type, of each tensor of a state."""
        state = self.memory.state
        if state is None:
            return []
        wide = torch.promote_types(self.dtype, torch.float32)
        shapes = [(self.kv_heads, self.features, self.value_dim)]
        norm = [(self.kv_heads, self.features)] if state.normalised else []
        return [(shape, wide) for shape in (*shapes, *norm)]

    def held_bytes(self, tokens: int) -> int:
        """Bytes that a sequence of `tokens` takes when the last has read through the policy: keys,
        values, records, account and state; without page tables and the free pages of pools."""
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.rows())
        if self.memory.account is not None:
            pages = -(-tokens // self.memory.page_size)
            total += self.kv_heads * pages * torch.float32.itemsize
        for store in self.stores():
            page = sum(math.prod(shape) * dtype.itemsize for shape, dtype in store.pools)
            total += self.kv_heads * self.pages_held(store.key, tokens) * page
        return total

    def pages_held(self, key: TableKey, tokens: int) -> int:
        """Pages of one of its tables that a KV head holds then."""
        pages = -(-tokens // key.page_size)
        if self.memory.account is not None:
            pages = min(pages, self.memory.budget_pages)
        if key.reach is not None:
            first = max(0, tokens - 1 - key.reach) // key.page_size
            pages -= max(0, first - key.sinks)
        return pages

    def serves(self, other: SiteLayout) -> bool:
        """Whether what is held for this site is all that `other` has to hold for it."""
        mine, others = ((x.name, x.key_dim, x.value_dim, x.dtype) for x in (self, other))
        same = mine == others and self.table_key == other.table_key
        kinds = [(x.memory.levels, x.memory.account, x.memory.state) for x in (self, other)]
        # What a query accounted for, or a state took in, cannot be made up for later.
        return same and kinds[0] == kinds[1] and {*other.memory.fields} <= {*self.memory.fields}
