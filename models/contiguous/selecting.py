"""Pages chosen by their records, in contiguous state."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.paged import NEGATIVE_INFINITY
from ..memory.parts import SCORE_FIELDS
from .pages import FAR, LOWEST, columns_of, iota, query_rows, rows_of, standing


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
    """`score_select` of `ops.py`: int64 [B, Hkv, n, capacity]; every page has its own column."""
    record = dict(zip(fields, index, strict=True))
    heads, columns = index[0].shape[1:3]
    rows = query_rows(query, heads)
    best = _scores(rows, {f: record[f].to(rows.dtype) for f in SCORE_FIELDS[score]}, score)
    token, live = standing(position, lengths, query.shape[2])
    at = torch.div(token, size, rounding_mode="trunc")[:, None, :, None]  # [B, 1, n, 1]
    page = iota(columns, query)
    always = (page < sink_pages) | (page >= at - window_pages)
    everything = (at < budget_pages) | (token < dense_below)[:, None, :, None]
    ranked = torch.where(always | everything, -LOWEST, best.clamp(LOWEST / 2, -LOWEST / 2))
    ranked = torch.where((page <= at) & live[:, None, :, None], ranked, NEGATIVE_INFINITY)
    # A context may have fewer columns than a list has places.
    ranked = torch.nn.functional.pad(ranked, (0, capacity), value=NEGATIVE_INFINITY)
    value, order = torch.ops.memcompile_portable.largest(ranked, capacity)
    wanted = torch.where(everything, at + 1, budget_pages)
    place = iota(capacity, query)
    return _ascending(torch.where((place < wanted) & (value > NEGATIVE_INFINITY), order, -1))


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
    token, live = standing(position, lengths, query.shape[2])
    at = torch.div(token, size, rounding_mode="trunc")[:, None, None, :, None]
    page = iota(mean.shape[2], query)
    chosen = (page >= sink_pages) & (page < at - window_pages) & (at >= budget_pages)
    chosen = chosen & (live & (token >= dense_below))[:, None, None, :, None]
    product = (rows.flatten(2, 3) @ mean.to(rows.dtype).transpose(-1, -2)).unflatten(
        2, (rows.shape[2], rows.shape[3])
    )
    return torch.where(chosen, product, NEGATIVE_INFINITY).flatten(1, 2)


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
    return _ascending(torch.where(value > NEGATIVE_INFINITY, listed, -1))


def _scores(rows: Tensor, records: dict[str, Tensor], score: str, own: bool = False) -> Tensor:
    """The largest score of the group that shares a KV head: [B, Hkv, n, columns].

    Args:
        rows: [B, Hkv, G, n, D]; own: [B, Hkv, G, n, 1, D].
        records: [B, Hkv, columns, width]; own: [B, Hkv, n, S, width], each row its own.
    """

    def product(of: Tensor, record: Tensor) -> Tensor:  # [B, Hkv, G, n, columns]
        if own:
            return (of @ record[:, :, None].transpose(-1, -2)).squeeze(-2)
        flat: Tensor = of.flatten(2, 3) @ record.transpose(-1, -2)
        by_row: Tensor = flat.unflatten(2, (of.shape[2], of.shape[3]))
        return by_row

    if score == "box":
        total = product(rows.clamp_min(0), records["max"])
        total = total + product(rows.clamp_max(0), records["min"])
    else:
        total = product(rows, records["mean"])
        if score == "mean-std":
            total = total + product(rows.abs(), records["std"])
        elif score == "ball":
            norm = rows.square().sum(-1, keepdim=True).sqrt()
            total = total + product(norm, records["radius"])
    return total.amax(2)


def _ascending(pages: Tensor) -> Tensor:
    """The pages of each row in order, -1 behind them."""
    beyond = torch.where(pages >= 0, -pages, -FAR)
    ordered, _ = torch.ops.memcompile_portable.largest(beyond, pages.shape[-1])
    return torch.where(ordered > -FAR, -ordered, -1)
