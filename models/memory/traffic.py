"""How many pages and bytes a read moves: the figures behind every claim of sparsity."""

from __future__ import annotations

from typing import Protocol

import torch

from .parts import SCORE_FIELDS, SUMMARY_FIELDS, field_width
from .spec import Memory


class SiteShape(Protocol):
    """What must be known of a site to count its bytes."""

    @property
    def kv_heads(self) -> int: ...
    @property
    def key_dim(self) -> int: ...
    @property
    def value_dim(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...


def pages_read(memory: Memory, position: int, *, window: int = 0, read: str = "policy") -> int:
    """Pages one KV head reads exactly for a query at token `position`."""
    open_page = position // memory.page_size
    first = max(0, position - window + 1) // memory.page_size if window else 0
    if read == "dense" or not memory.selects or position < memory.dense_below:
        return open_page + 1 - first
    return min(open_page + 1, memory.budget_pages)


def bytes_read(
    memory: Memory,
    site: SiteShape,
    position: int,
    *,
    window: int = 0,
    selected: int | None = None,
    read: str = "policy",
) -> int:
    """Bytes of keys, values and index that one query token reads at one site of one sequence.

    Counted: the score's records of the full pages that compete (neither sinks nor window), where
    the budget leaves a choice; keys and values of the visible tokens in the pages read; and, with
    compensation, the summaries of the full pages that were skipped. A summary's mean counts again
    although the score may just have read it. Page table and page list are not counted: they are at
    most 8 bytes a page, a thousandth of it.

    Args:
        position: the token the query stands at.
        window: the site's own sliding window, 0 = none.
        selected: pages read in all, summed over KV heads; None: as many as the policy selects.
        read: "policy" or "dense".
    """
    heads, size = site.kv_heads, memory.page_size
    token_bytes = (site.key_dim + site.value_dim) * site.dtype.itemsize
    each = pages_read(memory, position, window=window, read=read)
    pages = each * heads if selected is None else selected
    visible = position % size + 1  # tokens of the open page, which every head reads
    if window and (memory.select is None or read == "dense"):
        return min(position + 1, window) * heads * token_bytes
    total = ((pages - heads) * size + visible * heads) * token_bytes
    full = position // size
    if read == "dense" or memory.score is None or full < each:
        return total
    competing = max(0, full - memory.sink_pages - memory.window_pages)
    total += competing * heads * record_bytes(memory, site, SCORE_FIELDS[memory.score.kind])
    if memory.compensate:
        skipped = (full + 1) * heads - pages
        total += skipped * record_bytes(memory, site, SUMMARY_FIELDS)
    return total


def record_bytes(memory: Memory, site: SiteShape, fields: tuple[str, ...]) -> int:
    """Bytes of `fields` in one page's record."""
    return sum(
        field_width(field, site.key_dim, site.value_dim)
        * (4 if field == "log_count" else site.dtype.itemsize)
        for field in fields
    )
