"""The memory operations on contiguous state: pure functions in standard operations.

What an engine without a host keeps: keys and values as [B, Hkv, capacity, D], records as [B, Hkv,
columns, width]. There is no page table: where a page lies follows from its number. Nothing is
written in place, no size follows from data, and each function is what an exported engine runs:
traced into AOTInductor's portable package, and the body of its node in ONNX.

Pages are those of `ops.py`: page g holds tokens g*size .. (g+1)*size - 1. `pinned` says where it
lies: -1, in column g of a state that grows; else the first `pinned` pages keep their columns, and
the others take turns in the rest, so that a state of fixed size holds the newest ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .levels import folded
from .paged import NEGATIVE_INFINITY, wide
from .parts import SCORE_FIELDS
from .records import page_records

LOWEST = torch.finfo(torch.float32).min
FAR = (1 << 31) - 1  # beyond every token, in 32 bits: to these some runtimes narrow constants


def iota(count: int, like: Tensor) -> Tensor:
    """0 .. count - 1, int64, where `like` is. A function of a tensor, so that whoever stands in for
    one (`compiler/export/onnx_symbols.py`) is asked."""
    if has_torch_function_unary(like):
        made: Tensor = handle_torch_function(iota, (like,), count, like)
        return made
    return torch.arange(count, device=like.device)


def columns_of(page: Tensor, columns: int, pinned: int) -> Tensor:
    """The columns that pages, int64 of any shape, lie in."""
    if pinned < 0:
        return page
    turn = torch.remainder(page - pinned, columns - pinned)
    return torch.where(page < pinned, page, pinned + turn)


def pages_in(position: Tensor, lengths: Tensor, columns: int, size: int, pinned: int) -> Tensor:
    """The page in each column once the new tokens are written: int64 [B, columns], -1 = none."""
    end = position.long() + lengths
    newest = (torch.div(end + size - 1, size, rounding_mode="trunc") - 1)[:, None]
    column = iota(columns, position)
    if pinned < 0:
        return torch.where(column <= newest, column, -1)
    late = newest - torch.remainder(newest - column, columns - pinned)
    first = column < pinned
    there = (first & (column <= newest)) | (~first & (late >= pinned))
    return torch.where(there, torch.where(first, column, late), -1)


def rows_of(tensor: Tensor, at: Tensor) -> Tensor:
    """Rows of [B, Hkv, X, ...] at [B, Hkv, ...] (int64): [B, Hkv, ..., ...]."""
    batch, heads, count = tensor.shape[:3]
    base = iota(batch * heads, at).view(batch, heads) * count
    flat = (at + base.view(batch, heads, *[1] * (at.dim() - 2))).flatten()
    picked = tensor.flatten(0, 2).flatten(1).index_select(0, flat)
    return picked.view(*at.shape, *tensor.shape[3:])


def put_rows(tensor: Tensor, at: Tensor, new: Tensor) -> Tensor:
    """[B, Hkv, X, D] with rows at [B, n] (int64) replaced by new [B, Hkv, n, D]: ScatterND.

    Raises:
        IndexError: a row beyond the end; so does every runtime.
    """
    batch, heads = tensor.shape[:2]
    first = iota(batch, at)[:, None, None]
    second = iota(heads, at)[None, :, None]
    return torch.index_put(tensor, (first, second, at[:, None]), new.to(tensor.dtype))


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last axis and where they stand, ties to the lower: TopK."""
    values, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    # Copies: an operator may not give views of what it gives beside them.
    return values[..., :count].clone(), order[..., :count].clone()


def query_rows(query: Tensor, heads: int) -> Tensor:
    """[B, H, n, D] -> [B, Hkv, G, n, D] in the summing type."""
    rows: Tensor = query.to(wide(query.dtype)).unflatten(1, (heads, -1))
    return rows


