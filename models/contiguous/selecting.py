"""Pages chosen by their records, in contiguous state."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.paged import NEGATIVE_INFINITY
from ..memory.parts import SCORE_FIELDS
from .pages import FAR, LOWEST, columns_of, iota, query_rows, rows_of, standing, tokens_of


def score_select(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    position: Tensor,
    lengths: Tensor,
    score: str,
    size: int,
    sink_pages: int,
    window_pages: int,
    capacity: int,
    budget_pages: int,
    dense_below: int,
) -> Tensor:
    """`score_select` of `ops.py`: int64 [B, Hkv, n, capacity]; every page has its own column.

    Rows of padding choose, too, some pages of the cache: `lengths` is not read.
    """
    record = dict(zip(fields, index, strict=True))
    heads, columns = index[0].shape[1:3]
    rows = query_rows(query, heads)
    best = _scores(rows, {f: record[f].to(rows.dtype) for f in SCORE_FIELDS[score]}, score)
    always, own, everything = _always(
        *(position, query.shape[2], columns, size, sink_pages, window_pages),
        max(budget_pages * size, dense_below),
    )
    page = iota(columns, position)
    ranked = torch.where(always, -LOWEST, best.clamp(LOWEST / 2, -LOWEST / 2))
    ranked = torch.where(page <= own, ranked, NEGATIVE_INFINITY)
    # A context may have fewer columns than a list has places.
    ranked = torch.nn.functional.pad(ranked, (0, capacity), value=NEGATIVE_INFINITY)
    value, order = torch.ops.memcompile_portable.largest(ranked, capacity)
    chosen = value > NEGATIVE_INFINITY
    if capacity > budget_pages:
        wanted = torch.where(everything, capacity, budget_pages)
        chosen = chosen & (iota(capacity, position) < wanted)
    return _ascending(order, chosen)


def page_logits(
    query: Tensor,
    mean: Tensor,
    position: Tensor,
    lengths: Tensor,
    size: int,
    sink_pages: int,
    window_pages: int,
    budget_pages: int,
    dense_below: int,
) -> Tensor:
    """The product [B, H, n, columns] of each query with each page's mean key, float32; -inf where
    the row does not choose by score."""
    rows = query_rows(query, mean.shape[1])
    always, _, _ = _always(
        *(position, query.shape[2], mean.shape[2], size, sink_pages, window_pages),
        max(budget_pages * size, dense_below),
    )
    product = (rows.flatten(2, 3) @ mean.to(rows.dtype).transpose(-1, -2)).unflatten(
        2, (rows.shape[2], rows.shape[3])
    )
    return torch.where(always[:, :, None], NEGATIVE_INFINITY, product).flatten(1, 2)


def _always(
    position: Tensor,
    n: int,
    columns: int,
    size: int,
    sink_pages: int,
    window_pages: int,
    dense_below: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pages [B, 1, n, columns] that rows do not choose by score: sinks, window, what is to come,
    and everything of the rows before `dense_below`.

    Returns:
        also the page of each row, int64, and whether it reads everything, both [B, 1, n, 1].
    """
    token = tokens_of(position, n)[:, None, :, None]
    own = torch.div(token, size, rounding_mode="trunc")
    everything = token < dense_below
    page = iota(columns, position)
    always = page >= torch.where(everything, 0, own - window_pages)
    return (always | (page < sink_pages) if sink_pages else always), own, everything


def score_select_among(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    candidates: Tensor,
    position: Tensor,
    lengths: Tensor,
    score: str,
    size: int,
    sink_pages: int,
    window_pages: int,
    budget_pages: int,
    pinned: int,
) -> Tensor:
    """`score_select.among` of `ops.py`: int64 [B, Hkv, n, budget_pages].

    Args:
        candidates: int64 [B, Hkv, n, S], ascending but for -1.
        pinned: of the records.
    """
    record = dict(zip(fields, index, strict=True))
    heads, columns = index[0].shape[1:3]
    rows = query_rows(query, heads).transpose(2, 3)  # [B, Hkv, n, G, D]
    token, live = standing(position, lengths, query.shape[2])
    at = torch.div(token, size, rounding_mode="trunc")[:, None, :, None]
    usable = (candidates >= 0) & (candidates <= at) & live[:, None, :, None]
    if pinned < 0:
        usable = usable & (candidates < columns)
    column = columns_of(candidates.clamp_min(0), columns, pinned).clamp_max(columns - 1)
    read = {f: rows_of(record[f], column).to(rows.dtype) for f in SCORE_FIELDS[score]}
    best = _scores(rows.transpose(2, 3)[:, :, :, :, None], read, score, own=True)
    always = (candidates < sink_pages) | (candidates >= at - window_pages)
    few = usable.long().sum(-1, keepdim=True) <= budget_pages
    ranked = torch.where(always | few, -LOWEST, best.clamp(LOWEST / 2, -LOWEST / 2))
    ranked = torch.where(usable, ranked, NEGATIVE_INFINITY)
    ranked = torch.nn.functional.pad(ranked, (0, budget_pages), value=NEGATIVE_INFINITY)
    value, order = torch.ops.memcompile_portable.largest(ranked, budget_pages)
    listed = torch.nn.functional.pad(candidates, (0, budget_pages), value=-1).gather(3, order)
    return _ascending(listed, value > NEGATIVE_INFINITY)


def _scores(rows: Tensor, records: dict[str, Tensor], score: str, own: bool = False) -> Tensor:
    """The largest score of the group that shares a KV head: [B, Hkv, n, columns].

    Args:
        rows: [B, Hkv, G, n, D]; own: [B, Hkv, G, n, 1, D].
        records: [B, Hkv, columns, width]; own: [B, Hkv, n, S, width], each row its own.
    """

    # [B, Hkv, G*n, columns]; own: [B, Hkv, G, n, 1, S].
    flat = rows if own else rows.flatten(2, 3)

    def product(of: Tensor, record: Tensor) -> Tensor:
        made: Tensor = of @ (record[:, :, None] if own else record).transpose(-1, -2)
        return made

    if score == "box":
        total = product(flat.clamp_min(0), records["max"])
        total = total + product(flat.clamp_max(0), records["min"])
    else:
        total = product(flat, records["mean"])
        if score == "mean-std":
            total = total + product(flat.abs(), records["std"])
        elif score == "ball":
            norm = flat.square().sum(-1, keepdim=True).sqrt()
            total = total + product(norm, records["radius"])
    apart = total.squeeze(-2) if own else total.unflatten(2, (rows.shape[2], rows.shape[3]))
    return apart.amax(2)


def _ascending(pages: Tensor, chosen: Tensor) -> Tensor:
    """The chosen pages of each row in order, -1 behind them."""
    ordered, _ = torch.sort(torch.where(chosen, pages, FAR), dim=-1)
    return torch.where(ordered < FAR, ordered, -1)
