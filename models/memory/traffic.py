"""How many pages and bytes a read moves: the figures behind every claim of sparsity."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from .parts import SCORE_FIELDS, SUMMARY_FIELDS, field_width
from .spec import Memory
from .state import state_features


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
    """Pages one KV head reads exactly for a query at token `position`, at most."""
    window = window or memory.own_window
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
    """Bytes of keys, values, index and state that one query token reads at one site of a sequence.

    Counted: the score's records of the full pages that compete (neither sinks nor window), where
    the budget leaves a choice; keys and values of the visible tokens in the pages read; with
    compensation, the summaries of the full pages that were skipped; the account; and a state, with
    the token that enters it. A summary's mean counts again although the score may just have read
    it. Page tables and page lists are not counted: they are at most 8 bytes a page, a thousandth.

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
    within = window or memory.own_window
    if within and (memory.select is None or read == "dense"):
        tokens = min(position + 1, within)
        if memory.state is None:
            return tokens * heads * token_bytes
        entering = int(position >= within)
        return (tokens + entering) * heads * token_bytes + state_bytes(memory, site)
    total = ((pages - heads) * size + visible * heads) * token_bytes
    full = position // size
    if memory.account is not None:
        total += pages * 4
    if read == "dense" or memory.select is None or full < each:
        return total
    if memory.levels:
        levels = level_reads(memory, position)
        return total + heads * sum(level_bytes(memory, site, level) for level in levels)
    if memory.score is not None:
        competing = max(0, full - memory.sink_pages - memory.window_pages)
        total += competing * heads * record_bytes(memory, site, SCORE_FIELDS[memory.score.kind])
    if memory.compensate:
        skipped = (full + 1) * heads - pages
        total += skipped * record_bytes(memory, site, SUMMARY_FIELDS)
    return total


class LevelRead(NamedTuple):
    """What one KV head reads at one level of records.

    Attributes:
        size: tokens that a record stands for.
        scored: records whose score is taken; the best of them are opened.
        read: records that enter the softmax for the tokens they stand for.
    """

    size: int
    scored: int
    read: int


def level_reads(memory: Memory, position: int) -> list[LevelRead]:
    """What a query at token `position` reads on its way down the levels, the coarsest first."""
    reads = []
    opened = above = 0
    for number in reversed(range(len(memory.levels))):
        level = memory.level(number)
        standing = position // level.size
        if number + 1 == len(memory.levels):
            candidates = standing + 1
        else:
            ratio = memory.levels[number + 1] // level.size
            # All children of full records that were opened, and those there are of the open one.
            candidates = (opened - 1) * ratio + standing - above * ratio + 1
        opened, above = min(candidates, level.budget), standing
        always = min(standing, level.sinks) + min(level.window, max(0, standing - level.sinks)) + 1
        choice = memory.score is not None and candidates > level.budget
        reads.append(
            LevelRead(level.size, candidates - always if choice else 0, candidates - opened)
        )
    return reads


def level_bytes(memory: Memory, site: SiteShape, level: LevelRead) -> int:
    """Bytes of the records that one KV head reads at a level."""
    fields = SCORE_FIELDS[memory.score.kind] if memory.score is not None else ()
    scored = level.scored * record_bytes(memory, site, fields)
    return scored + level.read * record_bytes(memory, site, SUMMARY_FIELDS)


def state_bytes(memory: Memory, site: SiteShape) -> int:
    """Bytes of one sequence's state at a site."""
    if memory.state is None:
        return 0
    features = state_features(memory, site.key_dim)
    width = site.value_dim + int(memory.state.normalised)
    return site.kv_heads * features * width * max(4, site.dtype.itemsize)


def record_bytes(memory: Memory, site: SiteShape, fields: tuple[str, ...]) -> int:
    """Bytes of `fields` in one page's record."""
    return sum(
        field_width(field, site.key_dim, site.value_dim)
        * (4 if field == "log_count" else site.dtype.itemsize)
        for field in fields
    )
