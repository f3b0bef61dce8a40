"""Plain PyTorch references of the reading operations; `ops.py` holds schemas and contracts.

Logits are computed a block of query rows at a time, so that no intermediate outgrows BLOCK_BYTES by
more than one row. Whatever a query may not see is replaced, never multiplied by zero: pools hold
garbage in unwritten slots, and 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 24
NEGATIVE_INFINITY = float("-inf")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type sums are taken in: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_blocks(rows: int, bytes_a_row: int) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES // max(1, bytes_a_row))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def rows_by_kv_head(query: Tensor, kv_heads: int) -> Tensor:
    """[B, H, n, D] -> [B, Hkv, n, G, D] in the summing type: query head h reads head h // G."""
    if query.shape[1] % kv_heads:
        raise ValueError(
            f"{query.shape[1]} query heads cannot share {kv_heads} KV heads evenly; "
            "the number of query heads must be a multiple of the number of KV heads"
        )
    rows: Tensor = query.to(wide(query.dtype)).unflatten(1, (kv_heads, -1)).transpose(2, 3)
    return rows


def token_of_row(position: Tensor, lengths: Tensor, rows: int) -> Tensor:
    """The token [B, n] each query row stands at; -1 for padding, which sees nothing."""
    row = torch.arange(rows, device=position.device)
    return torch.where(row < lengths[:, None], position[:, None].long() + row, -1)


def softmax_read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    added: Tensor | None,
    visible: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """One softmax over `keys`; rows that see nothing give out 0 and lse -inf.

    Args:
        query: [B, Hkv, r, G, Dk].
        keys, values: [B, Hkv, m, D] shared by the r rows, or [B, Hkv, r, m, D].
        added: what is added to the logits, broadcastable to [B, Hkv, r, G, m].
        visible: what counts among the last m' keys, broadcastable to [B, Hkv, r, G, m']; the keys
            before them all count. Masking a whole prefill would cost more than its matmuls.
    """
    shared = keys.dim() == 4
    rows = query.shape[2:4]
    scaled = query * scale
    if shared:
        scaled = scaled.flatten(2, 3)  # [B, Hkv, r*G, Dk] @ [B, Hkv, Dk, m]
    logits = scaled @ keys.transpose(-1, -2)
    if softcap:
        logits.div_(softcap).tanh_().mul_(softcap)
    by_row = logits.unflatten(2, rows) if shared else logits  # [B, Hkv, r, G, m]
    if added is not None:
        by_row.add_(added)
    if visible is not None:
        by_row[..., by_row.shape[-1] - visible.shape[-1] :].masked_fill_(
            ~visible, NEGATIVE_INFINITY
        )
    peak = logits.amax(-1, keepdim=True)
    peak.masked_fill_(peak == NEGATIVE_INFINITY, 0)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (peak + total.log()).squeeze(-1)
    out = (weights @ values) / total.masked_fill(total == 0, 1)
    if shared:
        out, lse = out.unflatten(2, rows), lse.unflatten(2, rows)
    return out, lse


