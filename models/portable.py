"""The operations on contiguous state as operators, so that a graph of them can be exported.

Namespace `memcompile_portable`. Their texts, `contiguous/`, are what they mean on every
device, and what they decompose to where a target has no node of its own for them (`TEXTS`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import contiguous
from .contiguous import fused
from .memory.paged import combine, wide

NAMESPACE = "memcompile_portable"
_library = torch.library.Library(NAMESPACE, "DEF")


def _append_index(
    key: Tensor,
    value: Tensor,
    position: Tensor,
    lengths: Tensor,
    keys: Tensor,
    values: Tensor,
    index: list[Tensor],
    fields: list[str],
    size: int,
    pinned: int,
    reach: int,
    record_pinned: int,
) -> list[Tensor]:
    where = (position, lengths, size, pinned, reach)
    keys, values = (
        contiguous.append(cache, new, *where) for cache, new in ((keys, key), (values, value))
    )
    if not fields:
        return [keys, values]
    made = contiguous.records(
        key, position, lengths, keys, values, index, fields, size, pinned, record_pinned
    )
    return [keys, values, *made]


def _page_logits(
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
) -> tuple[Tensor, Tensor]:
    held = (sink_pages, window_pages)
    pages = contiguous.score_select(
        *(query, index, fields, position, lengths, score, size, *held),
        *(capacity, budget_pages, dense_below),
    )
    logits = contiguous.page_logits(
        *(query, index[fields.index("mean")], position, lengths, size, *held),
        *(budget_pages, dense_below),
    )
    return pages, logits


# --- shapes: what the operators give, without running their texts, of which some are long ---


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]


def _append_index_shapes(
    key: Tensor, value: Tensor, position: Tensor, lengths: Tensor, keys: Tensor, values: Tensor,
    index: list[Tensor], *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return _like([keys, values, *index])


def _fold_shapes(
    new: Tensor, children: list[Tensor], position: Tensor, lengths: Tensor, index: list[Tensor],
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return _like(index)


def _pages(query: Tensor, index: list[Tensor], count: int) -> Tensor:
    shape = (query.shape[0], index[0].shape[1], query.shape[2], count)
    return query.new_empty(shape, dtype=torch.int64)


def _select_shapes(
    query: Tensor, index: list[Tensor], fields: list[str], position: Tensor, lengths: Tensor,
    score: str, size: int, sink_pages: int, window_pages: int, capacity: int, *rest: int,
) -> Tensor:  # fmt: skip
    return _pages(query, index, capacity)


def _page_logits_shapes(
    query: Tensor, index: list[Tensor], fields: list[str], position: Tensor, lengths: Tensor,
    score: str, size: int, sink_pages: int, window_pages: int, capacity: int, *rest: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (*query.shape[:3], index[0].shape[2])
    return (
        _pages(query, index, capacity),
        query.new_empty(shape, dtype=wide(query.dtype)),
    )


def _among_shapes(
    query: Tensor, index: list[Tensor], fields: list[str], candidates: Tensor, position: Tensor,
    lengths: Tensor, score: str, size: int, sink_pages: int, window_pages: int, budget_pages: int,
    pinned: int,
) -> Tensor:  # fmt: skip
    return _pages(query, index, budget_pages)


def _attend_shapes(
    query: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = wide(query.dtype)
    return (
        query.new_empty((*query.shape[:3], values.shape[3]), dtype=dtype),
        query.new_empty(query.shape[:3], dtype=dtype),
    )


def _page_lse_shapes(
    query: Tensor, keys: Tensor, values: Tensor, account: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*query.shape[:3], account.shape[2])
    return (
        *_attend_shapes(query, keys, values),
        query.new_empty(shape, dtype=wide(query.dtype)),
    )


def _account_shapes(account: Tensor, *rest: Any) -> Tensor:
    return _like([account])[0]


def _entering_shapes(
    query: Tensor, keys: Tensor, values: Tensor, position: Tensor, lengths: Tensor, *rest: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, n = query.shape[0], query.shape[2]
    key, value = (x.new_empty((batch, x.shape[1], n, x.shape[3])) for x in (keys, values))
    return key, value, query.new_empty((batch, n), dtype=torch.bool)


def _largest_shapes(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (*scores.shape[:-1], count)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def _put_rows_shapes(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    return _like([cache])[0]


def _grouped_shapes(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, lengths: Tensor, keys: Tensor,
    values: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, _ = _attend_shapes(query, keys, values)
    new_keys, new_values = _like([keys, values])
    return out, new_keys, new_values


def _page_records_shapes(
    new: Tensor, position: Tensor, lengths: Tensor, keys: Tensor, values: Tensor,
    index: list[Tensor], *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return _like(index)


def _listed_shapes(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return _attend_shapes(query, key, value)[0]


def _delta_shapes(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, beta: Tensor, lengths: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The text goes row by row, and the number of rows is not known.
    dtype = wide(query.dtype)
    out = query.new_empty((*query.shape[:3], value.shape[3]), dtype=dtype)
    return out, query.new_empty(query.shape[:3], dtype=dtype), _like([state])[0]


_SELECT = (
    "(Tensor query, Tensor[] index, str[] fields, Tensor position, Tensor lengths, str score, "
    "int size, int sink_pages, int window_pages, int capacity, int budget_pages, int dense_below)"
)

# name, with its overload: (schema, text, what gives its shapes)
OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "largest": (
        "(Tensor scores, int count) -> (Tensor values, Tensor order)",
        contiguous.largest,
        _largest_shapes,
    ),
    "put_rows": (
        "(Tensor cache, Tensor at, Tensor new) -> Tensor",
        contiguous.put_rows,
        _put_rows_shapes,
    ),
    "append_index": (
        "(Tensor key, Tensor value, Tensor position, Tensor lengths, Tensor keys, Tensor values, "
        "Tensor[] index, str[] fields, int size, int pinned, int reach, int record_pinned) "
        "-> Tensor[]",
        _append_index,
        _append_index_shapes,
    ),
    "fold": (
        "(Tensor new, Tensor[] children, Tensor position, Tensor lengths, Tensor[] index, "
        "str[] fields, int child_size, int ratio, int child_pinned, int pinned) -> Tensor[]",
        contiguous.fold,
        _fold_shapes,
    ),
    "score_select": (f"{_SELECT} -> Tensor", contiguous.score_select, _select_shapes),
    "score_select.page_logits": (
        f"{_SELECT} -> (Tensor pages, Tensor page_logits)",
        _page_logits,
        _page_logits_shapes,
    ),
    "score_select.among": (
        "(Tensor query, Tensor[] index, str[] fields, Tensor candidates, Tensor position, "
        "Tensor lengths, str score, int size, int sink_pages, int window_pages, "
        "int budget_pages, int pinned) -> Tensor",
        contiguous.score_select_among,
        _among_shapes,
    ),
    "attend": (
        "(Tensor query, Tensor keys, Tensor values, Tensor? bias, Tensor? pages, bool exclude, "
        "Tensor position, Tensor lengths, float scale, float softcap, int window, int size, "
        "int slots, int pinned) -> (Tensor out, Tensor lse)",
        contiguous.attend,
        _attend_shapes,
    ),
    "attend.summaries": (
        "(Tensor query, Tensor keys, Tensor values, Tensor pages, Tensor page_logits, "
        "Tensor value_mean, Tensor log_count, Tensor position, Tensor lengths, float scale, "
        "float softcap, int size) -> (Tensor out, Tensor lse)",
        contiguous.summaries,
        _attend_shapes,
    ),
    "attend.page_lse": (
        "(Tensor query, Tensor keys, Tensor values, Tensor account, Tensor position, "
        "Tensor lengths, float scale, float softcap, int window, int size) "
        "-> (Tensor out, Tensor lse, Tensor page_lse)",
        contiguous.attend_page_lse,
        _page_lse_shapes,
    ),
    "evict": (
        "(Tensor account, Tensor position, Tensor lengths, int size, int sink_pages, "
        "int window_pages, int budget_pages) -> Tensor",
        contiguous.evict,
        _account_shapes,
    ),
    "account": (
        "(Tensor account, Tensor page_lse, Tensor lse, Tensor lengths, float decay) -> Tensor",
        contiguous.account,
        _account_shapes,
    ),
    "combine": ("(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)", combine, combine),
    "entering": (
        "(Tensor query, Tensor keys, Tensor values, Tensor position, Tensor lengths, int window, "
        "int size, int pinned) -> (Tensor key, Tensor value, Tensor live)",
        contiguous.entering,
        _entering_shapes,
    ),
    "additive_state": (
        "(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor lengths, Tensor state, "
        "Tensor? norm) -> Tensor[]",
        contiguous.additive_state,
        contiguous.additive_state,
    ),
    # Given only to runtimes that have them as one (`passes.fuse_grouped`, `passes.fuse_listed`).
    "grouped_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor position, Tensor lengths, Tensor keys, "
        "Tensor values, float scale, float softcap, int window, int size, int pinned, int reach) "
        "-> (Tensor out, Tensor new_keys, Tensor new_values)",
        fused.grouped_attention,
        _grouped_shapes,
    ),
    "page_records": (
        "(Tensor new, Tensor position, Tensor lengths, Tensor keys, Tensor values, "
        "Tensor[] index, str[] fields, int size, int pinned, int record_pinned) -> Tensor[]",
        contiguous.records,
        _page_records_shapes,
    ),
    "listed_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor pages, Tensor position, Tensor lengths, "
        "Tensor keys, Tensor values, float scale, int size) -> Tensor",
        fused.listed_attention,
        _listed_shapes,
    ),
    "delta_state": (
        "(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor beta, Tensor lengths, "
        "Tensor state) -> (Tensor out, Tensor lse, Tensor new_state)",
        fused.delta_state,
        _delta_shapes,
    ),
}


def operator(name: str) -> torch._ops.OpOverload:
    """The operator of an entry of OPS."""
    packet, _, overload = name.partition(".")
    found: torch._ops.OpOverload = getattr(
        getattr(torch.ops.memcompile_portable, packet), overload or "default"
    )
    return found


for _name, (_schema, _text, _shapes) in OPS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _text, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _shapes, lib=_library)

# What each operator decomposes to, for `ExportedProgram.run_decompositions`.
TEXTS: dict[Any, Callable[..., Any]] = {operator(name): text for name, (_, text, _) in OPS.items()}
