"""Check the invariants that hold between any two passes."""

from __future__ import annotations

import torch
from torch import fx

from .graph_tools import describe


def verify(module: fx.GraphModule, after: str) -> None:
    """Raise if a pass left a graph that the next may not rely on.

    Checked: graph lint; every tensor node has fake-tensor metadata; nothing writes in place (so no
    value aliases another that changes); the inputs are the tokens and at most the position ids.

    Raises:
        AssertionError: an invariant is broken; it names the pass and the node. A bug of a pass.
    """
    module.graph.lint()
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if not 1 <= len(placeholders) <= 2:
        raise AssertionError(
            f"after {after}: {len(placeholders)} inputs, expected tokens, positions"
        )
    for node in module.graph.nodes:
        if node.op not in ("call_function", "get_attr", "placeholder"):
            if node.op == "output":
                continue
            raise AssertionError(f"after {after}: {node.op} node {describe(node)}")
        target = node.target
        # Assertions return nothing, and lose their metadata when a program is functionalised.
        silent = isinstance(target, torch._ops.OpOverload) and not target._schema.returns
        if node.op == "call_function" and "val" not in node.meta and not silent:
            raise AssertionError(f"after {after}: no metadata on {describe(node)}")
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            raise AssertionError(f"after {after}: {describe(node)} writes in place")