def standing(position: Tensor, lengths: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The token [B, n] of each row, int64, and which rows are valid, bool [B, n]."""
    row = iota(n, position)
    return position.long()[:, None] + row, row < lengths[:, None]


# --- pages of contiguous state, for operations that take page tables ---


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


# --- writing ---


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

    Args:
        reach: tokens behind a query that it still reads, where pages take turns: a call whose
            tokens would push them out writes beyond the end, which raises.
    """
    capacity, n = cache.shape[2], new.shape[2]
    count = lengths.long()[:, None]
    # Rows of padding write the last token once more, and a sequence of none its last one.
    row = torch.minimum(iota(n, new), (count - 1).clamp_min(0))  # [B, n]
    token = position.long()[:, None] + row
    token = torch.where(count > 0, token, (token - 1).clamp_min(0))
    slot = token
    if pinned >= 0:
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
    page, live = _filled(position, lengths, new.shape[2], size)
    heads = new.shape[1]
    pages = [x.unflatten(2, (-1, size)) for x in (keys, values)]
    column = columns_of(page, pages[0].shape[2], pinned)[:, None].expand(-1, heads, -1)
    read = [rows_of(x, column).flatten(0, 2) for x in pages]  # [B*Hkv*t, size, D]
    made = page_records(read[0], read[1], fields)
    return _written(index, made, page, live, record_pinned)


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
    group, live = _filled(position, lengths, new.shape[2], size)
    child = group[..., None] * ratio + iota(ratio, group)  # [B, t, ratio]
    column = columns_of(child, children[0].shape[2], child_pinned)[:, None]
    column = column.expand(-1, new.shape[1], -1, -1)
    read = {
        field: rows_of(pool, column).to(wide(pool.dtype)).flatten(0, 2)
        for field, pool in zip(fields, children, strict=True)
    }
    return _written(index, [folded(f, read, size) for f in fields], group, live, pinned)


def _filled(position: Tensor, lengths: Tensor, n: int, size: int) -> tuple[Tensor, Tensor]:
    """Pages [B, t] that n new tokens can fill, those that they did not standing for the last one
    that is full; and for which sequences [B] they filled any."""
    first = torch.div(position.long(), size, rounding_mode="trunc")
    stop = torch.div(position.long() + lengths, size, rounding_mode="trunc")
    page = first[:, None] + iota(n // size + 1, position)
    return torch.minimum(page, stop[:, None] - 1).clamp_min(0), stop > first


def _written(
    index: list[Tensor], made: list[Tensor], page: Tensor, live: Tensor, pinned: int
) -> list[Tensor]:
    """The index with `made` [B*Hkv*t, width] a field at pages [B, t] of the live sequences."""
    heads = index[0].shape[1]
    column = columns_of(page, index[0].shape[2], pinned)
    whole = column[:, None].expand(-1, heads, -1)
    written = []
    for pool, record in zip(index, made, strict=True):
        record = record.to(pool.dtype).view(*whole.shape, pool.shape[3])
        old = rows_of(pool, whole)
        # Nothing filled: what is there is written again, whatever was computed.
        record = torch.where(live[:, None, None, None], record, old)
        written.append(torch.ops.memcompile_portable.put_rows(pool, column, record))
    return written


# --- selecting ---


def score_select(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    position: Tensor,
    lengths: Tensor,
    score: str,
    size: int,
    sink_pages: int,
    window_pages: int,
    capacity: int,
    budget_pages: int,
    dense_below: int,
) -> Tensor:
    """`score_select` of `ops.py`: int64 [B, Hkv, n, capacity]; every page has its own column."""
    record = dict(zip(fields, index, strict=True))
    heads, columns = index[0].shape[1:3]
    rows = query_rows(query, heads)
    best = _scores(rows, {f: record[f].to(rows.dtype) for f in SCORE_FIELDS[score]}, score)
    token, live = standing(position, lengths, query.shape[2])
    at = torch.div(token, size, rounding_mode="trunc")[:, None, :, None]  # [B, 1, n, 1]
    page = iota(columns, query)
    always = (page < sink_pages) | (page >= at - window_pages)
    everything = (at < budget_pages) | (token < dense_below)[:, None, :, None]
    ranked = torch.where(always | everything, -LOWEST, best.clamp(LOWEST / 2, -LOWEST / 2))
    ranked = torch.where((page <= at) & live[:, None, :, None], ranked, NEGATIVE_INFINITY)
    # A context may have fewer columns than a list has places.
    ranked = torch.nn.functional.pad(ranked, (0, capacity), value=NEGATIVE_INFINITY)
    value, order = torch.ops.memcompile_portable.largest(ranked, capacity)
    wanted = torch.where(everything, at + 1, budget_pages)
    place = iota(capacity, query)
    return _ascending(torch.where((place < wanted) & (value > NEGATIVE_INFINITY), order, -1))


def page_logits(
    query: Tensor,
    mean: Tensor,
    position: Tensor,
    lengths: Tensor,
    size: int,
    sink_pages: int,
    window_pages: int,
    budget_pages: int,
    dense_below: int,
) -> Tensor:
    """The product [B, H, n, columns] of each query with each page's mean key, float32; -inf where
    the row does not choose by score."""
    rows = query_rows(query, mean.shape[1])
    token, live = standing(position, lengths, query.shape[2])
    at = torch.div(token, size, rounding_mode="trunc")[:, None, None, :, None]
    page = iota(mean.shape[2], query)
    chosen = (page >= sink_pages) & (page < at - window_pages) & (at >= budget_pages)
    chosen = chosen & (live & (token >= dense_below))[:, None, None, :, None]
    product = (rows.flatten(2, 3) @ mean.to(rows.dtype).transpose(-1, -2)).unflatten(
        2, (rows.shape[2], rows.shape[3])
    )
    return torch.where(chosen, product, NEGATIVE_INFINITY).flatten(1, 2)


def score_select_among(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    candidates: Tensor,
    position: Tensor,
    lengths: Tensor,
    score: str,
    size: int,
    sink_pages: int,
    window_pages: int,
    budget_pages: int,
    pinned: int,
) -> Tensor:
    """`score_select.among` of `ops.py`: int64 [B, Hkv, n, budget_pages].

    Args:
        candidates: int64 [B, Hkv, n, S], ascending but for -1.
        pinned: of the records.
    """
    record = dict(zip(fields, index, strict=True))
    heads, columns = index[0].shape[1:3]
    rows = query_rows(query, heads).transpose(2, 3)  # [B, Hkv, n, G, D]
    token, live = standing(position, lengths, query.shape[2])
    at = torch.div(token, size, rounding_mode="trunc")[:, None, :, None]
    usable = (candidates >= 0) & (candidates <= at) & live[:, None, :, None]
    if pinned < 0:
        usable = usable & (candidates < columns)
    column = columns_of(candidates.clamp_min(0), columns, pinned).clamp_max(columns - 1)
    read = {f: rows_of(record[f], column).to(rows.dtype) for f in SCORE_FIELDS[score]}
    best = _scores(rows.transpose(2, 3)[:, :, :, :, None], read, score, own=True)
    always = (candidates < sink_pages) | (candidates >= at - window_pages)
    few = usable.long().sum(-1, keepdim=True) <= budget_pages
    ranked = torch.where(always | few, -LOWEST, best.clamp(LOWEST / 2, -LOWEST / 2))
    ranked = torch.where(usable, ranked, NEGATIVE_INFINITY)
    ranked = torch.nn.functional.pad(ranked, (0, budget_pages), value=NEGATIVE_INFINITY)
    value, order = torch.ops.memcompile_portable.largest(ranked, budget_pages)
    listed = torch.nn.functional.pad(candidates, (0, budget_pages), value=-1).gather(3, order)
    return _ascending(torch.where(value > NEGATIVE_INFINITY, listed, -1))


def _scores(rows: Tensor, records: dict[str, Tensor], score: str, own: bool = False) -> Tensor:
    """The largest score of the group that shares a KV head: [B, Hkv, n, columns].

    Args:
        rows: [B, Hkv, G, n, D]; own: [B, Hkv, G, n, 1, D].
        records: [B, Hkv, columns, width]; own: [B, Hkv, n, S, width], each row its own.
    """

    def product(of: Tensor, record: Tensor) -> Tensor:  # [B, Hkv, G, n, columns]
        if own:
            return (of @ record[:, :, None].transpose(-1, -2)).squeeze(-2)
        flat: Tensor = of.flatten(2, 3) @ record.transpose(-1, -2)
        by_row: Tensor = flat.unflatten(2, (of.shape[2], of.shape[3]))
        return by_row

    if score == "box":
        total = product(rows.clamp_min(0), records["max"])
        total = total + product(rows.clamp_max(0), records["min"])
    else:
        total = product(rows, records["mean"])
        if score == "mean-std":
            total = total + product(rows.abs(), records["std"])
        elif score == "ball":
            norm = rows.square().sum(-1, keepdim=True).sqrt()
            total = total + product(norm, records["radius"])
    return total.amax(2)


def _ascending(pages: Tensor) -> Tensor:
    """The pages of each row in order, -1 behind them."""
    beyond = torch.where(pages >= 0, -pages, -FAR)
    ordered, _ = torch.ops.memcompile_portable.largest(beyond, pages.shape[-1])
    return torch.where(ordered > -FAR, -ordered, -1)


# --- reading ---


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
    """`attend` of `ops.py`.

    Args:
        keys, values: [B, Hkv, columns * slots, D].
        bias: [B, Hkv, columns * slots], added to the logits.
        pages: int64 [B, Hkv, n, S] of distinct pages, -1 = none, or None.
        size: tokens a page; each of its slots stands for size // slots of them.
    """
    if pages is not None and not exclude:
        return _attend_listed(
            query, keys, values, bias, pages, position, lengths, scale, softcap, window,
            size, slots, pinned,
        )  # fmt: skip
    logits = _logits(query, keys, bias, scale, softcap)
    visible = _visible(keys, pages, position, lengths, query.shape[2], window, size, slots, pinned)
    weights, seen, lse = _weights(torch.where(visible[:, :, None], logits, LOWEST))
    group, n = logits.shape[2:4]
    out = (weights.flatten(2, 3) @ values.to(weights.dtype)).unflatten(2, (group, n))
    return torch.where(seen, out, 0).flatten(1, 2), lse.flatten(1, 2)


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
    """`attend.page_lse` of `ops.py` over the pages whose account [B, Hkv, columns] is not -1."""
    logits = _logits(query, keys, None, scale, softcap)
    visible = _visible(keys, None, position, lengths, query.shape[2], window, size, size, -1)
    visible = visible & (account >= 0).repeat_interleave(size, 2)[:, :, None]
    weights, seen, lse = _weights(torch.where(visible[:, :, None], logits, LOWEST))
    group, n = logits.shape[2:4]
    out = (weights.flatten(2, 3) @ values.to(weights.dtype)).unflatten(2, (group, n))
    by_page = torch.where(visible[:, :, None], logits, NEGATIVE_INFINITY).unflatten(4, (-1, size))
    peak = by_page.amax(-1).clamp_min(LOWEST)
    page_lse = (by_page - peak[..., None]).exp().sum(-1).log() + peak
    return torch.where(seen, out, 0).flatten(1, 2), lse.flatten(1, 2), page_lse.flatten(1, 2)


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
    """`attend.summaries` of `ops.py`: the listed pages, every other full one as one key.

    Args:
        value_mean: [B, Hkv, columns, Dv]; log_count: [B, Hkv, columns, 1].
    """
    heads, n = keys.shape[1], query.shape[2]
    exact, value = _listed(
        query, keys, values, None, pages, position, lengths, scale, softcap, 0, size, size, -1
    )
    rest = _capped(page_logits.unflatten(1, (heads, -1)) * scale, softcap)
    rest = rest + log_count.to(rest.dtype).squeeze(-1)[:, :, None, None]
    visible = _visible(value_mean, pages, position, lengths, n, 0, size, 1, -1)
    # One softmax over both: [B, Hkv, n, G, S*size + columns].
    rest = torch.where(visible[:, :, None], rest, LOWEST).transpose(2, 3)
    weights, seen, lse = _weights(torch.cat([exact, rest], -1))
    listed = exact.shape[-1]
    by_page = weights[..., listed:].transpose(2, 3)  # [B, Hkv, G, n, columns]
    out = weights[..., :listed] @ value
    others = (by_page.flatten(2, 3) @ value_mean.to(weights.dtype)).unflatten(2, by_page.shape[2:4])
    out = torch.where(seen, out + others.transpose(2, 3), 0)
    return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)


def _attend_listed(
    query: Tensor, keys: Tensor, values: Tensor, *given: Any
) -> tuple[Tensor, Tensor]:
    """`_listed`, read: out and lse."""
    logits, value = _listed(query, keys, values, *given)
    weights, seen, lse = _weights(logits)
    out = torch.where(seen, weights @ value, 0)
    return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)


