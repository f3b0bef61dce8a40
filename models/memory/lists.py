"""Plain tensor code around the operations of a memory: page lists, accounts, what a state takes in.

It is traced into the step graph, where Inductor prints it for either target.
"""

from __future__ import annotations

import torch
from torch import Tensor


def held(
    query: Tensor,
    page_table: Tensor,
    position: Tensor,
    lengths: Tensor,
    size: int,
    sinks: int,
    window: int,
) -> Tensor:
    """The pages of `size` tokens that a row always has: sinks, `window` full ones, the open one.

    Returns:
        int32 [B, Hkv, n, sinks + window + 1], ascending but for -1 where the context is short.
    """
    row = torch.arange(query.shape[2], dtype=torch.int32, device=query.device)
    standing = torch.div(position[:, None] + row, size, rounding_mode="floor")[..., None]
    slot = torch.arange(sinks + window + 1, dtype=torch.int32, device=query.device)
    first = slot < sinks
    page = torch.where(first, slot, standing - (sinks + window) + slot)
    there = torch.where(first, page <= standing, page >= sinks)
    there = there & (row < lengths[:, None])[..., None]
    shape = (*page_table.shape[:2], query.shape[2], sinks + window + 1)
    return torch.where(there, page, -1)[:, None].expand(shape).to(torch.int32).contiguous()


def children(opened: Tensor, ratio: int, position: Tensor, size: int) -> Tensor:
    """The `ratio` children of `size` tokens of each opened record, as far as there are any.

    Args:
        opened: int32 [B, Hkv, n, S], ascending but for -1.

    Returns:
        int32 [B, Hkv, n, S * ratio], ascending but for -1.
    """
    of = torch.arange(ratio, dtype=torch.int32, device=opened.device)
    row = torch.arange(opened.shape[2], dtype=torch.int32, device=opened.device)
    standing = torch.div(position[:, None] + row, size, rounding_mode="floor")[:, None, :, None]
    each = (opened[..., None] * ratio + of).flatten(3)
    there = (opened >= 0)[..., None].expand(*opened.shape, ratio).flatten(3)
    return torch.where(there & (each <= standing), each, -1)


def without(candidates: Tensor, chosen: Tensor) -> Tensor:
    """The candidates [B, Hkv, n, S] that are not among the chosen [B, Hkv, n, C]; -1 for those."""
    found = (candidates[..., :, None] == chosen[..., None, :]).any(-1)
    return torch.where(found, -1, candidates)


def account(
    account: Tensor, page_lse: Tensor, lse: Tensor, lengths: Tensor, decay: float
) -> Tensor:
    """Adds the attention mass that each page received, summed over rows and the queries that share
    a KV head, to `account` in place; every row first multiplies what was there by `decay`.

    Args:
        account: float32 [B, Hkv, pages].
        page_lse, lse: [B, H, n, pages] and [B, H, n], of `attend.page_lse`.

    Returns:
        int32 [B, Hkv, n, pages]: 1 where a row saw the page, -1 where it did not.
    """
    heads, rows = account.shape[1], lse.shape[2]
    seen = page_lse > float("-inf")
    mass = torch.where(seen, (page_lse - lse[..., None]).exp(), 0)
    mass = mass.unflatten(1, (heads, -1)).sum(2)  # [B, Hkv, n, pages]
    left = lengths[:, None] - 1 - torch.arange(rows, dtype=torch.int32, device=lse.device)
    kept = torch.where(left >= 0, torch.pow(decay, left.clamp_min(0).to(mass.dtype)), 0)
    before = torch.pow(decay, lengths.to(mass.dtype))
    total = account * before[:, None, None] + (mass * kept[:, None, :, None]).sum(2)
    account.copy_(total)
    return torch.where(seen.unflatten(1, (heads, -1))[:, :, 0], 1, -1).to(torch.int32)


def entering(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    position: Tensor,
    lengths: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Key and value that leave a window of `window` tokens with each row, from their pages.

    Returns:
        keys [B, Hkv, n, Dk], values [B, Hkv, n, Dv], zero where there is none; bool [B, n].
    """
    row = torch.arange(query.shape[2], device=query.device)
    token = position[:, None].long() + row - window
    live = (token >= 0) & (row < lengths[:, None])
    token = torch.where(live, token, 0)
    size = key_pages.shape[1]
    logical = torch.div(token, size, rounding_mode="floor")
    heads = page_table.shape[1]
    page = page_table.long().gather(2, logical[:, None].expand(-1, heads, -1))
    slot = page.clamp_min(0) * size + (token % size)[:, None]
    here = live[:, None, :, None]
    keys, values = (
        torch.where(here, pool.flatten(0, 1)[slot], 0) for pool in (key_pages, value_pages)
    )
    return keys, values, live
