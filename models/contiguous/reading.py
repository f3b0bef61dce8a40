"""Keys and values of contiguous state, read by one softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory.paged import NEGATIVE_INFINITY
from .pages import FAR, LOWEST, columns_of, iota, pages_in, query_rows, rows_of, standing, tokens_of


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pages: Tensor | None,
    exclude: bool,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    size: int,
    slots: int,
    pinned: int,
) -> tuple[Tensor, Tensor]:
    """`attend` of `ops.py`, but for rows that see nothing: their out is some mean of the values, of
    no weight beside others (lse -inf). Rows of padding may see whatever is listed for them.

    Args:
        keys, values: [B, Hkv, columns * slots, D].
        bias: [B, Hkv, columns * slots], added to the logits.
        pages: int64 [B, Hkv, n, S] of distinct pages, -1 = none, or None.
        size: tokens a page; each of its slots stands for size // slots of them.
    """
    if pages is not None and not exclude:
        return _attend_listed(
            query, keys, values, bias, pages, position, scale, softcap, window, size, slots, pinned,
        )  # fmt: skip
    logits = _logits(query, keys, bias, scale, softcap)
    visible = _visible(keys, pages, position, lengths, query.shape[2], window, size, slots, pinned)
    weights, lse = _weights(torch.where(visible[:, :, None], logits, LOWEST))
    group, n = logits.shape[2:4]
    out = (weights.flatten(2, 3) @ values.to(weights.dtype)).unflatten(2, (group, n))
    return out.flatten(1, 2), lse.flatten(1, 2)


def attend_page_lse(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    account: Tensor,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend.page_lse` of `ops.py` over the pages whose account [B, Hkv, columns] is not -1; rows
    that see nothing as in `attend`."""
    logits = _logits(query, keys, None, scale, softcap)
    visible = _visible(keys, None, position, lengths, query.shape[2], window, size, size, -1)
    visible = visible & (account >= 0).repeat_interleave(size, 2)[:, :, None]
    weights, lse = _weights(torch.where(visible[:, :, None], logits, LOWEST))
    group, n = logits.shape[2:4]
    out = (weights.flatten(2, 3) @ values.to(weights.dtype)).unflatten(2, (group, n))
    by_page = torch.where(visible[:, :, None], logits, NEGATIVE_INFINITY).unflatten(4, (-1, size))
    peak = by_page.amax(-1).clamp_min(LOWEST)
    page_lse = (by_page - peak[..., None]).exp().sum(-1).log() + peak
    return out.flatten(1, 2), lse.flatten(1, 2), page_lse.flatten(1, 2)


def summaries(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    page_logits: Tensor,
    value_mean: Tensor,
    log_count: Tensor,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    size: int,
) -> tuple[Tensor, Tensor]:
    """`attend.summaries` of `ops.py`: the listed pages, every other full one as one key; rows that
    see nothing as in `attend`.

    Args:
        pages: ascending, -1 behind them.
        page_logits: as `page_logits` gives them, [B, H, n, columns]: -inf of every page that has no
            summary to be read.
        value_mean: [B, Hkv, columns, Dv]; log_count: [B, Hkv, columns, 1].
    """
    heads, n = keys.shape[1], query.shape[2]
    exact, value = _listed(
        query, keys, values, None, pages, position, scale, softcap, 0, size, size, -1
    )
    # What is read token by token has no summary: pages ascend, so that the first stands for none.
    at = torch.maximum(pages, pages[..., :1]).clamp_min(0)
    weight = log_count.to(exact.dtype).squeeze(-1)[:, :, None].expand(-1, -1, n, -1)
    weight = weight.scatter(3, at, torch.full_like(at, LOWEST, dtype=exact.dtype))
    given = page_logits.unflatten(1, (heads, -1))  # [B, Hkv, G, n, columns]
    rest = _capped(given * scale, softcap) + weight[:, :, None]
    rest = torch.where(given > NEGATIVE_INFINITY, rest, LOWEST)
    # One softmax over both: [B, Hkv, n, G, S*size + columns].
    weights, lse = _weights(torch.cat([exact, rest.transpose(2, 3)], -1))
    listed = exact.shape[-1]
    by_page = weights[..., listed:].transpose(2, 3)  # [B, Hkv, G, n, columns]
    out = weights[..., :listed] @ value
    others = (by_page.flatten(2, 3) @ value_mean.to(weights.dtype)).unflatten(2, by_page.shape[2:4])
    out = out + others.transpose(2, 3)
    return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)


def _attend_listed(
    query: Tensor, keys: Tensor, values: Tensor, *given: Any
) -> tuple[Tensor, Tensor]:
    """`_listed`, read: out and lse."""
    logits, value = _listed(query, keys, values, *given)
    weights, lse = _weights(logits)
    out = weights @ value
    return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)


