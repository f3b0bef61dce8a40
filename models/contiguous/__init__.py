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

from .accounts import account, evict, table_of_resident, within_page
from .pages import (
    FAR,
    LOWEST,
    columns_of,
    iota,
    largest,
    pages_in,
    put_if_any,
    put_rows,
    put_where,
    query_rows,
    rows_of,
    standing,
)
from .reading import attend, attend_page_lse, summaries
from .selecting import page_logits, score_select, score_select_among
from .states import additive_state, entering
from .tables import as_pages, page_table, page_table_under
from .writing import append, fold, records

__all__ = [
    "FAR",
    "LOWEST",
    "account",
    "additive_state",
    "append",
    "as_pages",
    "attend",
    "attend_page_lse",
    "columns_of",
    "entering",
    "evict",
    "fold",
    "iota",
    "largest",
    "page_logits",
    "page_table",
    "page_table_under",
    "pages_in",
    "put_if_any",
    "put_rows",
    "put_where",
    "query_rows",
    "records",
    "rows_of",
    "score_select",
    "score_select_among",
    "standing",
    "summaries",
    "table_of_resident",
    "within_page",
]
