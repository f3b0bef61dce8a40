"""Classify every value by its token axis: the proof that a forward can be run token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .exact import Affine, Exact, Steps
from .graph_tools import extent, extents
from .token_axes import BATCH, TOKEN, Extents, Kind, Mixed, Refused, Value, mixed

# Masks and tables above this size are not read for their values.
_LARGEST_TABLE = 1 << 26


@dataclass(frozen=True)
class Gather:
    """A token-long slice of a constant table, to be read at the tokens' positions instead."""

    axis: int
    start: int


@dataclass(frozen=True)
class Rematerialise:
    """A value known exactly, to be computed from the positions instead of over the token axis."""

    exact: Exact
    axes: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Bound:
    """Positions at or beyond `limit` do not exist in the model (a table ends, a range is fixed)."""

    limit: int
    node: str


@dataclass
class Classified:
    """The result of the proof.

    Attributes:
        values: what is known of every node.
        rewrites: nodes that must be computed from the positions when the graph runs in steps.
        bounds: where tables end.
        extents: the batch and token symbols.
    """

    extents: Extents
    values: dict[fx.Node, Value | Mixed] = field(default_factory=dict)
    rewrites: dict[fx.Node, Gather | Rematerialise] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)


def classify_tokens(module: fx.GraphModule) -> Classified:
    """Give every node of a normal-form graph a `Value`, or `Mixed` with the reason.

    A value is accepted only when a rule shows that its element for a token needs nothing but that
    token's own values, its position, and constants. Attention is the one operation that may look
    at other tokens. Everything unknown is `Mixed`; being mixed matters only if it reaches the
    logits or an attention.
    """
    from .rules import apply_rule

    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    tokens = placeholders[0].meta["val"]
    state = Classified(Extents(extent(tokens.shape[0]), extent(tokens.shape[1])))
    for index, node in enumerate(placeholders):
        state.values[node] = _input(index, node, state)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            state.values[node] = _constant(module, node)
        elif node.op == "call_function":
            poison = next(
                (v for n in node.all_input_nodes if isinstance(v := state.values.get(n), Mixed)),
                None,
            )
            if poison is not None:
                state.values[node] = poison
                continue
            try:
                state.values[node] = apply_rule(node, state)
                _check(node, state)
            except Refused as refused:
                state.values[node] = mixed(node, str(refused))
    return state


def _input(index: int, node: fx.Node, state: Classified) -> Value | Mixed:
    axes = tuple(state.extents.axis(e) for e in extents(node))
    if axes != ((BATCH,), (TOKEN,)):
        return mixed(node, "an input that is not [batch, tokens]")
    if index == 0:
        return Value(axes, Kind.LOCAL)
    # The whole sequence is the full forward at positions 0, 1, 2, ...
    return Value(axes, Kind.POSITION, Affine(0, ((1, 1),)))


def _constant(module: fx.GraphModule, node: fx.Node) -> Value | Mixed:
    from operator import attrgetter

    tensor = attrgetter(str(node.target))(module)
    if not isinstance(tensor, torch.Tensor):
        return mixed(node, "a constant that is not a tensor")
    axes = tuple((size,) if size != 1 else () for size in tensor.shape)
    small = not isinstance(tensor, torch.nn.Parameter) and tensor.numel() <= _LARGEST_TABLE
    value = tensor.detach() if small else None
    exact = Steps.uniform(tensor.item()) if tensor.numel() == 1 and small else None
    return Value(axes, Kind.CONSTANT, exact, value)


def _check(node: fx.Node, state: Classified) -> None:
    """The invariants of a value: axes agree with the node's sizes, one token axis unless exact."""
    value, fake = state.values[node], node.meta.get("val")
    if not isinstance(value, Value) or not isinstance(fake, torch.Tensor):
        return
    for axis, size in zip(value.axes, extents(node), strict=True):
        coefficient, b, t = state.extents.monomial(size)
        numbers = 1
        for atom in axis:
            numbers *= atom if isinstance(atom, int) else 1
        if (numbers, axis.count(BATCH), axis.count(TOKEN)) != (coefficient, b, t):
            raise AssertionError(f"{node.format_node()}: axis {axis} against size {size}")
    if len(value.token_axes) > 1 and value.exact is None and len(value.cut) < 2:
        state.values[node] = mixed(
            node,
            "compares tokens with each other outside an attention that was recognised, or biases "
            "attention by more than a mask",
        )
