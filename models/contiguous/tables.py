"""Pages of contiguous state, for operations that take page tables."""

from __future__ import annotations

import torch
from torch import Tensor

from .pages import columns_of, iota


def as_pages(tensor: Tensor, size: int) -> Tensor:
    """[B, Hkv, columns * size, D] as [B*Hkv*columns, size, D]; size 0: rows alone."""
    if size:
        return tensor.view(-1, size, tensor.shape[3])
    return tensor.view(-1, tensor.shape[3])


def page_table(
    held: Tensor, position: Tensor, lengths: Tensor, size: int, slots: int, pinned: int, reach: int
) -> tuple[Tensor, Tensor]:
    """Where the pages of `held` [B, Hkv, columns * slots, D] lie among `as_pages` of it.

    Where pages take turns, they are numbered from the oldest that is left, pinned ones apart.

    Returns:
        int32 table [B, Hkv, columns]; int32 position [B], by that numbering.
    """
    batch, heads, columns = held.shape[0], held.shape[1], held.shape[2] // slots
    page = iota(columns, held)
    if pinned < 0:
        return _table(page.expand(batch, -1), batch, heads, columns), position
    end = position.long() + lengths
    newest = torch.div(end + size - 1, size, rounding_mode="trunc") - 1
    gone = (newest - (columns - 1)).clamp_min(0)
    column = columns_of(torch.where(page < pinned, page, page + gone[:, None]), columns, pinned)
    fits = lengths <= (columns - pinned - 1) * size - reach
    table = _table(torch.where(fits[:, None], column, -1), batch, heads, columns)
    return table, (position - gone * size).to(torch.int32)


def page_table_under(
    held: Tensor,
    above: Tensor,
    position: Tensor,
    lengths: Tensor,
    size: int,
    slots: int,
    pinned: int,
    reach: int,
    ratio: int,
) -> tuple[Tensor, Tensor]:
    """`page_table` of pages that take turns, numbered as those of a level that keeps them all.

    Args:
        above: records of that level [B, Hkv, columns, D], each of `ratio` of these pages.

    Returns:
        int32 table [B, Hkv, columns of `above` * ratio], -1 where a page is gone; the position.
    """
    batch, heads, columns = held.shape[0], held.shape[1], held.shape[2] // slots
    page = iota(above.shape[2] * ratio, held)
    end = position.long() + lengths
    newest = (torch.div(end + size - 1, size, rounding_mode="trunc") - 1)[:, None]
    fits = (lengths <= (columns - pinned - 1) * size - reach)[:, None]
    left = (page < pinned) | (page > newest - (columns - pinned))
    column = torch.where(left & fits, columns_of(page, columns, pinned), -1)
    return _table(column, batch, heads, columns), position


def _table(column: Tensor, batch: int, heads: int, columns: int) -> Tensor:
    """int32 [B, Hkv, pages] of the columns [B, pages] that pages lie in."""
    base = iota(batch * heads, column).view(batch, heads, 1) * columns
    there = column[:, None].expand(-1, heads, -1)
    return torch.where(there >= 0, there + base, -1).to(torch.int32)
