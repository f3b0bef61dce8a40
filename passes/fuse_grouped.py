"""Append and read of a whole cache as one operation, for runtimes that have it as one.

`append_index` followed by an `attend` to all of its keys becomes `grouped_attention`; records of
the pages that were filled are then made by an operation of their own, `page_records`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

from torch import fx

from ..models import portable
from .result import Declined, PassResult

RULE = "fuse_grouped"
READS = (portable.operator("attend"), portable.operator("attend.summaries"))


def fuse_grouped(module: fx.GraphModule, refused: Mapping[str, str] | None = None) -> PassResult:
    """Fuses what can be fused in a graph of `make_functional`, in place.

    Args:
        refused: inputs of keys, by name, whose sites the runtime cannot take, and why.

    Returns:
        its `applied` counts the reads that were fused; each read of a memory that was not stands
        in `declined`, with the reason.
    """
    reads = [node for node in module.graph.nodes if node.target in READS]
    return fuse_each(module, RULE, reads, lambda read: _why_not(read, refused or {}), _fuse)


def fuse_each(
    module: fx.GraphModule,
    rule: str,
    reads: Sequence[fx.Node],
    why_not: Callable[[fx.Node], str],
    fuse: Callable[[fx.Graph, fx.Node], None],
) -> PassResult:
    """Fuses the reads that `why_not` has nothing to say against."""
    result = PassResult(module)
    for read in reads:
        if why := why_not(read):
            result.declined.append(Declined(why, f"%{read.name}", rule))
        else:
            fuse(module.graph, read)
            result.applied += 1
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return result


def _why_not(read: fx.Node, refused: Mapping[str, str]) -> str:
    """Why a read cannot be fused with the append before it; empty where it can."""
    if read.target is not READS[0]:
        return "it reads pages that it chooses, and the others by their summaries"
    _, keys, values, bias, pages, exclude = read.args[:6]
    slots, size = read.args[12], read.args[11]
    if pages is not None and not exclude:
        return "it reads pages that it chooses"
    if bias is not None or pages is not None or slots != size:
        return "it reads records of pages"
    append = append_of(keys)
    if append is None or append is not append_of(values):
        return "its keys and values were not written by one append"
    if any(user.target is operator.getitem and user.args[1] == 1 for user in read.users):
        return "its log-sum-exp is needed, to join it with another read"
    pinned, window = append.args[9], read.args[10]
    if pinned > 0 or (pinned == 0 and not window):  # type: ignore[operator]
        return "its cache keeps its first pages and the newest, which no operator knows"
    held = append.args[4]
    if isinstance(held, fx.Node) and held.name in refused:
        return refused[held.name]
    others = [
        user
        for i in (0, 1)
        for user in _users(append, i)
        if user is not read and user.op != "output"
    ]
    if others:
        return f"its keys and values are read by {others[0].target} too"
    if not read.args[0] < append:  # type: ignore[operator]
        return "its query is made after its keys are written"
    return ""


def append_of(node: object) -> fx.Node | None:
    """The append that a tensor is a part of; None if it is of none."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if source.target is portable.operator("append_index") else None


def _users(append: fx.Node, part: int) -> list[fx.Node]:
    return [user for got in append.users if got.args[1] == part for user in got.users]


def _fuse(graph: fx.Graph, read: fx.Node) -> None:
    append = read.args[1].args[0]  # type: ignore[union-attr]
    assert isinstance(append, fx.Node)
    key, value, position, lengths, keys, values, index, fields = append.args[:8]
    size, pinned, reach, record_pinned = append.args[8:]
    scale, softcap, window = read.args[8:11]

    with graph.inserting_before(append):
        given = (read.args[0], key, value, position, lengths, keys, values, scale, softcap)
        made = graph.call_function(
            portable.operator("grouped_attention"), (*given, window, size, pinned, reach)
        )
        parts = [graph.call_function(operator.getitem, (made, i)) for i in range(3)]
        new = parts[1:]
        if fields:
            records = graph.call_function(
                portable.operator("page_records"),
                (key, position, lengths, *new, index, fields, size, pinned, record_pinned),
            )
            count = len(fields)  # type: ignore[arg-type]
            new += [graph.call_function(operator.getitem, (records, i)) for i in range(count)]
    for got in list(append.users):
        got.replace_all_uses_with(new[got.args[1]])  # type: ignore[index]
    for got in list(read.users):
        got.replace_all_uses_with(parts[0])
