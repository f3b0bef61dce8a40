"""The memory operations: schemas, fake kernels, and the references that run where no kernel does.

Importing this module registers namespace `memcompile` once. Generated kernels are registered for a
device key and win over these references, which hold for any device.

Shapes: B sequences, n new tokens, H query heads, Hkv KV heads (H % Hkv == 0; query head h reads KV
head h // (H // Hkv)), pools of P pages with s slots. `position` and `lengths` are int32 [B]: row i
of sequence b stands at token position[b] + i and is padding when i >= lengths[b]. `page_table` is
int32 [B, Hkv, pages], -1 where empty. Pools hold garbage in unwritten slots, and no result depends
on it.

attention(query [B,H,n,Dk], key [B,Hkv,m,Dk], value [B,Hkv,m,Dv], mask, is_causal, scale, softcap)
    -> [B,H,n,Dv]. The normal form of a model's attention, without memory. mask broadcasts to
    [B,H,n,m]: bool (True = visible) or added to the logits. softcap 0 = none. is_causal: n == m.
append_index(key [B,Hkv,n,Dk], value, ..., key_pages [P,s,Dk], value_pages [P,s,Dv], index, fields)
    writes the tokens, and the records of the pages that they fill, from all of the page's keys: the
    result does not depend on how tokens were split into calls. The open page has no record; none
    is read before its page is full.
score_select(query, index, fields, ..., score, page_size, sink_pages, window_pages, capacity,
    budget_pages, dense_below) -> int32 [B,Hkv,n,capacity]: logical pages, ascending, then -1.
    A row at token p in page o = p // page_size always has the pages < sink_pages and
    o - window_pages .. o; full pages with the highest scores fill it to budget_pages, ties to the
    lower page. It has every page 0 .. o when those are at most budget_pages or p < dense_below.
    Padding rows: all -1.
score_select.page_logits(the same) -> (pages, page_logits): also the product [B,H,n,pages] of each
    query with each page's mean key, in float32 (float64 for float64 queries); -inf where the row
    does not choose by score: sinks, window, pages the table lacks, rows that have every page.
attend(query, key_pages, value_pages, bias, page_table, pages, exclude, ..., window, span)
    -> (out [B,H,n,Dv], lse [B,H,n]) in float32 (float64 for float64 queries). pages None: every
    page of the table; else int32 [B,Hkv,n,S] of distinct logical pages, -1 = none: only those, or
    with exclude every page but those. Slot c of logical page g stands for tokens
    (g*s + c)*span .. (g*s + c + 1)*span - 1 and is visible at token p when its last token t has
    t <= p (and p - t < window, window > 0). bias [P,s] is added to the logits after softcap. Rows
    that see nothing, padding included: out 0, lse -inf.
attend.page_lse(the same) -> (out, lse, page_lse): also the log-sum-exp [B,H,n,S] of each listed
    page read alone (without a list, or with exclude: [B,H,n,pages], every page of the table), -inf
    where the row sees none of it. exp(page_lse - lse) is the attention mass that a page received.
attend.summaries(query, key_pages, value_pages, page_table, pages, page_logits [B,H,n,pages],
    page_values [P,Dv], page_bias [P,1], ..., scale, softcap) -> (out, lse): reads the listed pages,
    and every other full page of the table as one key: page_logits times scale is its logit before
    softcap and bias, page_values its value.
combine(outs, lses) -> (out, lse): merges reads of disjoint keys exactly, by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import paged, records

NAMESPACE = "memcompile"
_library = torch.library.Library(NAMESPACE, "DEF")


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


def _append_index(*args: Any) -> None:
    return None


def _score_select(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    page_table: Tensor,
    position: Tensor,
    lengths: Tensor,
    score: str,
    page_size: int,
    sink_pages: int,
    window_pages: int,
    capacity: int,
    budget_pages: int,
    dense_below: int,
) -> Tensor:
    shape = (query.shape[0], page_table.shape[1], query.shape[2], capacity)
    return query.new_empty(shape, dtype=torch.int32)


def _attend(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    dtype = paged.wide(query.dtype)
    out = query.new_empty((*query.shape[:3], value_pages.shape[2]), dtype=dtype)
    return out, query.new_empty(query.shape[:3], dtype=dtype)


def _score_select_page_logits(
    query: Tensor, index: list[Tensor], fields: list[str], page_table: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    pages = _score_select(query, index, fields, page_table, *rest)
    shape = (*query.shape[:3], page_table.shape[2])
    return pages, query.new_empty(shape, dtype=paged.wide(query.dtype))


def _attend_page_lse(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    bias: Tensor | None,
    page_table: Tensor,
    pages: Tensor | None,
    exclude: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _attend(query, key_pages, value_pages)
    count = page_table.shape[2] if pages is None or exclude else pages.shape[3]
    return out, lse, lse.new_empty((*lse.shape, count))


def _combine(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


# name, with its overload: (schema, reference, fake kernel)
OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale, "
        "float softcap) -> Tensor",
        paged.attention,
        _attention,
    ),
    "append_index": (
        "(Tensor key, Tensor value, Tensor page_table, Tensor position, Tensor lengths, "
        "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)[] index, str[] fields) -> ()",
        records.append_index,
        _append_index,
    ),
    "score_select": (
        "(Tensor query, Tensor[] index, str[] fields, Tensor page_table, Tensor position, "
        "Tensor lengths, str score, int page_size, int sink_pages, int window_pages, "
        "int capacity, int budget_pages, int dense_below) -> Tensor",
        records.score_select,
        _score_select,
    ),
    "score_select.page_logits": (
        "(Tensor query, Tensor[] index, str[] fields, Tensor page_table, Tensor position, "
        "Tensor lengths, str score, int page_size, int sink_pages, int window_pages, "
        "int capacity, int budget_pages, int dense_below) -> (Tensor pages, Tensor page_logits)",
        records.score_select_page_logits,
        _score_select_page_logits,
    ),
    "attend": (
        "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor? bias, Tensor page_table, "
        "Tensor? pages, bool exclude, Tensor position, Tensor lengths, float scale, "
        "float softcap, int window, int span) -> (Tensor out, Tensor lse)",
        paged.attend,
        _attend,
    ),
    "attend.page_lse": (
        "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor? bias, Tensor page_table, "
        "Tensor? pages, bool exclude, Tensor position, Tensor lengths, float scale, "
        "float softcap, int window, int span) -> (Tensor out, Tensor lse, Tensor page_lse)",
        paged.attend_page_lse,
        _attend_page_lse,
    ),
    "attend.summaries": (
        "(Tensor query, Tensor key_pages, Tensor value_pages, Tensor page_table, Tensor pages, "
        "Tensor page_logits, Tensor page_values, Tensor page_bias, Tensor position, "
        "Tensor lengths, float scale, float softcap) -> (Tensor out, Tensor lse)",
        paged.attend_summaries,
        _attend,
    ),
    "combine": (
        "(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)",
        paged.combine,
        _combine,
    ),
}

for _name, (_schema, _reference, _fake) in OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)


def operator(name: str) -> torch._ops.OpOverload:
    """The operator of an entry of OPS."""
    packet, _, overload = name.partition(".")
    found: torch._ops.OpOverload = getattr(
        getattr(torch.ops.memcompile, packet), overload or "default"
    )
    return found


# What kernels are generated for: the operations on a memory.
FAMILIES = {operator(name): name for name in OPS if name != "attention"}
