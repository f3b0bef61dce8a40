"""Where pages lie in contiguous state, and rows taken from and put into it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from ..memory.paged import wide

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
    """Rows of [B, Hkv, X, ...] at [B, Hkv, ...] (int64): [B, Hkv, ..., ...]; as `iota`, asks
    stand-ins."""
    if has_torch_function_variadic(tensor, at):
        made: Tensor = handle_torch_function(rows_of, (tensor, at), tensor, at)
        return made
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


def put_if_any(
    counts: Tensor, pools: list[Tensor], compute: Callable[[], tuple[Tensor, list[Tensor]]]
) -> list[Tensor]:
    """`put_rows` of what `compute` gives, columns [B, t] and the rows [B, Hkv, t, D] of each pool,
    where any of the counts, int64 [B], is not 0; the pools as they are otherwise.

    As `iota`, asks stand-ins: they may not compute at all. Nothing else here may hang on the values
    of tensors: it is computed always, and otherwise what is there is written again.
    """
    if has_torch_function_unary(counts):
        given: list[Tensor] = handle_torch_function(put_if_any, (counts,), counts, pools, compute)
        return given
    return put_where(counts.amax(0) > 0, pools, *compute())


def put_where(
    some: Tensor, pools: list[Tensor], column: Tensor, rows: list[Tensor]
) -> list[Tensor]:
    """`put_if_any` of what was computed, where `some`, a bool, holds."""
    whole = column[:, None].expand(-1, pools[0].shape[1], -1)
    put = torch.ops.memcompile_portable.put_rows
    return [
        put(pool, column, torch.where(some, row, rows_of(pool, whole)))
        for pool, row in zip(pools, rows, strict=True)
    ]


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of the last axis and where they stand, ties to the lower: TopK."""
    values, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    # Copies: an operator may not give views of what it gives beside them.
    return values[..., :count].clone(), order[..., :count].clone()


def query_rows(query: Tensor, heads: int) -> Tensor:
    """[B, H, n, D] -> [B, Hkv, G, n, D] in the summing type."""
    rows: Tensor = query.to(wide(query.dtype)).unflatten(1, (heads, -1))
    return rows


def tokens_of(position: Tensor, n: int) -> Tensor:
    """The token [B, n] of each row, int64, were all of them valid."""
    return position.long()[:, None] + iota(n, position)


def standing(position: Tensor, lengths: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The token [B, n] of each row, int64, and which rows are valid, bool [B, n]."""
    return tokens_of(position, n), iota(n, position) < lengths.long()[:, None]
