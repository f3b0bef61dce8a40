"""What every rule needs: its inputs, and ways to move what is known of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from ..classify_tokens import Classified, Rematerialise
from ..exact import Affine, Exact
from ..graph_tools import argument, extent, extents
from ..token_axes import BATCH, TOKEN, Axis, Kind, Refused, Value

Rule = Callable[[fx.Node, Classified], Value]

# Types that hold positions exactly: a half-precision float cannot tell 257 from 256.
HOLDS_POSITIONS = (torch.int32, torch.int64, torch.float32, torch.float64)


def value_of(node: Any, state: Classified) -> Value:
    value = state.values[node]
    assert isinstance(value, Value)
    return value


def tensor_of(node: fx.Node, state: Classified, name: str = "self") -> Value:
    return value_of(argument(node, name), state)


def rank_of(value: Value) -> int:
    return len(value.axes)


def fresh_axes(node: fx.Node, state: Classified) -> tuple[Axis, ...]:
    return tuple(state.extents.axis(e) for e in extents(node))


def is_number_node(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and not isinstance(operand.meta.get("val"), torch.Tensor)


def symbol_of(size: Any) -> sympy.Expr:
    return extent(size.meta["val"] if isinstance(size, fx.Node) else size)


def number(node: fx.Node, operand: Any, state: Classified) -> Any:
    """A literal operand; refuses numbers that are computed from the length or the batch size."""
    size: Any = operand
    if isinstance(operand, fx.Node):
        size = operand.meta.get("val")
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        if state.extents.depends(sympy.sympify(size.node.expr)):
            raise Refused("the number of tokens or rows is used as data")
        raise Refused("a symbolic number is used as data")
    return operand


def flat(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    for operand in (*node.args, *node.kwargs.values()):
        found += operand if isinstance(operand, list | tuple) else [operand]
    return found


def symbolic_argument(operand: Any, state: Classified) -> bool:
    """Whether a number among the arguments is computed from the length or the batch size."""
    if not is_number_node(operand):
        return False
    size = operand.meta.get("val")
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    return state.extents.depends(sympy.sympify(size.node.expr))


def evaluated(node: fx.Node, state: Classified) -> torch.Tensor | None:
    """The result itself when every input is a small constant."""
    tensors = [value_of(n, state).tensor for n in node.all_input_nodes]
    if not tensors or any(t is None for t in tensors):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: value_of(n, state).tensor)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result if isinstance(result, torch.Tensor) else None


def lifted(value: Value, rank: int) -> Exact | None:
    """An operand's exact value over the result's axes."""
    shift = rank - rank_of(value)
    return value.exact.moved(lambda axis: axis + shift) if value.exact is not None else None


def moved_axes(value: Value, axes: tuple[Axis, ...], where: Callable[[int], int | None]) -> Value:
    """The same elements with every axis at a new place."""
    exact = value.exact.moved(where) if value.exact is not None else None
    cut = tuple((t, start) for axis, start in value.cut if (t := where(axis)) is not None)
    if len(cut) != len(value.cut):
        cut = ()
    return Value(axes, value.kind, exact, None, cut)


def with_tensor(value: Value, node: fx.Node, state: Classified) -> Value:
    tensor = evaluated(node, state) if not value.token_axes else None
    return Value(value.axes, value.kind, value.exact, tensor, value.cut)


def known_exactly(
    node: fx.Node, state: Classified, axes: tuple[Axis, ...], kind: Kind, exact: Exact
) -> Value:
    """An exactly known result of an operation that looks along the token axis."""
    if isinstance(exact, Affine):
        along = [axes[axis] for axis, _ in exact.coefficients]
        inputs = [value_of(n, state) for n in node.all_input_nodes if not is_number_node(n)]
        if all(axis == (BATCH,) for axis in along) and not any(v.token_axes for v in inputs):
            return Value(axes, kind, exact)  # a function of the row alone is the same in a step
        if along != [(TOKEN,)]:
            raise Refused("positions that depend on the row or on two tokens")
    state.rewrites[node] = Rematerialise(exact, axes)
    return Value(axes, kind, exact)


def keeps_apart(value: Value, axes: Sequence[int], verb: str) -> None:
    atoms = {atom for axis in axes for atom in value.axes[axis]}
    if TOKEN in atoms:
        raise Refused(f"{verb} the token axis")
    if BATCH in atoms:
        raise Refused(f"{verb} the batch axis, which lets rows see each other")
