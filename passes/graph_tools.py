"""Small helpers that several passes share: building nodes with metadata, naming their origin."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import detect_fake_mode

aten = torch.ops.aten

# How a slice without an end is written.
LAST = 2**63 - 1

_TORCH = os.path.dirname(torch.__file__)
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def extent(size: Any) -> sympy.Expr:
    """A dimension's size as a sympy expression; comparing these never adds a guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def extents(node: fx.Node) -> tuple[sympy.Expr, ...]:
    """The sizes of a tensor node."""
    return tuple(extent(size) for size in node.meta["val"].shape)


def emit(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call at the graph's insertion point and give it fake-tensor metadata."""
    node = graph.call_function(target, args, kwargs)
    values, named = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = detect_fake_mode([n.meta["val"] for n in node.all_input_nodes])
    if mode is None:
        node.meta["val"] = target(*values, **named)
    else:
        with mode:
            node.meta["val"] = target(*values, **named)
    return node


def copy_origin(new: fx.Node, old: fx.Node) -> None:
    """Let `new` be reported under the user's line and module of `old`."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]


def source_line(node: fx.Node) -> str:
    """``file:line`` of the user's own code that made the node, or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [f for f in frames if not f[0].startswith(_TORCH)] or frames
    return f"{frames[-1][0]}:{frames[-1][1]}" if frames else ""


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that made the node, as the user's model names it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    path = paths[-1] if paths else ""
    return str(path).removeprefix("L['self'].").removeprefix("model.")


def describe(node: fx.Node) -> str:
    """One line that shows a node: name, operation, inputs."""
    if node.op != "call_function":
        return f"%{node.name} ({node.op})"
    inputs = ", ".join(f"%{n.name}" for n in node.all_input_nodes[:4])
    return f"%{node.name} = {target_name(node)}({inputs})"


def target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    return getattr(target, "__name__", str(target))


def calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    """Calls of the given operations, in order; the graph may change while iterating."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in targets:
            yield node


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator call by its schema name, wherever it was passed."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, schema in enumerate(node.target._schema.arguments):
        if schema.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if position < len(node.args):
                return node.args[position]
            return schema.default_value if schema.has_default_value() else default
    return default


def remove_dead(graph: fx.Graph) -> int:
    """Drop calls that nobody uses and that do nothing beside their result."""
    removed = 0
    for node in reversed(list(graph.nodes)):
        if (
            node.op in ("call_function", "get_attr")
            and not node.users
            and not changes_something(node)
        ):
            graph.erase_node(node)
            removed += 1
    return removed


def takes_whole_axis(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out, whatever the axis's length."""
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    return start in (None, 0) and (end is None or end == LAST) and step == 1


def changes_something(node: fx.Node) -> bool:
    """Whether a call does something beside its result: writes a tensor, or sets a mode."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    return node.op == "call_function" and node.target in fx.node._side_effectful_functions


def scalar_value(node: Any) -> float | None:
    """The Python number behind a literal or a one-element constant tensor, else None."""
    number = _scalar_source(node)
    fake = node.meta.get("val") if isinstance(node, fx.Node) else None
    if number is None or not isinstance(fake, torch.Tensor):
        return number
    # A cast on the way rounds, or cuts off the fraction.
    return float(torch.tensor(number, dtype=torch.float64).to(fake.dtype).item())


def _scalar_source(node: Any) -> float | None:
    if isinstance(node, bool):
        return None
    if isinstance(node, int | float):
        return float(node)
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        tensor = operator.attrgetter(str(node.target))(node.graph.owning_module)
        return float(tensor.item()) if tensor.numel() == 1 and not tensor.requires_grad else None
    if node.op != "call_function":
        return None
    if node.target in (aten.full.default, aten.scalar_tensor.default):
        shape, fill = (node.args[0], node.args[1]) if len(node.args) > 1 else ([], node.args[0])
        return scalar_value(fill) if shape == [] or isinstance(shape, int | float) else None
    if node.target in (
        aten.lift_fresh_copy.default,
        aten.detach.default,
        aten.detach_.default,
        aten.alias.default,
        aten.clone.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
    ):
        return scalar_value(node.args[0])
    return None
