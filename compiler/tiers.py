"""A memory taken apart: what each tier holds, and what a decoded token reads of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..models.memory.parts import SCORE_FIELDS, SUMMARY_FIELDS
from ..models.memory.spec import Memory
from ..models.memory.traffic import level_bytes, level_reads, pages_read, record_bytes, state_bytes
from ..passes.result import Site
from ..runtime.site_layout import SiteLayout

# In the order in which they are drawn: what stands for old tokens first, the window last.
KINDS: dict[str, str] = {
    "sinks": "sinks",
    "pages": "pages read exactly",
    "summaries": "read as a summary",
    "levels": "read as a group's summary",
    "index": "ranked by its record, not read",
    "state": "in the state",
    "account": "account of attention",
    "freed": "freed, or out of the layer's reach",
    "window": "window",
}


@dataclass(frozen=True)
class Tier:
    """One tier of a site at one context.

    Attributes:
        kind: a key of `KINDS`.
        tokens: tokens of the context that a query reads through it; each token counts in one tier.
        bytes: what a query reads of it, all KV heads together.
        level: tokens that a record of a level stands for, or 0.
    """

    kind: str
    tokens: int
    bytes: int
    level: int = 0

    @property
    def label(self) -> str:
        return f"read in groups of {self.level}" if self.level else KINDS[self.kind]


def tiers(memory: Memory, site: Site | SiteLayout, context: int, window: int = 0) -> list[Tier]:
    """What the last of `context` tokens reads through its policy, tier by tier.

    The tokens add up to `context`, the bytes to `traffic.bytes_read` at that token.

    Args:
        window: the site's own sliding window, 0 = none.
    """
    position, size, heads = context - 1, memory.page_size, site.kv_heads
    width = (site.key_dim + site.value_dim) * site.dtype.itemsize * heads
    within = window or memory.own_window
    if within and memory.select is None:
        seen = min(context, within)
        found = [Tier("window", seen, seen * width)]
        if memory.state is None:
            return _some([Tier("freed", context - seen, 0), *found])
        # The token that leaves the window is read once more, into the state.
        entering = int(position >= within) * width
        held = Tier("state", context - seen, entering + state_bytes(memory, site))
        return _some([held, *found])
    full, each = position // size, pages_read(memory, position, window=window)
    sinks = min(memory.sink_pages, full)
    recent = min(memory.window_pages, full - sinks)
    chosen = each - 1 - sinks - recent
    near = recent * size + position % size + 1 if memory.selects else 0
    if not memory.selects:
        chosen, near = 0, context
        found = [Tier("pages", context, context * width)]
    else:
        found = [
            Tier("sinks", sinks * size, sinks * size * width),
            Tier("pages", chosen * size, chosen * size * width),
        ]
    skipped = full + 1 - each
    if memory.account is not None:
        found.append(Tier("account", 0, each * heads * 4))
    if skipped and memory.select is not None and memory.levels:
        found += [
            Tier(
                "levels", part.read * part.size, heads * level_bytes(memory, site, part), part.size
            )
            for part in level_reads(memory, position)
        ]
    elif skipped and memory.select is not None:
        ranked = 0
        if memory.score is not None:
            competing = full - memory.sink_pages - memory.window_pages
            ranked = competing * heads * record_bytes(memory, site, SCORE_FIELDS[memory.score.kind])
        summed = skipped * heads * record_bytes(memory, site, SUMMARY_FIELDS)
        if memory.compensate:
            found += [Tier("index", 0, ranked), Tier("summaries", skipped * size, summed)]
        else:
            found.append(Tier("index" if ranked else "freed", skipped * size, ranked))
    elif skipped:
        found.append(Tier("freed", skipped * size, 0))
    if memory.selects:
        found.append(Tier("window", near, near * width))
    return _some(found)


def _some(found: Sequence[Tier]) -> list[Tier]:
    """What is there, in the order of `KINDS`."""
    order = [*KINDS]
    there = [tier for tier in found if tier.tokens or tier.bytes]
    return sorted(there, key=lambda tier: order.index(tier.kind))


def held(layout: SiteLayout, context: int) -> dict[str, int]:
    """Bytes that a sequence of `context` tokens takes, by what they are; see
    `SiteLayout.held_bytes`, to which they add up."""
    memory = layout.memory
    parts = {"keys and values": 0, "records": 0, "account": 0, "state": 0}
    parts["state"] = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.rows())
    if memory.account is not None:
        parts["account"] = layout.kv_heads * -(-context // memory.page_size) * 4
    exact = layout.kv_heads * memory.page_size * (layout.key_dim + layout.value_dim)
    parts["keys and values"] = (
        layout.pages_held(layout.table_key, context) * exact * layout.dtype.itemsize
    )
    rest = sum(parts.values())
    parts["records"] = layout.held_bytes(context) - rest
    return {name: count for name, count in parts.items() if count}
