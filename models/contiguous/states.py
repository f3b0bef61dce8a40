"""Recurrent states beside contiguous state, and what enters them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory.paged import NEGATIVE_INFINITY, wide
from .pages import columns_of, iota, query_rows, rows_of, standing


def entering(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    lengths: Tensor,
    window: int,
    size: int,
    pinned: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lists.entering`: key and value that leave the window with each row, and which rows do."""
    token, live = standing(position, lengths, query.shape[2])
    live = live & (token >= window)
    token = (token - window).clamp_min(0)
    page = torch.div(token, size, rounding_mode="trunc")
    slot = columns_of(page, keys.shape[2] // size, pinned) * size + torch.remainder(token, size)
    slot = slot.clamp_max(keys.shape[2] - 1)[:, None].expand(-1, keys.shape[1], -1)
    here = live[:, None, :, None]
    key, value = (torch.where(here, rows_of(x, slot), 0) for x in (keys, values))
    return key, value, live


def additive_state(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    lengths: Tensor,
    state: Tensor,
    norm: Tensor | None,
) -> list[Tensor]:
    """`state_step` of `ops.py` without the delta rule, all rows at once: quadratic in n.

    Returns:
        out, lse, state and, if there is one, norm.
    """
    dtype = wide(query.dtype)
    heads, n = key.shape[1:3]
    row = iota(n, query)
    live = row < lengths[:, None]
    here = live[:, None, :, None]
    q = torch.where(here[:, :, None], query_rows(query, heads), 0)  # [B, Hkv, G, n, m]
    k, v = (torch.where(here, x.to(dtype), 0) for x in (key, value))
    below, own = row < row[:, None], row <= row[:, None]
    if decay is None:
        reach = own.to(dtype)
        since = until = whole = None
    else:
        g = decay.to(dtype)[None, :, None] if decay.dim() == 1 else decay.to(dtype)
        g = torch.where(live[:, None], g, 0).expand(-1, heads, -1)
        # Sums over j+1 .. i for each pair, not differences of sums: a decay to nothing is exact.
        spans = torch.where(below, g[..., None], 0).cumsum(-2)
        reach = torch.where(own, spans.exp(), 0)
        since = g.cumsum(-1).exp()
        until = reach[..., -1, :]
        whole = since[..., -1]
    scores = (q.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (q.shape[2], n))
    scores = scores * (reach if reach.dim() == 2 else reach[:, :, None])
    faded = q if since is None else q * since[:, :, None, :, None]
    num = scores.flatten(2, 3) @ v + faded.flatten(2, 3) @ state
    num = num.unflatten(2, (q.shape[2], n))
    left = k if until is None else k * until[..., None]
    grown = left.transpose(-1, -2) @ v
    kept = state if whole is None else state * whole[..., None, None]
    seen = live[:, None, None]
    if norm is None:
        lse = torch.where(seen, 0.0, NEGATIVE_INFINITY).to(dtype).expand(num.shape[:4])
        return [num.flatten(1, 2), lse.flatten(1, 2), kept + grown]
    den = scores.sum(-1) + (faded * norm[:, :, None, None]).sum(-1)
    some = den > 0
    safe = torch.where(some, den, 1)
    out = torch.where(some[..., None], num / safe[..., None], 0)
    lse = torch.where(some, safe.log(), NEGATIVE_INFINITY)
    kept_norm = norm if whole is None else norm * whole[..., None]
    return [out.flatten(1, 2), lse.flatten(1, 2), kept + grown, kept_norm + left.sum(-2)]
