"""Plain PyTorch references of levels: records of records, and a choice among candidates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .names import known
from .paged import NEGATIVE_INFINITY, row_blocks, rows_by_kv_head, token_of_row, wide
from .parts import SCORE_FIELDS
from .records import check_rows, page_scores, rows_at


def fold(
    children: list[Tensor],
    child_table: Tensor,
    page_table: Tensor,
    position: Tensor,
    lengths: Tensor,
    index: list[Tensor],
    fields: list[str],
    child_size: int,
    ratio: int,
) -> None:
    if {"std", "radius"} & {*fields} and "mean" not in fields:
        raise ValueError(f"std and radius are folded around the mean; add it to {fields}")
    if child_size < 1 or ratio < 1:
        raise ValueError(
            f"groups of {ratio} children of {child_size} tokens; both must be at least 1"
        )
    size = child_size * ratio
    first, stop = position.long() // size, (position.long() + lengths) // size
    completed = int((stop - first).max()) if len(stop) else 0
    if completed <= 0 or not fields:
        return
    check_rows(page_table, first, stop, f"the record of a group of {size} tokens")
    check_rows(child_table, first * ratio, stop * ratio, f"a record of {child_size} of them")
    group = first[:, None] + torch.arange(completed, device=position.device)  # [B, g]
    live = (group < stop[:, None])[:, None].expand(-1, page_table.shape[1], -1)  # [B, Hkv, g]
    child = group[..., None] * ratio + torch.arange(ratio, device=group.device)
    to = rows_at(page_table, group)[live]  # [t]
    of = rows_at(child_table, child.flatten(1)).unflatten(2, (completed, ratio))[live]  # [t, ratio]
    width = sum(pool.shape[1] for pool in children)
    for block in row_blocks(len(to), ratio * width * 8):
        records = {
            field: pool[of[block]].to(wide(pool.dtype))
            for field, pool in zip(fields, children, strict=True)
        }
        for field, pool in zip(fields, index, strict=True):
            pool[to[block]] = folded(field, records, size).to(pool.dtype)


def folded(field: str, records: dict[str, Tensor], size: int) -> Tensor:
    """One field of groups' records, [..., width], of their children's, [..., ratio, width] a field.

    Of equal shares of a group: means average; the variance of the whole is the mean variance of the
    shares and the variance of their means; a ball around the group's mean that holds every share's
    ball holds every key.
    """
    of = records[field]
    if field == "log_count":
        return torch.full_like(of[..., 0, :], math.log(size))
    if field == "min":
        return of.amin(-2)
    if field == "max":
        return of.amax(-2)
    if field in ("mean", "value_mean"):
        return of.mean(-2)
    apart = records["mean"] - records["mean"].mean(-2, keepdim=True)
    if field == "std":
        return (of.square() + apart.square()).mean(-2).sqrt()
    reach: Tensor = apart.norm(dim=-1, keepdim=True) + of
    return reach.amax(-2)


def score_select_among(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    page_table: Tensor,
    candidates: Tensor,
    position: Tensor,
    lengths: Tensor,
    score: str,
    page_size: int,
    sink_pages: int,
    window_pages: int,
    budget_pages: int,
) -> Tensor:
    known("score", score, SCORE_FIELDS)
    batch, kv_heads, columns = page_table.shape
    n, width = candidates.shape[2:]
    rows = rows_by_kv_head(query, kv_heads)
    selected = candidates.new_full((batch, kv_heads, n, budget_pages), -1)
    if not columns or not width:
        return selected
    token = token_of_row(position, lengths, n)[:, None, :, None]  # [B, 1, n, 1]
    open_page = torch.div(token, page_size, rounding_mode="floor")
    page = candidates.long()
    held = page_table.long().gather(2, page.clamp(0, columns - 1).flatten(2)).view_as(page)
    usable = (page >= 0) & (page < columns) & (page <= open_page) & (held >= 0)
    always = (page < sink_pages) | (page >= open_page - window_pages)
    choosing = usable.sum(-1, keepdim=True) > budget_pages
    pools = dict(zip(fields, index, strict=True))
    row_bytes = batch * kv_heads * width * query.shape[3] * rows.element_size()
    for block in row_blocks(n, row_bytes):
        ranked = rows.new_zeros((batch, kv_heads, page[:, :, block].shape[2], width))
        if bool(choosing[:, :, block].any()):
            at = held[:, :, block].clamp_min(0).flatten(1, 2)  # [B, Hkv*r, S]
            records = {f: pools[f][at].to(rows.dtype) for f in SCORE_FIELDS[score]}
            limit = torch.finfo(rows.dtype).max
            scores = page_scores(rows[:, :, block].flatten(1, 2)[:, :, None], records, score)
            ranked = scores.nan_to_num(nan=-limit, posinf=limit, neginf=-limit).view_as(ranked)
        ranked.masked_fill_((always | ~choosing)[:, :, block], float("inf"))
        ranked.masked_fill_(~usable[:, :, block], NEGATIVE_INFINITY)
        # A stable sort breaks ties in favour of the lower page: candidates ascend.
        best, order = torch.sort(ranked, dim=-1, descending=True, stable=True)
        best, order = best[..., :budget_pages], order[..., :budget_pages]
        kept = best > NEGATIVE_INFINITY
        chosen = torch.where(kept, page[:, :, block].gather(3, order), columns).sort(-1).values
        selected[:, :, block, : chosen.shape[3]] = torch.where(chosen < columns, chosen, -1).int()
    return selected
