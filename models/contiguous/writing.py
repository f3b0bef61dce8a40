"""Tokens and their records, written into contiguous state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..memory.levels import folded
from ..memory.paged import wide
from ..memory.records import page_records
from .pages import columns_of, iota, put_if_any, rows_of, tokens_of


def append(
    cache: Tensor,
    new: Tensor,
    position: Tensor,
    lengths: Tensor,
    size: int,
    pinned: int,
    reach: int,
) -> Tensor:
    """The cache [B, Hkv, capacity, D] with new [B, Hkv, n, D] at tokens position ...

    Where every page has a column of its own, rows of padding are written, too, behind the tokens:
    nothing reads what lies there before a token of a later call replaces it.

    Args:
        reach: tokens behind a query that it still reads, where pages take turns: a call whose
            tokens would push them out writes beyond the end, which raises.
    """
    n = new.shape[2]
    if pinned < 0:
        slot = tokens_of(position, n)
        put: Tensor = torch.ops.memcompile_portable.put_rows(cache, slot, new.to(cache.dtype))
        return put
    capacity = cache.shape[2]
    count = lengths.long()[:, None]
    # Rows of padding write the last token once more, and a sequence of none its last one.
    row = torch.minimum(iota(n, new), (count - 1).clamp_min(0))  # [B, n]
    token = position.long()[:, None] + row
    token = torch.where(count > 0, token, (token - 1).clamp_min(0))
    page = torch.div(token, size, rounding_mode="trunc")
    slot = columns_of(page, capacity // size, pinned) * size + torch.remainder(token, size)
    room = capacity - pinned * size - reach - size
    slot = torch.where(count <= room, slot, capacity)
    heads = new.shape[1]
    old = rows_of(cache, slot.clamp_max(capacity - 1)[:, None].expand(-1, heads, -1))
    given = rows_of(new, row[:, None].expand(-1, heads, -1)).to(cache.dtype)
    written = torch.where((count > 0)[:, None, :, None], given, old)
    made: Tensor = torch.ops.memcompile_portable.put_rows(cache, slot, written)
    return made


def records(
    new: Tensor,
    position: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    index: list[Tensor],
    fields: list[str],
    size: int,
    pinned: int,
    record_pinned: int,
) -> list[Tensor]:
    """The index with the records of pages that the new tokens filled.

    Args:
        new: the new keys [B, Hkv, n, Dk]; only their shape counts.
        keys, values: with the new tokens in them.
        index: one [B, Hkv, columns, width] a field.
        pinned, record_pinned: of the pages, and of their records.
    """
    pages = [x.unflatten(2, (-1, size)) for x in (keys, values)]
    heads = new.shape[1]

    def compute(page: Tensor) -> list[Tensor]:
        column = columns_of(page, pages[0].shape[2], pinned)[:, None].expand(-1, heads, -1)
        read = [rows_of(x, column) for x in pages]  # [B, Hkv, t, size, D]
        return page_records(read[0], read[1], fields)

    return _written(index, compute, position, lengths, new.shape[2], size, record_pinned)


def fold(
    new: Tensor,
    children: list[Tensor],
    position: Tensor,
    lengths: Tensor,
    index: list[Tensor],
    fields: list[str],
    child_size: int,
    ratio: int,
    child_pinned: int,
    pinned: int,
) -> list[Tensor]:
    """The index with the records of groups whose last child the new tokens filled."""
    size = child_size * ratio

    def compute(group: Tensor) -> list[Tensor]:
        child = group[..., None] * ratio + iota(ratio, group)  # [B, t, ratio]
        column = columns_of(child, children[0].shape[2], child_pinned)[:, None]
        column = column.expand(-1, new.shape[1], -1, -1)
        # Of one axis of groups: Inductor would take several for some sizes alone.
        read = {
            field: rows_of(pool, column).to(wide(pool.dtype)).flatten(0, 2)
            for field, pool in zip(fields, children, strict=True)
        }
        made = [folded(field, read, size) for field in fields]
        return [record.view(*column.shape[:3], -1) for record in made]

    return _written(index, compute, position, lengths, new.shape[2], size, pinned)


def _written(
    index: list[Tensor],
    compute: Callable[[Tensor], list[Tensor]],
    position: Tensor,
    lengths: Tensor,
    n: int,
    size: int,
    pinned: int,
) -> list[Tensor]:
    """The index with the records of pages that n new tokens filled.

    Where records take turns, pages that were not filled stand for the last one that is full. Where
    each has a column of its own they are themselves: nothing reads a record before its page is
    full, when it is written again.

    Args:
        compute: records [B, Hkv, t, width], one a field, of pages [B, t].
    """
    first = torch.div(position.long(), size, rounding_mode="trunc")
    stop = torch.div(position.long() + lengths, size, rounding_mode="trunc")

    def made() -> tuple[Tensor, list[Tensor]]:
        count = iota(n // size + 1, position)
        if pinned < 0:
            # Of every size-th new token and the last: none beyond the tokens there is room for.
            token = position.long()[:, None] + (count * size).clamp_max(n - 1)
            page = torch.div(token, size, rounding_mode="trunc")
        else:
            page = torch.minimum(first[:, None] + count, stop[:, None] - 1).clamp_min(0)
        column = columns_of(page, index[0].shape[2], pinned)
        records = [r.to(pool.dtype) for r, pool in zip(compute(page), index, strict=True)]
        if pinned >= 0:
            # Nothing filled: what is there is written again.
            whole = column[:, None].expand(-1, index[0].shape[1], -1)
            filled = (stop > first)[:, None, None, None]
            records = [
                torch.where(filled, record, rows_of(pool, whole))
                for record, pool in zip(records, index, strict=True)
            ]
        return column, records

    return put_if_any(stop - first, index, made)
