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
append_index.record_table(key, value, page_table, record_table, ...): append_index, whose records go
    to the rows of the index [R, width] that record_table [B,Hkv,columns] names for their pages: a
    page may be let go while its record stays.
append_index.fold(children, child_table, page_table, position, lengths, index, fields, child_size,
    ratio) writes a record, in page_table's row, for each group of `ratio` children of child_size
    tokens that the call's tokens complete, from the children's records (`children` and `index`: in
    the order of `fields`; child_table: their rows). std and radius need the mean beside them.
    radius is an upper bound; the others are the statistics of the group's tokens. Runs after what
    wrote the children.
score_select(query, index, fields, ..., score, page_size, sink_pages, window_pages, capacity,
    budget_pages, dense_below) -> int32 [B,Hkv,n,capacity]: logical pages, ascending, then -1.
    A row at token p in page o = p // page_size always has the pages < sink_pages and
    o - window_pages .. o; full pages with the highest scores fill it to budget_pages, ties to the
    lower page. It has every page 0 .. o when those are at most budget_pages or p < dense_below.
    Padding rows: all -1.
score_select.page_logits(the same) -> (pages, page_logits): also the product [B,H,n,pages] of each
    query with each page's mean key, in float32 (float64 for float64 queries); -inf where the row
    does not choose by score: sinks, window, pages the table lacks, rows that have every page.
score_select.among(query, index, fields, page_table, candidates, ..., score, page_size, sink_pages,
    window_pages, budget_pages) -> int32 [B,Hkv,n,budget_pages]: of a row's candidates [B,Hkv,n,S]
    (distinct logical pages, ascending, -1 anywhere), all up to the open page if those are at most
    budget_pages; else those < sink_pages and in o - window_pages .. o, filled with the full ones of
    the highest scores, ties to the lower page. Candidates without a row in the table count as none.
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
state_step(query [B,H,n,m], key [B,Hkv,n,m], value [B,Hkv,n,Dv], decay, beta, lengths, state, norm)
    -> (out [B,H,n,Dv], lse [B,H,n]) in float32 (float64 for float64 queries), as state
    [B,Hkv,m,Dv] and norm [B,Hkv,m] (or None) are, which it updates. Queries and keys are mapped to
    features already. decay: log-decay <= 0, None, [Hkv] or [B,Hkv,n]; beta: None for the additive
    write, or [B,Hkv,n] for the delta rule (without norm); both float32. Row after row, a row
    reading its own write: S *= e^decay, z *= e^decay; S += k v^T, z += k, or by the delta rule
    S += beta k (v - S^T k)^T. With norm out = S^T q / z.q and lse = log z.q (z.q <= 0: out 0, lse
    -inf), else out = S^T q and lse = 0. Padding rows write nothing and do not decay: out 0, lse
    -inf. For few rows: the state is read and written once.
state_chunk(the same) -> the same up to rounding, by chunks of rows: for many.
state_chunk.backward(query, key, value, decay, beta, lengths, grad_num [B,H,n,Dv], grad_den [B,H,n]
    or None) -> gradients of query, key, value, decay and beta, in float32 (float64 for float64
    queries), of a call that starts from zeros, given those of its S^T q and z.q; of what is None,
    an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import attention, levels, paged, records, recurrent

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


def _score_select_among(
    query: Tensor,
    index: list[Tensor],
    fields: list[str],
    page_table: Tensor,
    candidates: Tensor,
    position: Tensor,
    lengths: Tensor,
    score: str,
    page_size: int,
    sink_pages: int,
    window_pages: int,
    budget_pages: int,
) -> Tensor:
    return candidates.new_empty((*candidates.shape[:3], budget_pages))


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


def _state(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = paged.wide(query.dtype)
    out = query.new_empty((*query.shape[:3], value.shape[3]), dtype=dtype)
    return out, query.new_empty(query.shape[:3], dtype=dtype)


def _state_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dtype = paged.wide(query.dtype)
    inputs = (query, key, value, decay, beta)
    return tuple(query.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in inputs)


_STATE = (
    "(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, Tensor lengths, "
    "Tensor(a!) state, Tensor(b!)? norm) -> (Tensor out, Tensor lse)"
)

# name, with its overload: (schema, reference, fake kernel)
OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale, "
        "float softcap) -> Tensor",
        attention.attention,
        _attention,
    ),
    "append_index": (
        "(Tensor key, Tensor value, Tensor page_table, Tensor position, Tensor lengths, "
        "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)[] index, str[] fields) -> ()",
        records.append_index,
        _append_index,
    ),
    "append_index.record_table": (
        "(Tensor key, Tensor value, Tensor page_table, Tensor record_table, Tensor position, "
        "Tensor lengths, Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)[] index, "
        "str[] fields) -> ()",
        records.append_index_record_table,
        _append_index,
    ),
    "append_index.fold": (
        "(Tensor[] children, Tensor child_table, Tensor page_table, Tensor position, "
        "Tensor lengths, Tensor(a!)[] index, str[] fields, int child_size, int ratio) -> ()",
        levels.fold,
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
    "score_select.among": (
        "(Tensor query, Tensor[] index, str[] fields, Tensor page_table, Tensor candidates, "
        "Tensor position, Tensor lengths, str score, int page_size, int sink_pages, "
        "int window_pages, int budget_pages) -> Tensor",
        levels.score_select_among,
        _score_select_among,
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
    "state_step": (_STATE, recurrent.recurrence, _state),
    "state_chunk": (_STATE, recurrent.chunk, _state),
    "state_chunk.backward": (
        "(Tensor query, Tensor key, Tensor value, Tensor? decay, Tensor? beta, Tensor lengths, "
        "Tensor grad_num, Tensor? grad_den) -> (Tensor grad_query, Tensor grad_key, "
        "Tensor grad_value, Tensor grad_decay, Tensor grad_beta)",
        recurrent.chunk_backward,
        _state_backward,
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
