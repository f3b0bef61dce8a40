"""Let each key and value head be stored once: undo the copies made for grouped queries."""

from __future__ import annotations

from torch import fx

from .graph_tools import (
    aten,
    calls,
    describe,
    extents,
    remove_dead,
    source_line,
    takes_whole_axis,
)
from .result import Declined, PassResult

_VIEW = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
)
_COPY = (aten.contiguous.default, aten.clone.default)


def undo_repeat_kv(module: fx.GraphModule) -> PassResult:
    """Give attention nodes the keys and values from before `repeat_kv`, `repeat_interleave` or a
    broadcast over heads. `Tensor.repeat` tiles heads in another order and is left as it is."""
    import torch

    graph, result = module.graph, PassResult(module)
    for node in calls(graph, torch.ops.memcompile.attention.default):
        query, key, value = node.args[:3]
        sources = [_before_repeat(n) for n in (key, value)]  # type: ignore[arg-type]
        if None in sources:
            if sources[0] is not sources[1]:
                result.declined.append(
                    Declined(
                        "only one of keys and values is repeated over heads; both are kept as is",
                        describe(node),
                        "undo_repeat_kv",
                        source_line(node),
                    )
                )
            continue
        heads = [extents(n)[1] for n in sources if n is not None]
        if heads[0] == heads[1] and extents(query)[1] % heads[0] == 0:  # type: ignore[arg-type]
            node.args = (query, *sources, *node.args[3:])
            result.applied += 1
    remove_dead(graph)
    module.recompile()
    return result


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """The tensor whose heads `node` repeats ``g`` times in a row each, or None."""
    while node.op == "call_function" and node.target in _COPY:
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "call_function":
        return None
    if node.target is aten.repeat_interleave.self_int:
        source, _, axis = (*node.args, None)[:3]
        return source if axis in (1, -3) else None  # type: ignore[return-value]
    if node.target is aten.expand.default:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        before, after = extents(source), extents(node)
        same = len(before) == 4 and (before[0], *before[2:]) == (after[0], *after[2:])
        return source if same and before[1] == 1 else None
    if node.target not in _VIEW:
        return None
    spread = node.args[0]
    while isinstance(spread, fx.Node) and spread.target in _COPY:
        spread = spread.args[0]
    if not isinstance(spread, fx.Node) or spread.target is not aten.expand.default:
        return None
    shape, out = extents(spread), extents(node)
    if len(shape) != 5 or out != (shape[0], shape[1] * shape[2], *shape[3:]):
        return None
    single = spread.args[0]
    while isinstance(single, fx.Node) and single.target is aten.slice.Tensor:
        if not takes_whole_axis(single):
            return None
        single = single.args[0]
    if not isinstance(single, fx.Node) or extents(single) != (*shape[:2], 1, *shape[3:]):
        return None
    if single.target is aten.unsqueeze.default and single.args[1] in (2, -3):
        return single.args[0]  # type: ignore[return-value]
    return None
