"""How a memory is read from a cache that somebody else owns: the same lines run eagerly or print a
graph. `passes.read_cached` says how pages lie in such a cache."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .read import Emit, emit_read
from .site import SiteTensors
from .spec import Memory


def record_sizes(memory: Memory) -> tuple[int, ...]:
    """Tokens that each kind of record of a memory stands for."""
    return memory.levels or ((memory.page_size,) if memory.fields else ())


def emit_cached_read(
    emit: Emit,
    memory: Memory,
    query: Any,
    caches: tuple[Any, Any],
    sizes: tuple[Sequence[Any], Sequence[Any]],
    tables: Mapping[str, Any],
    records: Mapping[int, tuple[Any, ...]],
    *,
    aligned: bool,
    scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[Any, Any]:
    """Reads caches [B, Hkv, L, D], the new tokens in them, for query [B, H, n, Dk].

    Args:
        caches: keys and values, their rows contiguous.
        sizes: their sizes: numbers, or nodes where they are symbolic.
        tables: what the host keeps, by name: position, lengths, page_table, table_{size} of each
            record, tail_position and tail_table unless aligned.
        records: by their size, each field of the memory.
        aligned: the layout of pages.
        dtype: element type of the result.

    Returns:
        as `read.emit_read`.
    """
    size, levelled = memory.page_size, bool(memory.levels)
    keys, values = (
        _pool(emit, cache, shape, size, aligned) for cache, shape in zip(caches, sizes, strict=True)
    )
    site = SiteTensors(
        tables["page_table"],
        keys,
        values,
        index=() if levelled else records.get(size, ()),
        levels=tuple((tables[f"table_{s}"], records[s]) for s in memory.levels),
        record_table=None if aligned or levelled else tables.get(f"table_{size}"),
    )
    beside: list[tuple[Any, Any]] = []
    if not aligned:
        # The keys behind the last whole page, in pages of one.
        single = [
            emit(torch.ops.aten.view.default, cache, [-1, 1, shape[3]])
            for cache, shape in zip(caches, sizes, strict=True)
        ]
        tail = emit(
            torch.ops.memcompile.attend.default,
            *(query, *single, None, tables["tail_table"], None, False),
            *(tables["tail_position"], tables["lengths"], scale, softcap, 0, 1),
        )
        beside.append((emit(operator.getitem, tail, 0), emit(operator.getitem, tail, 1)))
    return emit_read(
        emit,
        memory,
        site,
        "policy",
        *(query, tables["position"], tables["lengths"]),
        scale=scale,
        softcap=softcap,
        window=0,
        dtype=dtype,
        beside=beside,
    )


def _pool(emit: Emit, cache: Any, sizes: Sequence[Any], page_size: int, aligned: bool) -> Any:
    """A cache as pages [P, page_size, D], without a copy."""
    batch, heads, length, width = sizes
    if aligned:
        return emit(torch.ops.aten.view.default, cache, [-1, page_size, width])
    rows = _times(emit, _times(emit, batch, heads), length)
    pages = (
        rows + (1 - page_size) if isinstance(rows, int) else emit(operator.add, rows, 1 - page_size)
    )
    strides = [width, width, 1]
    return emit(torch.ops.aten.as_strided.default, cache, [pages, page_size, width], strides)


def _times(emit: Emit, left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    return emit(operator.mul, left, right)
