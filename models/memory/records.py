"""Plain PyTorch references of the page index: writing records, scoring them, selecting pages."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .names import known
from .paged import NEGATIVE_INFINITY, row_blocks, rows_by_kv_head, token_of_row, wide
from .parts import SCORE_FIELDS


def append_index(key: Tensor, value: Tensor, page_table: Tensor, *rest: Any) -> None:
    """`append_index_record_table`, whose records go where their pages are."""
    append_index_record_table(key, value, page_table, page_table, *rest)


def append_index_record_table(
    key: Tensor,
    value: Tensor,
    page_table: Tensor,
    record_table: Tensor,
    position: Tensor,
    lengths: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    index: list[Tensor],
    fields: list[str],
) -> None:
    # State carries no gradient: it would chain every step of an engine to the first.
    key, value = key.detach(), value.detach()
    n, size = key.shape[2], key_pages.shape[1]
    token = token_of_row(position, lengths, n)[:, None].expand(-1, key.shape[1], -1)
    written = token >= 0
    if not bool(written.any()):
        return
    logical = (token // size).clamp_min(0)
    if int(logical.max()) >= page_table.shape[2]:
        raise IndexError(
            f"token {int(token.max())} lies beyond the page table of {page_table.shape[2]} pages "
            f"of {size}; reserve the tokens first"
        )
    page = page_table.long().gather(2, logical)
    if bool((page[written] < 0).any()):
        raise IndexError("a token to write has no page; reserve the tokens first")
    slot = (page * size + token % size)[written]
    for pool, new in ((key_pages, key), (value_pages, value)):
        pool.view(-1, pool.shape[2])[slot] = new[written].to(pool.dtype)
    if not fields:
        return
    # Pages that are full now and were not before; a row without new tokens has none.
    first, stop = position.long() // size, (position.long() + lengths) // size
    check_rows(record_table, first, stop, f"the record of a page of {size}")
    filled = int((stop - first).max())
    width = page_table.shape[:2].numel() * size * key.shape[3] * 8
    for block in row_blocks(filled, width):
        logical = first[:, None] + torch.arange(block.start, block.stop, device=key.device)
        live = (logical < stop[:, None])[:, None].expand(-1, key.shape[1], -1)  # [B, Hkv, t]
        page, row = (rows_at(table, logical)[live] for table in (page_table, record_table))
        records = page_records(key_pages[page], value_pages[page], fields)
        for pool, record in zip(index, records, strict=True):
            pool[row] = record.to(pool.dtype)


def rows_at(table: Tensor, column: Tensor) -> Tensor:
    """The rows [B, Hkv, c] that a table names in columns [B, c], its last past its end."""
    at = column.clamp_max(table.shape[2] - 1)[:, None].expand(-1, table.shape[1], -1)
    return table.long().gather(2, at)


def check_rows(table: Tensor, first: Tensor, stop: Tensor, what: str) -> None:
    """Refuses a table that lacks one of the columns first[b] .. stop[b] - 1 of a sequence."""
    column = torch.arange(int(stop.max()), device=table.device)
    needed = ((column >= first[:, None]) & (column < stop[:, None]))[:, None]  # [B, 1, columns]
    held = torch.nn.functional.pad(table[:, :, : len(column)] >= 0, (0, len(column)))
    if bool((needed & ~held[:, :, : len(column)]).any()):
        raise IndexError(
            f"{what} to write has no row in its table of {table.shape[2]} columns; "
            "reserve the tokens first"
        )


def page_records(keys: Tensor, values: Tensor, fields: list[str]) -> list[Tensor]:
    """The index records of full pages.

    Args:
        keys, values: [..., s, D].

    Returns:
        one [..., width] a field, in the summing type.
    """
    keys, values = (pages.to(wide(pages.dtype)) for pages in (keys, values))
    mean = keys.mean(-2)
    apart = keys - mean.unsqueeze(-2)
    records = {"mean": mean}
    if "std" in fields:
        records["std"] = apart.square().mean(-2).sqrt()
    if "radius" in fields:
        records["radius"] = apart.norm(dim=-1).amax(-1, keepdim=True)
    if "min" in fields:
        records["min"] = keys.amin(-2)
    if "max" in fields:
        records["max"] = keys.amax(-2)
    if "value_mean" in fields:
        records["value_mean"] = values.mean(-2)
    if "log_count" in fields:
        records["log_count"] = torch.full_like(mean[..., :1], math.log(keys.shape[-2]))
    return [records[field] for field in fields]


def page_scores(rows: Tensor, records: dict[str, Tensor], score: str) -> Tensor:
    """Scores [B, Hkv, r, L]: each query's, then the largest in the group that shares the KV head.

    Args:
        rows: [B, Hkv, r, G, Dk]; records: [B, Hkv, L, width] a field.
    """
    flat = rows.flatten(2, 3)  # [B, Hkv, r*G, Dk] @ [B, Hkv, Dk, L]
    column = {field: record.transpose(-1, -2) for field, record in records.items()}
    if score == "box":
        scores = flat.clamp_min(0) @ column["max"] + flat.clamp_max(0) @ column["min"]
    else:
        scores = flat @ column["mean"]
        if score == "mean-std":
            scores += flat.abs() @ column["std"]
        elif score == "ball":
            scores += flat.norm(dim=-1, keepdim=True) * column["radius"]
    best: Tensor = scores.unflatten(2, rows.shape[2:4]).amax(3)
    return best


def score_select(*arguments: Any) -> Tensor:
    """The pages alone, of the arguments of `score_select_page_logits`."""
    return score_select_page_logits(*arguments, logits=False)[0]


def score_select_page_logits(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    page_table: Tensor,
    position: Tensor,
    lengths: Tensor,
    score: str,
    page_size: int,
    sink_pages: int,
    window_pages: int,
    capacity: int,
    budget_pages: int,
    dense_below: int,
    *,
    logits: bool = True,
) -> tuple[Tensor, Tensor]:
    known("score", score, SCORE_FIELDS)
    batch, kv_heads, table_pages = page_table.shape
    n = query.shape[2]
    rows = rows_by_kv_head(query, kv_heads)
    token = token_of_row(position, lengths, n)[:, None, :, None]  # [B, 1, n, 1]
    open_page = torch.div(token, page_size, rounding_mode="floor")
    selected = torch.full(
        (batch, kv_heads, n, capacity), -1, dtype=torch.int32, device=query.device
    )
    products = rows.new_full((*query.shape[:3], table_pages if logits else 0), NEGATIVE_INFINITY)
    count = min(int(open_page.max()) + 1, table_pages) if n else 0
    if count <= 0:
        return selected, products
    everything = (open_page < budget_pages) | (token < dense_below)
    wanted = torch.where(everything, open_page + 1, budget_pages)
    if int(wanted.max()) > capacity:
        raise ValueError(
            f"{int(wanted.max())} pages are to be selected into a list of {capacity}; "
            "capacity must hold budget_pages and the pages of dense_below tokens"
        )
    choosing = bool((~everything).any())
    table = page_table[:, :, :count].long()
    records = {}
    if choosing:
        pools = dict(zip(fields, index, strict=True))
        read = {*SCORE_FIELDS[score], *(("mean",) if logits else ())}
        records = {f: pools[f][table.clamp_min(0)].to(rows.dtype) for f in read}
    page = torch.arange(count, device=query.device)
    for block in row_blocks(n, batch * query.shape[1] * count * rows.element_size()):
        at = open_page[:, :, block]
        if choosing:
            limit = torch.finfo(rows.dtype).max
            ranked = page_scores(rows[:, :, block], records, score)
            ranked = ranked.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
            if logits:
                chosen_from = (page >= sink_pages) & (page < at - window_pages)
                chosen_from = chosen_from & ~everything[:, :, block] & (table >= 0)[:, :, None]
                product = rows[:, :, block] @ records["mean"].transpose(-1, -2)[:, :, None]
                product.masked_fill_(~chosen_from[:, :, :, None], NEGATIVE_INFINITY)
                products[:, :, block, :count] = product.transpose(2, 3).flatten(1, 2)
        else:
            ranked = rows.new_zeros((batch, kv_heads, at.shape[2], count))
        ranked.masked_fill_((page < sink_pages) | (page >= at - window_pages), float("inf"))
        ranked.masked_fill_((page > at) | (table < 0)[:, :, None], NEGATIVE_INFINITY)
        # A stable sort breaks ties in favour of the lower page.
        best, order = torch.sort(ranked, dim=-1, descending=True, stable=True)
        best, order = best[..., :capacity], order[..., :capacity]
        kept = (page[:capacity] < wanted[:, :, block]) & (best > NEGATIVE_INFINITY)
        chosen = torch.where(kept, order, count).sort(-1).values
        selected[:, :, block, : chosen.shape[3]] = torch.where(chosen < count, chosen, -1).int()
    return selected, products
