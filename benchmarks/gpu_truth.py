"""Attention over pages as the GPU command computes it by hand: a row and a KV head at a time."""

from __future__ import annotations

import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")


def by_hand(
    dtype: torch.dtype,
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    bias: Tensor | None,
    table: Tensor,
    pages: Tensor | None,
    exclude: bool,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    span: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and page_lse of attend, a row and a KV head at a time, computed in `dtype`."""
    batch, kv_heads, columns = table.shape
    heads, n = query.shape[1:3]
    group, slots = heads // kv_heads, key_pages.shape[1]
    listed = pages is not None and not exclude
    width = pages.shape[3] if pages is not None and listed else columns
    out = torch.zeros(batch, heads, n, value_pages.shape[2], dtype=dtype)
    lse = torch.full((batch, heads, n), NEGATIVE_INFINITY, dtype=dtype)
    page_lse = torch.full((batch, heads, n, width), NEGATIVE_INFINITY, dtype=dtype)
    page = torch.arange(columns)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, kv_heads, n))).tolist():
        if i >= int(lengths[b]):
            continue
        open_to = table[b, h] >= 0
        if pages is not None:
            open_to = open_to & (torch.isin(page, pages[b, h, i]) != exclude)
        last = (torch.arange(columns * slots) + 1) * span - 1
        age = int(position[b]) + i - last
        seen = (age >= 0) & open_to.repeat_interleave(slots)
        if window:
            seen &= age < window
        found = seen.nonzero().squeeze(1)
        if not len(found):
            continue
        at = table[b, h, found // slots].long(), found % slots
        mine = slice(h * group, (h + 1) * group)
        logits = (query[b, mine, i].to(dtype) @ key_pages[at].to(dtype).T) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[at].to(dtype)
        out[b, mine, i] = logits.softmax(-1) @ value_pages[at].to(dtype)
        lse[b, mine, i] = logits.logsumexp(-1)
        columns_of = page if pages is None or exclude else pages[b, h, i]
        for column, wanted in enumerate(columns_of.tolist()):
            part = logits[:, found // slots == wanted]
            if wanted >= 0 and part.shape[1]:
                page_lse[b, mine, i, column] = part.logsumexp(-1)
    return out, lse, page_lse
