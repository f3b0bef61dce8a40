"""Plain PyTorch reference of a model's own attention, the normal form that sites are found in."""

from __future__ import annotations

import torch
from torch import Tensor

from .paged import row_blocks, rows_by_kv_head, softmax_read


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    batch, heads, n, _ = query.shape
    kv_heads, m = key.shape[1:3]
    if is_causal and n != m:
        raise ValueError(
            f"is_causal=True with {n} queries and {m} keys: which key the first query stands at "
            "is not defined; pass a mask instead"
        )
    rows = rows_by_kv_head(query, kv_heads)
    keys, values = key.to(rows.dtype), value.to(rows.dtype)
    out = query.new_empty((batch, heads, n, value.shape[3]))
    placed = out.unflatten(1, (kv_heads, -1)).transpose(2, 3)
    if mask is not None:
        mask = mask.expand(batch, heads, n, m).unflatten(1, (kv_heads, -1)).transpose(2, 3)
    key_at = torch.arange(m, device=query.device)
    for block in row_blocks(n, batch * heads * m * rows.element_size()):
        seen = block.stop if is_causal else m
        visible, added = None, None
        if is_causal:  # keys before the block are visible to each of its rows
            visible = (key_at[block] <= key_at[block, None])[:, None]
        if mask is not None:
            part = mask[:, :, block, :, :seen]
            if mask.dtype != torch.bool:
                added = part
            elif visible is None:
                visible = part
            else:
                visible = part & (key_at[:seen] <= key_at[block, None])[:, None]
        placed[:, :, block], _ = softmax_read(
            rows[:, :, block],
            keys[:, :, :seen],
            values[:, :, :seen],
            added,
            visible,
            scale,
            softcap,
        )
    return out
