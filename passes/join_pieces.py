"""Make one concatenation of a tensor that is made empty and written piece by piece."""

from __future__ import annotations

import torch
from torch import fx

from .graph_tools import argument, aten, calls, copy_origin, emit, extents, remove_dead
from .result import PassResult

_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


def join_pieces(module: fx.GraphModule) -> PassResult:
    """`new_empty` whose slices of one axis are all written, each once, becomes `cat`: so latent
    attention in transformers puts its keys together."""
    graph, result = module.graph, PassResult(module)
    for node in list(calls(graph, aten.slice_scatter.default)):
        if any(user.target is aten.slice_scatter.default for user in node.users):
            continue  # the last write of a chain stands for all of them
        found = _pieces(node)
        if found is None:
            continue
        axis, pieces = found
        with graph.inserting_before(node):
            joined = emit(graph, aten.cat.default, pieces, axis)
        copy_origin(joined, node)
        node.replace_all_uses_with(joined)
        result.applied += 1
    remove_dead(graph)
    module.recompile()
    return result


def _pieces(last: fx.Node) -> tuple[int, list[fx.Node]] | None:
    """The axis and the pieces, in order, that a chain of writes makes a whole of; or None."""
    written: dict[int, tuple[int, fx.Node]] = {}  # start -> (end, piece)
    axes = set()
    node = last
    while node.target is aten.slice_scatter.default:
        axis = int(argument(node, "dim")) % len(extents(node))
        size = extents(node)[axis]
        start, end = argument(node, "start") or 0, argument(node, "end")
        if not size.is_Integer or not isinstance(start, int) or argument(node, "step") != 1:
            return None
        end = int(size) if end is None else end
        if not isinstance(end, int) or start < 0 or end < 0 or start in written:
            return None
        piece = _source(argument(node, "src"))
        before, after = piece.meta["val"], node.meta["val"]
        whole = [*extents(node)]
        whole[axis] = whole[axis].func(min(end, int(size)) - start)
        if (before.dtype, before.device) != (after.dtype, after.device):
            return None
        if extents(piece) != tuple(whole):
            return None
        written[start] = (min(end, int(size)), piece)
        axes.add(axis)
        node = argument(node, "self")
    if node.target not in _EMPTY or len(axes) != 1:
        return None
    (axis,) = axes
    at, pieces = 0, []
    for start, (end, piece) in sorted(written.items()):
        if start != at:
            return None
        at = end
        pieces.append(piece)
    return (axis, pieces) if at == int(extents(last)[axis]) else None


def _source(node: fx.Node) -> fx.Node:
    """What is written: `copy` into a slice gives its second argument, of the slice's shape."""
    if node.target is torch.ops.aten.copy.default:
        source = node.args[1]
        assert isinstance(source, fx.Node)
        return source if extents(source) == extents(node) else node
    return node
