"""What an engine has read: tokens, pages and bytes, of what dense reads would have read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..models.memory.traffic import bytes_read, pages_read
from .site_layout import SiteLayout


class Call(NamedTuple):
    """A call of a step graph, not yet counted.

    Attributes:
        read: "dense" or "policy".
        start, lengths: position and new tokens of each row.
        counts: pages that each selecting site read, by row; None where nothing was selected.
            Stays a tensor until it is counted, so that a step never waits for it.
    """

    read: str
    start: list[int]
    lengths: list[int]
    counts: Tensor | None


@dataclass
class Stats:
    """What an engine has read since it was made or reset.

    Attributes:
        tokens: query tokens run, by read mode.
        pages_read: pages read exactly, per KV head, summed over sites, KV heads, rows and tokens.
        pages_dense: what dense reads of the same tokens would have read.
        bytes_read, bytes_dense: the same in bytes of keys, values, index and state.
        pages_evicted: pages of keys and values that were freed before the context ended, summed
            over sites, KV heads and rows.
        resident_bytes: what the memory takes now: pools, tables, accounts and states.
        state_bytes: the recurrent states among them, which no context makes larger.
    """

    tokens: dict[str, int] = field(default_factory=lambda: {"dense": 0, "policy": 0})
    pages_read: int = 0
    pages_dense: int = 0
    bytes_read: int = 0
    bytes_dense: int = 0
    pages_evicted: int = 0
    resident_bytes: int = 0
    state_bytes: int = 0

    @property
    def bytes_a_step(self) -> float:
        """Bytes that a query token read, on average."""
        return self.bytes_read / max(1, sum(self.tokens.values()))

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens": dict(self.tokens),
            "pages_read": self.pages_read,
            "pages_dense": self.pages_dense,
            "bytes_read": self.bytes_read,
            "bytes_dense": self.bytes_dense,
            "bytes_a_step": self.bytes_a_step,
            "pages_evicted": self.pages_evicted,
            "resident_bytes": self.resident_bytes,
            "state_bytes": self.state_bytes,
        }

    def count(self, layouts: Sequence[SiteLayout], call: Call) -> None:
        """Add a call on a model with these sites."""
        chosen = 0
        self.tokens[call.read] += sum(call.lengths)
        for layout in layouts:
            memory, window = layout.memory, layout.window
            selects = call.counts is not None and memory.selects
            for row, (first, length) in enumerate(zip(call.start, call.lengths, strict=True)):
                positions = range(first, first + length)
                dense_pages, dense_bytes = _dense_totals(layout, positions)
                self.pages_dense += dense_pages
                self.bytes_dense += dense_bytes
                if selects:
                    assert call.counts is not None
                    self.pages_read += int(call.counts[chosen, row])
                    self.bytes_read += sum(
                        bytes_read(memory, layout, p, window=window) for p in positions
                    )
                elif memory.state is not None:
                    self.pages_read += layout.kv_heads * sum(
                        pages_read(memory, p, window=window) for p in positions
                    )
                    self.bytes_read += sum(bytes_read(memory, layout, p) for p in positions)
                else:
                    self.pages_read += dense_pages
                    self.bytes_read += dense_bytes
            chosen += selects


def _dense_totals(layout: SiteLayout, positions: range) -> tuple[int, int]:
    """Pages and bytes that dense reads at `positions` move, over all KV heads."""
    size, window = layout.memory.page_size, layout.window
    pages = tokens = 0
    for p in positions:
        first = max(0, p - window + 1) if window else 0
        pages += p // size - first // size + 1
        tokens += p + 1 - first
    width = (layout.key_dim + layout.value_dim) * layout.dtype.itemsize
    return pages * layout.kv_heads, tokens * layout.kv_heads * width
