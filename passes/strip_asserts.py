"""Remove run-time assertions, which keep whole mask subgraphs alive, and identity operations."""

from __future__ import annotations

import torch
from torch import fx

from .graph_tools import argument, aten, extents, remove_dead, takes_whole_axis
from .result import PassResult

_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default)
_IDENTITIES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)


def strip_asserts(module: fx.GraphModule) -> PassResult:
    """Drop assertions, casts to the same type, whole-axis slices and inference dropout."""
    graph, applied = module.graph, 0
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS or node.target is torch._check:
            graph.erase_node(node)
            applied += 1
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            applied += 1
    remove_dead(graph)
    module.recompile()
    return PassResult(module, applied)


def _is_identity(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.target in _CASTS:
        return before.dtype == after.dtype and before.device == after.device
    if node.target is aten.slice.Tensor:
        return takes_whole_axis(node)
    if node.target is aten.dropout.default:
        return argument(node, "train") is False or argument(node, "p") == 0
    if node.target is aten.expand.default:
        return extents(node.args[0]) == extents(node)
    return node.target in _IDENTITIES
