"""Reads of listed pages as one operation, for runtimes that read a list of tokens.

`attend` to pages that `score_select` listed becomes `listed_attention`, which is told of the new
rows as well: such a runtime takes a row's own token from them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

from torch import fx

from ..models import portable
from .fuse_grouped import READS, append_of, fuse_each
from .graph_tools import aten
from .result import PassResult

RULE = "fuse_listed"
SUMMARIES = portable.operator("attend.summaries")


def fuse_listed(module: fx.GraphModule, refused: Mapping[str, str] | None = None) -> PassResult:
    """Fuses what can be fused in a graph of `make_functional`, in place.

    Args:
        refused: inputs of keys, by name, whose sites the runtime cannot take, and why.

    Returns:
        its `applied` counts the reads that were fused; each read of listed pages that was not
        stands in `declined`, with the reason.
    """
    # The others read every page, or every one but those listed.
    reads = [
        node
        for node in module.graph.nodes
        if node.target in READS
        and (node.target is SUMMARIES or (node.args[4] is not None and not node.args[5]))
    ]
    return fuse_each(module, RULE, reads, lambda read: _why_not(read, refused or {}), _fuse)


def _why_not(read: fx.Node, refused: Mapping[str, str]) -> str:
    """Why a read cannot be fused; empty where it can."""
    if read.target is SUMMARIES:
        return "it reads the pages that it skips by their summaries (compensate=False does not)"
    _, keys, values, bias, pages = read.args[:5]
    softcap, window, size, slots, pinned = read.args[9:14]
    if bias is not None or slots != size:
        return "it reads records of pages"
    if pinned >= 0:  # type: ignore[operator]
        return "its cache keeps its first pages and the newest"
    if softcap or window:
        return "its logits are capped, or its pages are read in part"
    append = append_of(keys)
    if append is None or append is not append_of(values):
        return "its keys and values were not written by one append"
    if any(user.target is operator.getitem and user.args[1] == 1 for user in read.users):
        return "its log-sum-exp is needed, to join it with another read"
    if not _of_score_select(pages):
        return "its pages were not chosen among all pages by score_select"
    held = append.args[4]
    return refused.get(held.name, "") if isinstance(held, fx.Node) else ""


def _of_score_select(pages: object) -> bool:
    """Whether they were listed by it: in order, a row's own page the last, none for padding."""
    if isinstance(pages, fx.Node) and pages.target is aten.to.dtype:
        pages = pages.args[0]
    return isinstance(pages, fx.Node) and pages.target is portable.operator("score_select")


def _fuse(graph: fx.Graph, read: fx.Node) -> None:
    query, keys, values, _, pages, _, position, lengths, scale = read.args[:9]
    append, size = append_of(keys), read.args[11]
    assert append is not None
    with graph.inserting_before(read):
        made = graph.call_function(
            portable.operator("listed_attention"),
            (query, *append.args[:2], pages, position, lengths, keys, values, scale, size),
        )
    for got in list(read.users):
        got.replace_all_uses_with(made)