def attend(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    bias: Tensor | None,
    page_table: Tensor,
    pages: Tensor | None,
    exclude: bool,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    span: int,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads = page_table.shape[:2]
    rows = rows_by_kv_head(query, kv_heads)
    n, group = rows.shape[2:4]
    token = token_of_row(position, lengths, n)
    out = rows.new_zeros((batch, kv_heads, group, n, value_pages.shape[2]))
    lse = rows.new_full((batch, kv_heads, group, n), NEGATIVE_INFINITY)
    read = (rows, key_pages, value_pages, bias, page_table)
    if pages is None or exclude:
        blocks = read_table(*read, pages, token, scale, softcap, window, span)
    else:
        blocks = read_pages(*read, pages, token, scale, softcap, window, span)
    for block, block_out, block_lse in blocks:
        out[:, :, :, block] = block_out.transpose(2, 3)
        lse[:, :, :, block] = block_lse.transpose(2, 3)
    padding = (token < 0)[:, None, None]
    out.masked_fill_(padding[..., None], 0)
    lse.masked_fill_(padding, NEGATIVE_INFINITY)
    return out.flatten(1, 2), lse.flatten(1, 2)


def attend_page_lse(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    bias: Tensor | None,
    page_table: Tensor,
    pages: Tensor | None,
    exclude: bool,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    span: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend`, and the log-sum-exp of a read of each page alone."""

    def read(which: Tensor | None, without: bool) -> tuple[Tensor, Tensor]:
        return attend(
            *(query, key_pages, value_pages, bias, page_table, which, without),
            *(position, lengths, scale, softcap, window, span),
        )

    out, lse = read(pages, exclude)
    if pages is None or exclude:
        every = torch.arange(page_table.shape[2], dtype=torch.int32, device=query.device)
        each = every.expand(*page_table.shape[:2], query.shape[2], -1)
        if pages is not None:
            each = each.masked_fill(listed(pages, 0, page_table.shape[2]), -1)
    else:
        each = pages
    page_lse = lse.new_empty((*lse.shape, each.shape[3]))
    for column in range(each.shape[3]):
        _, page_lse[..., column] = read(each[..., column : column + 1], False)
    return out, lse, page_lse


def attend_summaries(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    pages: Tensor,
    page_logits: Tensor,
    page_values: Tensor,
    page_bias: Tensor,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    exact = attend(
        *(query, key_pages, value_pages, None, page_table, pages, False, position, lengths),
        *(scale, softcap, 0, 1),
    )
    batch, kv_heads, count = page_table.shape
    n, size = query.shape[2], key_pages.shape[1]
    logits = page_logits.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # [B, Hkv, n, G, pages]
    table = page_table.long().clamp_min(0)
    values = page_values[table].to(logits.dtype)  # [B, Hkv, pages, Dv]
    values[page_table < 0] = 0
    bias = page_bias[table].squeeze(-1).to(logits.dtype)
    token = token_of_row(position, lengths, n)
    last = (torch.arange(count, device=query.device) + 1) * size - 1
    visible = (page_table >= 0)[:, :, None] & (last <= token[:, None, :, None])
    visible = visible & ~listed(pages, 0, count)  # [B, Hkv, n, pages]
    values[~visible.any(2)] = 0
    rest_out = logits.new_zeros((batch, kv_heads, n, logits.shape[3], values.shape[3]))
    rest_lse = logits.new_full(logits.shape[:4], NEGATIVE_INFINITY)
    for block in row_blocks(n, batch * query.shape[1] * count * logits.element_size()):
        scaled = logits[:, :, block] * scale
        if softcap:
            scaled = (scaled / softcap).tanh() * softcap
        scaled = (scaled + bias[:, :, None, None]).masked_fill(
            ~visible[:, :, block, :, None].transpose(3, 4), NEGATIVE_INFINITY
        )
        lse = scaled.logsumexp(-1)
        weights = (scaled - lse.masked_fill(lse == NEGATIVE_INFINITY, 0)[..., None]).exp()
        rest_out[:, :, block] = weights @ values[:, :, None]
        rest_lse[:, :, block] = lse
    rest = (x.transpose(2, 3).flatten(1, 2) for x in (rest_out, rest_lse))
    outs, lses = zip(exact, rest, strict=True)
    return combine([*outs], [*lses])


def read_table(
    rows: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    bias: Tensor | None,
    page_table: Tensor,
    skipped: Tensor | None,
    token: Tensor,
    scale: float,
    softcap: float,
    window: int,
    span: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Reads every page of the table that a row can see, but those `skipped` [B, Hkv, n, S]."""
    batch, kv_heads, table_pages = page_table.shape
    n, group = rows.shape[2:4]
    slots = key_pages.shape[1]
    newest = token.amax(1)  # the last token each sequence's rows may see

    def bounds(standing: Tensor) -> tuple[int, int, int]:
        """First and last + 1 page these tokens can see, and the first some of them cannot."""
        live = standing[standing >= 0]
        if not live.numel():
            return 0, 0, 0
        oldest = int(live.min())
        low = max(0, oldest - window + 1) // (slots * span) if window else 0
        high = min(table_pages, int(live.max()) // (slots * span) + 1)
        return low, high, min(high, (oldest + 1) // (slots * span))

    first, stop, _ = bounds(token)
    if first >= stop:
        return
    table = page_table[:, :, first:stop].long()
    assigned = (table >= 0).repeat_interleave(slots, 2)  # [B, Hkv, m]
    plain = not window and skipped is None and bool(assigned.all())
    table = table.clamp_min(0)
    keys = key_pages[table].flatten(2, 3).to(rows.dtype)
    values = value_pages[table].flatten(2, 3).to(rows.dtype)
    added = None if bias is None else bias[table].flatten(2, 3).to(rows.dtype)
    last = (torch.arange(first * slots, stop * slots, device=token.device) + 1) * span - 1
    unseen = ~assigned | (last > newest[:, None, None])
    if bool(unseen.any()):
        values[unseen] = 0
    for block in row_blocks(n, batch * kv_heads * group * len(last) * rows.element_size()):
        low, high, clear = bounds(token[:, block])
        if low >= high:
            continue
        m = slice((low - first) * slots, (high - first) * slots)
        unclear = slice((clear - first) * slots if plain else m.start, m.stop)
        distance = token[:, None, block, None] - last[unclear]  # [B, 1, r, m']
        visible = (distance >= 0) & assigned[:, :, None, unclear]
        if window:
            visible &= distance < window
        if skipped is not None:
            visible &= ~listed(skipped[:, :, block], low, high).repeat_interleave(slots, 3)
        out, lse = softmax_read(
            rows[:, :, block],
            keys[:, :, m],
            values[:, :, m],
            None if added is None else added[:, :, None, None, m],
            visible[:, :, :, None],
            scale,
            softcap,
        )
        yield block, out, lse


def listed(pages: Tensor, low: int, high: int) -> Tensor:
    """Which of the pages low .. high - 1 are in each row's list: [..., S] -> [..., high - low]."""
    inside = (pages >= low) & (pages < high)
    found = pages.new_zeros((*pages.shape[:-1], high - low + 1), dtype=torch.bool)
    found.scatter_(-1, torch.where(inside, pages - low, high - low).long(), True)
    return found[..., :-1]


def read_pages(
    rows: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    bias: Tensor | None,
    page_table: Tensor,
    pages: Tensor,
    token: Tensor,
    scale: float,
    softcap: float,
    window: int,
    span: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Reads only the pages in each row's list [B, Hkv, n, S]; -1 entries are empty."""
    batch, kv_heads = page_table.shape[:2]
    slots, width = key_pages.shape[1], max(key_pages.shape[2], value_pages.shape[2])
    pages = pages[..., (pages >= 0).flatten(0, 2).any(0)].long()
    if not pages.numel():
        return
    inside = pages.clamp(0, page_table.shape[2] - 1)
    table = page_table.long().gather(2, inside.flatten(2)).view_as(pages)
    usable = (pages >= 0) & (table >= 0)
    slot = torch.arange(slots, device=pages.device)
    row_bytes = batch * kv_heads * pages.shape[3] * slots * width * rows.element_size()
    for block in row_blocks(rows.shape[2], row_bytes):
        at = table[:, :, block].clamp_min(0)
        last = (pages[:, :, block, :, None] * slots + slot + 1) * span - 1
        distance = token[:, None, block, None, None] - last
        visible = usable[:, :, block, :, None] & (distance >= 0)  # [B, Hkv, r, S, s]
        if window:
            visible &= distance < window
        visible = visible.flatten(3)
        keys = key_pages[at].flatten(3, 4).to(rows.dtype)  # [B, Hkv, r, S*s, Dk]
        values = value_pages[at].flatten(3, 4).to(rows.dtype)
        values[~visible] = 0
        added = None if bias is None else bias[at].flatten(3)[:, :, :, None].to(rows.dtype)
        out, lse = softmax_read(
            rows[:, :, block], keys, values, added, visible[:, :, :, None], scale, softcap
        )
        yield block, out, lse


def combine(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not outs or len(outs) != len(lses):
        raise ValueError(f"combine needs as many outs as lses, got {len(outs)} and {len(lses)}")
    each = torch.stack(lses)
    lse = each.logsumexp(0)
    share = (each - lse.masked_fill(lse == NEGATIVE_INFINITY, 0)).exp()
    return (share[..., None] * torch.stack(outs)).sum(0), lse