def _listed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pages: Tensor,
    position: Tensor,
    scale: float,
    softcap: float,
    window: int,
    size: int,
    slots: int,
    pinned: int,
) -> tuple[Tensor, Tensor]:
    """Logits of listed pages [B, Hkv, n, G, S*slots], LOWEST where nothing is seen, and their
    values [B, Hkv, n, S*slots, Dv]."""
    heads = keys.shape[1]
    rows = query_rows(query, heads).transpose(2, 3)  # [B, Hkv, n, G, D]
    paged = [x.unflatten(2, (-1, slots)) for x in (keys, values)]
    columns = paged[0].shape[2]
    there, column = pages >= 0, pages.clamp_min(0)
    if pinned >= 0:
        column = columns_of(column, columns, pinned)
    elif slots != size:  # a level may lack the page that tokens are still written to
        there, column = there & (pages < columns), column.clamp_max(columns - 1)
    key, value = (rows_of(x, column).to(rows.dtype).flatten(3, 4) for x in paged)
    logits = _capped((rows * scale) @ key.transpose(-1, -2), softcap)  # [B, Hkv, n, G, S*slots]
    if bias is not None:
        added = rows_of(bias.unflatten(2, (-1, slots)), column).flatten(3)
        logits = logits + added[:, :, :, None].to(logits.dtype)
    token = tokens_of(position, query.shape[2])
    # Tokens of each page before the query's own; a slot is seen once its last token is.
    before = torch.where(there, token[:, None, :, None] - pages * size, -1)[..., None]
    last = (iota(slots, query) + 1) * (size // slots) - 1
    visible = before >= last  # [B, Hkv, n, S, slots]
    if window:
        visible = visible & (before - window < last)
    # Added to the logits, which are no more than rounding beside it: [B, Hkv, n, 1, S*slots].
    hidden = torch.where(visible, 0.0, LOWEST).to(logits.dtype).flatten(3)[:, :, :, None]
    return logits + hidden, value


def _logits(
    query: Tensor, keys: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """[B, Hkv, G, n, m] of every key; the group folded into rows, so that keys are read once."""
    rows = query_rows(query, keys.shape[1])
    group, n = rows.shape[2:4]
    flat = (rows.flatten(2, 3) * scale) @ keys.to(rows.dtype).transpose(-1, -2)
    logits: Tensor = _capped(flat, softcap).unflatten(2, (group, n))
    return logits if bias is None else logits + bias[:, :, None, None].to(logits.dtype)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def _visible(
    keys: Tensor,
    excluded: Tensor | None,
    position: Tensor,
    lengths: Tensor,
    n: int,
    window: int,
    size: int,
    slots: int,
    pinned: int,
) -> Tensor:
    """Which slots each row sees: bool [B, 1 or Hkv, n, columns * slots]."""
    columns = keys.shape[2] // slots
    token, live = standing(position, lengths, n)
    if pinned < 0:
        # Columns not yet written hold tokens to come.
        last = (iota(keys.shape[2], position) + 1) * (size // slots) - 1
    else:
        page = pages_in(position, lengths, columns, size, pinned)
        last = (page[..., None] * slots + iota(slots, page) + 1) * (size // slots) - 1
        last = torch.where(page[..., None] >= 0, last, FAR).flatten(1)[:, None]
    visible = (token[..., None] >= last) & live[..., None]  # [B, n, columns * slots]
    if window:
        visible = visible & (token[..., None] - window < last)
    visible = visible[:, None]
    if excluded is None:
        return visible
    at = columns_of(excluded.clamp_min(0), columns, pinned)
    at = at.masked_fill((excluded < 0) | (at >= columns), columns)
    mark = token.new_zeros((*excluded.shape[:3], columns + 1), dtype=torch.float32)
    mark = mark.scatter(3, at, torch.ones_like(at, dtype=mark.dtype))[..., :columns]
    return visible & (mark == 0).repeat_interleave(slots, 3)


def _weights(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of logits that are LOWEST where nothing is seen, and the log-sum-exp: -inf of a row
    that sees nothing, whose weights are all alike.

    Runtimes have a softmax as one operator; what it divided by follows from its largest weight.
    """
    # Not -inf: a row of it alone has no softmax.
    peak = logits.amax(-1, keepdim=True)
    weights = torch.nn.functional.softmax(logits, dim=-1)
    lse = peak - weights.amax(-1, keepdim=True).log()
    lse = torch.where(peak > LOWEST, lse, NEGATIVE_INFINITY)
    return weights, lse.squeeze(-1)
