"""Accounts of attention mass that let go of pages by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.paged import NEGATIVE_INFINITY
from .pages import iota


def evict(
    account: Tensor,
    position: Tensor,
    lengths: Tensor,
    size: int,
    sink_pages: int,
    window_pages: int,
    budget_pages: int,
) -> Tensor:
    """The account once the page with the lowest has made room for one that the tokens begin.

    Args:
        account: float32 [B, Hkv, columns], -1 where a page is gone.
        lengths: new tokens; they begin one page at most (`within_page`).
    """
    held, end = position.long(), position.long() + lengths
    before, after = (
        torch.div(x + size - 1, size, rounding_mode="trunc")[:, None, None] for x in (held, end)
    )
    column = iota(account.shape[2], account)
    resident = (account >= 0) & (column < before)
    excess = resident.long().sum(-1, keepdim=True) + (after - before) - budget_pages
    free = resident & (column >= sink_pages) & (column < after - 1 - window_pages)
    ranked = torch.where(free, -account, NEGATIVE_INFINITY)
    _, victim = torch.ops.memcompile_portable.largest(ranked, 1)
    gone = free & (column == victim) & (excess > 0) & (end > held)[:, None, None]
    return torch.where(gone, -1.0, account)


def within_page(position: Tensor, lengths: Tensor, size: int) -> Tensor:
    """The position, beyond any capacity where the tokens enter two pages: writing them raises."""
    last = position.long() + (lengths - 1).clamp_min(0)
    first, second = (torch.div(x, size, rounding_mode="trunc") for x in (position.long(), last))
    return torch.where(first == second, position, 1 << 30).to(torch.int32)


def account(
    account: Tensor, page_lse: Tensor, lse: Tensor, lengths: Tensor, decay: float
) -> Tensor:
    """`lists.account` of an account that is -1 where a page is gone, and stays it."""
    heads, rows = account.shape[1], lse.shape[2]
    mass = torch.where(page_lse > NEGATIVE_INFINITY, (page_lse - lse[..., None]).exp(), 0)
    mass = mass.unflatten(1, (heads, -1)).sum(2)  # [B, Hkv, n, columns]
    left = lengths[:, None] - 1 - iota(rows, lse)
    kept = torch.where(left >= 0, torch.pow(decay, left.clamp_min(0).to(mass.dtype)), 0)
    before = torch.pow(decay, lengths.to(mass.dtype))
    total = account * before[:, None, None] + (mass * kept[:, None, :, None]).sum(2)
    return torch.where(account < 0, -1.0, total)


def table_of_resident(account: Tensor, position: Tensor, lengths: Tensor, size: int) -> Tensor:
    """int32 page table [B, Hkv, columns] of the pages that an account has not let go."""
    batch, heads, columns = account.shape
    base = iota(batch * heads, account).view(batch, heads, 1) * columns
    inside = (within_page(position, lengths, size) == position)[:, None, None]
    table = base + iota(columns, account)
    return torch.where((account >= 0) & inside, table, -1).to(torch.int32)
