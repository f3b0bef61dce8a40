"""Mistakes that a step graph may make, each in every site or in one; and networks to make them in.

What is wrong is wrong by as much as such mistakes are: no garbage that any check would notice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

from memcompile.compiler.pipeline import Compiled, build
from memcompile.models.networks.decoders.frame import Decoder

aten = torch.ops.aten
POLICIES: dict[str, dict[str, Any]] = {
    "scout": {"budget": 32, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0},
    "hybrid": {"window": 16, "page_size": 8},
}


@cache
def compiled(dtype: torch.dtype, layers: int, policy: str = "scout") -> tuple[Decoder, Compiled]:
    """A decoder under a policy, unchecked; both share their weights, which may be drawn anew."""
    model = type("Deep", (Decoder,), {"layers": layers, "context": 4096})(0).to(dtype)
    return model, build(model, policy, check=False, kernels="off", **POLICIES[policy])


def _argument(node: fx.Node, name: str) -> Any:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return node.kwargs[name] if name in node.kwargs else node.args[names.index(name)]


def _give(node: fx.Node, name: str, value: Any) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if name in node.kwargs:
        node.update_kwarg(name, value)
    else:
        node.update_arg(names.index(name), value)


def _through(name: str, operation: Any, *rest: Any) -> Callable[[fx.Node], None]:
    """An argument goes through an operation first."""

    def change(node: fx.Node) -> None:
        with node.graph.inserting_before(node):
            given = _argument(node, name)
            _give(node, name, node.graph.call_function(operation, (given, *rest)))

    return change


# Which operation, and what becomes of each node of it.
FAULTS: dict[str, tuple[str, Callable[[fx.Node], None]]] = {
    "scale x 1.2": ("attend", lambda n: _give(n, "scale", 1.2 * _argument(n, "scale"))),
    "no scale": ("attend", lambda n: _give(n, "scale", 1.0)),
    "newest token unseen": ("attend", _through("position", aten.sub.Scalar, 1)),
    "heads permuted": ("attend", _through("query", aten.roll.default, [1], [1])),
    "keys one token off": ("append", _through("key", aten.roll.default, [1], [2])),
    "keys not written": ("append", _through("key", aten.mul.Scalar, 0)),
}
STATE_FAULTS: dict[str, tuple[str, Callable[[fx.Node], None]]] = {
    "state not updated": ("state_", _through("state", aten.clone.default)),
}


def with_fault(graph: Any, name: str, site: int | None = None) -> fx.GraphModule:
    """The step graph with a mistake in every site, or in one."""
    made: fx.GraphModule = copy.deepcopy(graph)
    word, change = (FAULTS | STATE_FAULTS)[name]
    nodes = [
        node
        for node in made.graph.nodes
        if getattr(node.target, "namespace", "") == "memcompile" and word in str(node.target)
    ]
    assert nodes, f"no {word} in the graph"
    for node in nodes if site is None else [nodes[site]]:
        change(node)
    made.graph.lint()
    made.recompile()
    return made
