"""The operations on contiguous state as operators, so that a graph of them can be exported.

Namespace `memcompile_portable`. Their texts, `memory/contiguous.py`, are what they mean on every
device, and what they decompose to where a target has no node of its own for them (`TEXTS`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import contiguous
from .memory.paged import combine

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


_SELECT = (
    "(Tensor query, Tensor[] index, str[] fields, Tensor position, Tensor lengths, str score, "
    "int size, int sink_pages, int window_pages, int capacity, int budget_pages, int dense_below)"
)

# name, with its overload: (schema, text)
OPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "largest": (
        "(Tensor scores, int count) -> (Tensor values, Tensor order)",
        contiguous.largest,
    ),
    "put_rows": ("(Tensor cache, Tensor at, Tensor new) -> Tensor", contiguous.put_rows),
    "append_index": (
        "(Tensor key, Tensor value, Tensor position, Tensor lengths, Tensor keys, Tensor values, "
        "Tensor[] index, str[] fields, int size, int pinned, int reach, int record_pinned) "
        "-> Tensor[]",
        _append_index,
    ),
    "fold": (
        "(Tensor new, Tensor[] children, Tensor position, Tensor lengths, Tensor[] index, "
        "str[] fields, int child_size, int ratio, int child_pinned, int pinned) -> Tensor[]",
        contiguous.fold,
    ),
    "score_select": (f"{_SELECT} -> Tensor", contiguous.score_select),
    "score_select.page_logits": (
        f"{_SELECT} -> (Tensor pages, Tensor page_logits)",
        _page_logits,
    ),
    "score_select.among": (
        "(Tensor query, Tensor[] index, str[] fields, Tensor candidates, Tensor position, "
        "Tensor lengths, str score, int size, int sink_pages, int window_pages, "
        "int budget_pages, int pinned) -> Tensor",
        contiguous.score_select_among,
    ),
    "attend": (
        "(Tensor query, Tensor keys, Tensor values, Tensor? bias, Tensor? pages, bool exclude, "
        "Tensor position, Tensor lengths, float scale, float softcap, int window, int size, "
        "int slots, int pinned) -> (Tensor out, Tensor lse)",
        contiguous.attend,
    ),
    "attend.summaries": (
        "(Tensor query, Tensor keys, Tensor values, Tensor pages, Tensor page_logits, "
        "Tensor value_mean, Tensor log_count, Tensor position, Tensor lengths, float scale, "
        "float softcap, int size) -> (Tensor out, Tensor lse)",
        contiguous.summaries,
    ),
    "attend.page_lse": (
        "(Tensor query, Tensor keys, Tensor values, Tensor account, Tensor position, "
        "Tensor lengths, float scale, float softcap, int window, int size) "
        "-> (Tensor out, Tensor lse, Tensor page_lse)",
        contiguous.attend_page_lse,
    ),
    "evict": (
        "(Tensor account, Tensor position, Tensor lengths, int size, int sink_pages, "
        "int window_pages, int budget_pages) -> Tensor",
        contiguous.evict,
    ),
    "account": (
        "(Tensor account, Tensor page_lse, Tensor lse, Tensor lengths, float decay) -> Tensor",
        contiguous.account,
    ),
    "combine": ("(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)", combine),
    "entering": (
        "(Tensor query, Tensor keys, Tensor values, Tensor position, Tensor lengths, int window, "
        "int size, int pinned) -> (Tensor key, Tensor value, Tensor live)",
        contiguous.entering,
    ),
    "additive_state": (
        "(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor lengths, Tensor state, "
        "Tensor? norm) -> Tensor[]",
        contiguous.additive_state,
    ),
}


def operator(name: str) -> torch._ops.OpOverload:
    """The operator of an entry of OPS."""
    packet, _, overload = name.partition(".")
    found: torch._ops.OpOverload = getattr(
        getattr(torch.ops.memcompile_portable, packet), overload or "default"
    )
    return found


for _name, (_schema, _text) in OPS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _text, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _text, lib=_library)

# What each operator decomposes to, for `ExportedProgram.run_decompositions`.
TEXTS: dict[Any, Callable[..., Any]] = {operator(name): text for name, (_, text) in OPS.items()}
