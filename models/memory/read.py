"""How a site writes and reads its memory: the same lines run eagerly or print a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import ops as _registered  # noqa: F401 (registers the operations used below)
from . import lists
from .site import SiteTensors
from .spec import Memory
from .state import joined, mapped

# emit(target, *args) runs target on tensors, or adds a call of it to a graph and returns the node.
Emit = Callable[..., Any]
READS = ("dense", "policy")


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
    append, fields = torch.ops.memcompile.append_index, [*memory.fields]
    pools = (site.key_pages, site.value_pages)
    if not memory.levels:
        emit(
            append.default,
            *(key, value, site.page_table, position, lengths, *pools, [*site.index], fields),
        )
        return
    table, records = site.levels[0]
    emit(
        append.record_table,
        *(key, value, site.page_table, table, position, lengths, *pools, [*records], fields),
    )
    for number in range(1, len(memory.levels)):
        children, size = (table, records), memory.levels[number - 1]
        table, records = site.levels[number]
        emit(
            append.fold,
            *([*children[1]], children[0], table, position, lengths, [*records], fields),
            *(size, memory.levels[number] // size),
        )


@dataclass(frozen=True)
class Query:
    """What a read is for: query [B,H,n,Dk] at position [B], lengths [B] rows of it valid."""

    query: Any
    position: Any
    lengths: Any
    scale: float
    softcap: float


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
    beside: Sequence[tuple[Any, Any]] = (),
) -> tuple[Any, Any]:
    """Reads the memory for query [B,H,n,Dk], after the write of the same tokens.

    Args:
        read: "dense" reads every page that is there; "policy" what the memory selects. A memory
            that selects nothing reads every page in both.
        window: the site's own sliding window, 0 = none.
        dtype: element type of the result, the query's own.
        beside: reads (out, lse) of keys that the pages do not hold, for the same softmax.

    Returns:
        [B, H, n, Dv], and where the memory leaves out pages, those that were read: an int tensor
        [B, Hkv, n, S] with negative numbers where there is none; else None.

    Raises:
        ValueError: an unknown read; the known ones are listed.
    """
    if read not in READS:
        raise ValueError(f"unknown read {read!r}; known: {', '.join(READS)}")
    asked = Query(query, position, lengths, scale, softcap)
    if window and (memory.selects or memory.state) and read == "policy":
        raise ValueError(
            f"memory {memory.name!r} selects pages or keeps a state, but its site has a window of "
            f"{window} tokens of its own; give such sites a memory that reads everything"
        )
    pages = None
    if memory.state is not None:
        if beside:
            raise ValueError(f"memory {memory.name!r} keeps a state, which no other read may join")
        out = _read_state(emit, memory, site, read, asked)
        return emit(torch.ops.aten.to.dtype, out, dtype), None
    if memory.account is not None:
        if beside:
            raise ValueError(f"memory {memory.name!r} keeps an account of its own pages alone")
        reads, pages = _read_and_account(emit, memory, site, asked)
    elif read == "dense" or memory.select is None:
        reads = [_attend(emit, site, asked, window=window)]
    elif memory.levels:
        reads, pages = _read_levels(emit, memory, site, asked)
    elif memory.score is None:
        pages = _held(emit, site, asked, memory.page_size, memory.sink_pages, memory.window_pages)
        reads = [_attend(emit, site, asked, pages)]
    else:
        reads, pages = _read_selected(emit, memory, site, asked)
    out = _merged(emit, reads, beside)
    return emit(torch.ops.aten.to.dtype, out, dtype), pages


def _merged(emit: Emit, reads: Sequence[Any], beside: Sequence[tuple[Any, Any]]) -> Any:
    """One softmax over the keys of several reads."""
    if len(reads) == 1 and not beside:
        return emit(operator.getitem, reads[0], 0)
    parts = [[emit(operator.getitem, read, i) for read in reads] for i in (0, 1)]
    outs, lses = (part + [read[i] for read in beside] for i, part in enumerate(parts))
    merged = emit(torch.ops.memcompile.combine.default, outs, lses)
    return emit(operator.getitem, merged, 0)


def _attend(
    emit: Emit,
    site: SiteTensors,
    asked: Query,
    pages: Any = None,
    *,
    window: int = 0,
    page_lse: bool = False,
) -> Any:
    """Exact pages: the listed, or every one that is there."""
    attend = torch.ops.memcompile.attend
    return emit(
        attend.page_lse if page_lse else attend.default,
        *(asked.query, site.key_pages, site.value_pages, None, site.page_table, pages, False),
        *(asked.position, asked.lengths, asked.scale, asked.softcap, window, 1),
    )


def _held(emit: Emit, site: SiteTensors, asked: Query, size: int, sinks: int, window: int) -> Any:
    return emit(
        lists.held,
        *(asked.query, site.page_table, asked.position, asked.lengths, size, sinks, window),
    )


def _attend_records(
    emit: Emit,
    asked: Query,
    record: Mapping[str, Any],
    table: Any,
    pages: Any,
    exclude: bool,
    size: int,
) -> Any:
    """Records of `size` tokens, each as one key: the listed, or every one but those."""
    return emit(
        torch.ops.memcompile.attend.default,
        asked.query,
        *(emit(torch.ops.aten.unsqueeze.default, record[f], 1) for f in KEY_AND_VALUE),
        *(record["log_count"], table, pages, exclude),
        *(asked.position, asked.lengths, asked.scale, asked.softcap, 0, size),
    )


def _read_selected(
    emit: Emit, memory: Memory, site: SiteTensors, asked: Query
) -> tuple[list[Any], Any]:
    """The best pages, and with compensation the others by their records."""
    assert memory.score is not None
    select = torch.ops.memcompile.score_select
    apart = site.record_table is not None
    table = site.record_table if apart else site.page_table
    fused = memory.compensate and not apart
    chosen = emit(
        select.page_logits if fused else select.default,
        *(asked.query, list(site.index), list(memory.fields), table),
        *(asked.position, asked.lengths, memory.score.kind, memory.page_size),
        *(memory.sink_pages, memory.window_pages, memory.capacity, memory.budget_pages),
        memory.dense_below,
    )
    if not memory.compensate:
        return [_attend(emit, site, asked, chosen)], chosen
    record = dict(zip(memory.fields, site.index, strict=True))
    if apart:
        others = _attend_records(emit, asked, record, table, chosen, True, memory.page_size)
        return [_attend(emit, site, asked, chosen), others], chosen
    pages, logits = (emit(operator.getitem, chosen, i) for i in (0, 1))
    both = emit(
        torch.ops.memcompile.attend.summaries,
        *(asked.query, site.key_pages, site.value_pages, site.page_table, pages, logits),
        *(record["value_mean"], record["log_count"], asked.position, asked.lengths),
        *(asked.scale, asked.softcap),
    )
    return [both], pages


def _read_levels(
    emit: Emit, memory: Memory, site: SiteTensors, asked: Query
) -> tuple[list[Any], Any]:
    """From the coarsest level down: what is not opened is read as one key, the rest a level finer.

    Every token is read once, since a record is either opened or read.
    """
    reads, candidates, opened = [], None, None
    for number in reversed(range(len(memory.levels))):
        level, (table, records) = memory.level(number), site.levels[number]
        if opened is not None:
            ratio = memory.levels[number + 1] // level.size
            candidates = emit(lists.children, opened, ratio, asked.position, level.size)
        opened = _opened(emit, memory, site, asked, number, candidates)
        left = opened if candidates is None else emit(lists.without, candidates, opened)
        record = dict(zip(memory.fields, records, strict=True))
        every = candidates is None
        reads.append(_attend_records(emit, asked, record, table, left, every, level.size))
    reads.append(_attend(emit, site, asked, opened))
    return reads, opened


KEY_AND_VALUE = ("mean", "value_mean")


def _opened(
    emit: Emit, memory: Memory, site: SiteTensors, asked: Query, number: int, candidates: Any
) -> Any:
    """The records of a level whose tokens are read finer: int32 [B, Hkv, n, budget]."""
    level, (table, records) = memory.level(number), site.levels[number]
    if memory.score is None:
        return _held(emit, site, asked, level.size, level.sinks, level.window)
    select = torch.ops.memcompile.score_select
    among = () if candidates is None else (candidates,)
    capacity = (level.budget,) if candidates is None else ()
    below = (0,) if candidates is None else ()
    return emit(
        select.default if candidates is None else select.among,
        *(asked.query, list(records), list(memory.fields), table, *among),
        *(asked.position, asked.lengths, memory.score.kind, level.size),
        *(level.sinks, level.window, *capacity, level.budget, *below),
    )


def _read_and_account(
    emit: Emit, memory: Memory, site: SiteTensors, asked: Query
) -> tuple[list[Any], Any]:
    """Every page that is left; the mass each received is added to its account."""
    assert memory.account is not None
    read = _attend(emit, site, asked, page_lse=True)
    lse, page_lse = (emit(operator.getitem, read, i) for i in (1, 2))
    pages = emit(
        lists.account,
        *(site.account, page_lse, lse, asked.lengths, memory.account.decay),
    )
    return [read], pages


def _read_state(emit: Emit, memory: Memory, site: SiteTensors, read: str, asked: Query) -> Any:
    """The window exactly, and the state, which takes in the tokens that leave it."""
    assert memory.state is not None
    state, window = torch.ops.memcompile, memory.own_window
    near = _attend(emit, site, asked, window=window)
    entering = emit(
        lists.entering,
        *(asked.query, site.key_pages, site.value_pages, site.page_table),
        *(asked.position, asked.lengths, window),
    )
    key, value, live = (emit(operator.getitem, entering, i) for i in range(3))
    features = emit(
        mapped, memory.state.feature_map, dict(site.weights), asked.query, key, live, asked.scale
    )
    names = ("", "", "decay" if "decay" in site.weights else "gate_weight", "beta_weight")
    query, key, decay, beta = (
        emit(operator.getitem, features, i) if not name or name in site.weights else None
        for i, name in enumerate(names)
    )
    far = emit(
        # The recurrence for few rows, its chunked form for many.
        (state.state_chunk if read == "dense" else state.state_step).default,
        *(query, key, value, decay, beta, asked.lengths, site.state, site.norm),
    )
    parts = [emit(operator.getitem, part, i) for part in (near, far) for i in (0, 1)]
    return emit(joined, dict(site.weights), *parts)
