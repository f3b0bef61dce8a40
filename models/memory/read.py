"""How a site writes and reads its memory: the same lines run eagerly or print a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops as _registered  # noqa: F401 (registers the operations used below)
from .spec import Memory

# emit(target, *args) runs target on tensors, or adds a call of it to a graph and returns the node.
Emit = Callable[..., Any]
READS = ("dense", "policy")


@dataclass(frozen=True)
class SiteTensors:
    """One site's state, in the order `MemoryState.tensors()` lists it; tensors or graph nodes."""

    page_table: Any
    key_pages: Any
    value_pages: Any
    index: tuple[Any, ...] = ()

    @classmethod
    def take(cls, memory: Memory, flat: Sequence[Any]) -> SiteTensors:
        """The site's part of a flat list that starts with it."""
        count = 3 + len(memory.fields)
        if len(flat) < count:
            raise ValueError(f"{memory.name!r} has {count} state tensors, got {len(flat)}")
        return cls(flat[0], flat[1], flat[2], tuple(flat[3:count]))


def eager(target: Callable[..., Any], *args: Any) -> Any:
    """The emit that runs."""
    return target(*args)


def emit_write(
    emit: Emit,
    memory: Memory,
    site: SiteTensors,
    key: Any,
    value: Any,
    position: Any,
    lengths: Any,
) -> None:
    """Appends key [B,Hkv,n,Dk] and value [B,Hkv,n,Dv], and the records of pages they fill."""
    emit(
        torch.ops.memcompile.append_index.default,
        *(key, value, site.page_table, position, lengths, site.key_pages, site.value_pages),
        *(list(site.index), list(memory.fields)),
    )


def emit_read(
    emit: Emit,
    memory: Memory,
    site: SiteTensors,
    read: str,
    query: Any,
    position: Any,
    lengths: Any,
    *,
    scale: float,
    softcap: float,
    window: int,
    dtype: torch.dtype,
) -> Any:
    """Reads the memory for query [B,H,n,Dk], after the write of the same tokens.

    Args:
        read: "dense" reads every page; "policy" what the memory selects. A memory that selects
            nothing reads every page in both.
        window: the site's own sliding window, 0 = none.
        dtype: element type of the result, the query's own.

    Returns:
        [B, H, n, Dv].

    Raises:
        ValueError: an unknown read; the known ones are listed.
    """
    if read not in READS:
        raise ValueError(f"unknown read {read!r}; known: {', '.join(READS)}")

    def attend(pages: Any) -> Any:
        return emit(
            torch.ops.memcompile.attend.default,
            *(query, site.key_pages, site.value_pages, None, site.page_table, pages, False),
            *(position, lengths, scale, softcap, window, 1),
        )

    if read == "dense" or memory.score is None:
        both = attend(None)
    else:
        if window:
            raise ValueError(
                f"memory {memory.name!r} selects pages, but its site has a window of {window} "
                "tokens of its own; give such sites a memory that reads everything"
            )
        select = torch.ops.memcompile.score_select
        chosen = emit(
            select.page_logits if memory.compensate else select.default,
            *(query, list(site.index), list(memory.fields), site.page_table, position, lengths),
            *(memory.score.kind, memory.page_size, memory.sink_pages, memory.window_pages),
            *(memory.capacity, memory.budget_pages, memory.dense_below),
        )
        if memory.compensate:
            record = dict(zip(memory.fields, site.index, strict=True))
            pages, logits = (emit(operator.getitem, chosen, i) for i in (0, 1))
            both = emit(
                torch.ops.memcompile.attend.summaries,
                *(query, site.key_pages, site.value_pages, site.page_table, pages, logits),
                *(record["value_mean"], record["log_count"], position, lengths, scale, softcap),
            )
        else:
            both = attend(chosen)
    return emit(torch.ops.aten.to.dtype, emit(operator.getitem, both, 0), dtype)