def _listed(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pages: Tensor,
    position: Tensor,
    lengths: Tensor,
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
    column = columns_of(pages.clamp_min(0), columns, pinned).clamp_max(columns - 1)
    key, value = (rows_of(x, column).to(rows.dtype).flatten(3, 4) for x in paged)
    logits = _capped((rows * scale) @ key.transpose(-1, -2), softcap)  # [B, Hkv, n, G, S*slots]
    if bias is not None:
        added = rows_of(bias.unflatten(2, (-1, slots)), column).flatten(3)
        logits = logits + added[:, :, :, None].to(logits.dtype)
    token, live = standing(position, lengths, query.shape[2])
    there = (pages >= 0) & live[:, None, :, None]
    if pinned < 0:
        there = there & (pages < columns)
    # Tokens of each page before the query's own; a slot is seen once its last token is.
    before = torch.where(there, token[:, None, :, None] - pages * size, -1)[..., None]
    last = (iota(slots, query) + 1) * (size // slots) - 1
    visible = before >= last  # [B, Hkv, n, S, slots]
    if window:
        visible = visible & (before - window < last)
    return torch.where(visible.flatten(3)[:, :, :, None], logits, LOWEST), value


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


def _weights(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of logits that are LOWEST where nothing is seen, whether a row sees anything, and the
    log-sum-exp, -inf where it does not.

    Runtimes have a softmax as one operator; what it divided by follows from its largest weight.
    """
    # Not -inf: a row of it alone has no softmax.
    peak = logits.amax(-1, keepdim=True)
    weights = torch.nn.functional.softmax(logits, dim=-1)
    seen = peak > LOWEST
    lse = torch.where(seen, peak - weights.amax(-1, keepdim=True).log(), NEGATIVE_INFINITY)
    return weights, seen, lse.squeeze(-1)


# --- accounts ---


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


# --- states ---


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
