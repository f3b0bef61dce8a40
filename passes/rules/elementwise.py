"""Elementwise operations: local when the token axes of all operands are the same axis."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import fx

from .. import exact as ex
from ..classify_tokens import Classified
from ..exact import Affine, Exact, Steps
from ..graph_tools import argument, target_name
from ..token_axes import Kind, Refused, Value, broadcast
from .reading import HOLDS_POSITIONS, Rule, evaluated, is_number_node, lifted, number, value_of

# Affine values of floating type are followed only if made of numbers whose sums do not round.
_FRACTION, _LARGEST = 1 << 10, 1 << 20


def pointwise(node: fx.Node, state: Classified) -> Value:
    """Elementwise operations: local when the token axes of all operands are the same axis."""
    operands: list[Any] = []
    for operand in itertools.chain(node.args, node.kwargs.values()):
        if isinstance(operand, fx.Node) and not is_number_node(operand):
            operands.append(value_of(operand, state))
        elif isinstance(operand, list | tuple):
            if any(isinstance(o, fx.Node) for o in operand):
                raise Refused(f"{target_name(node)} over a list of tensors")
        else:
            number(node, operand, state)
    values = [v for v in operands if isinstance(v, Value)]
    axes = broadcast([v.axes for v in values])
    kind = max((v.kind for v in values), default=Kind.CONSTANT)
    exact = _pointwise_exact(node, state, len(axes))
    # A cut table's rows would no longer be known to be rows: only whole constants are carried on.
    tensor = None if any(v.token_axes for v in values) else evaluated(node, state)
    return Value(axes, kind, exact, tensor)


def _pointwise_exact(node: fx.Node, state: Classified, rank: int) -> Exact | None:
    nodes = [n for n in node.all_input_nodes if not is_number_node(n)]
    if not isinstance(node.meta["val"], torch.Tensor):
        return None  # several results, as of frexp
    found = [(n, lifted(value_of(n, state), rank)) for n in nodes]
    if not found or any(e is None for _, e in found):
        return None
    known = {n: e for n, e in found if e is not None}
    if any(isinstance(e, Affine) for e in known.values()):
        return _affine_pointwise(node, known)
    return _steps_pointwise(node, known)


def _steps_pointwise(node: fx.Node, known: dict[fx.Node, Exact]) -> Steps | None:
    """Run the operation itself on one number a piece, in the operands' own types."""
    order = list(known)
    aligned = ex.align([known[n] for n in order])  # type: ignore[misc]
    if aligned is None:
        return None
    breaks, pieces, row, col = aligned
    # A tensor without axes stays one: it takes part in type promotion differently.
    samples = {
        n: torch.tensor(values if n.meta["val"].dim() else values[0], dtype=n.meta["val"].dtype)
        for n, values in zip(order, pieces, strict=True)
    }
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: samples[n])
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "layout", "pin_memory")}
    try:
        out = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError):
        return None
    if not isinstance(out, torch.Tensor) or out.numel() != len(breaks) + 1:
        return None
    if out.dtype != node.meta["val"].dtype:
        return None
    return ex.compact(Steps(breaks, tuple(out.flatten().tolist()), row, col))


_RELATIONS = {
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
}


def _affine_pointwise(node: fx.Node, known: dict[fx.Node, Exact]) -> Exact | None:
    """Sums, differences, multiples, comparisons and exact casts of affine values."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.split("::")[1]
    dtype = node.meta["val"].dtype
    if any(
        isinstance(e, Affine) and n.meta["val"].dtype not in HOLDS_POSITIONS
        for n, e in known.items()
    ):
        return None
    if dtype not in HOLDS_POSITIONS and dtype is not torch.bool:
        return None
    result = _affine_result(node, name, dtype, known)
    return result if not isinstance(result, Affine) or _held(result) else None


def _held(exact: Affine) -> bool:
    """Whether arithmetic on the value stays exact at any position a context reaches."""
    return all(
        abs(number) <= _LARGEST and float(number * _FRACTION).is_integer()
        for number in _numbers(exact)
    )


def _affine_result(
    node: fx.Node, name: str, dtype: torch.dtype, known: dict[fx.Node, Exact]
) -> Exact | None:
    def operand(value: Any) -> Exact | None:
        if isinstance(value, fx.Node):
            return known.get(value)
        return Steps.uniform(value) if isinstance(value, int | float) else None

    if name in ("to", "_to_copy", "clone", "contiguous", "alias", "detach"):
        only = next(iter(known.values()))
        whole = all(float(c).is_integer() for c in _numbers(only))
        return only if dtype is not torch.bool and (dtype.is_floating_point or whole) else None
    if name == "neg":
        return ex.scale(next(iter(known.values())), -1)
    if len(node.args) < 2:
        return None
    left, right = operand(node.args[0]), operand(node.args[1])
    if left is None or right is None:
        return None
    alpha = argument(node, "alpha", 1)
    if name in ("add", "sub", "rsub") and not isinstance(alpha, int | float):
        return None
    if name in ("add", "sub"):
        return ex.add(left, right, alpha if name == "add" else -alpha)
    if name == "rsub":
        return ex.add(right, left, -alpha)
    if name == "mul":
        for affine, factor in ((left, right), (right, left)):
            if isinstance(affine, Affine) and isinstance(factor, Steps) and factor.is_uniform:
                return ex.scale(affine, factor.value)
        return None
    if name in _RELATIONS:
        return ex.compare(_RELATIONS[name], left, right)
    return None


def _numbers(exact: Exact) -> list[Any]:
    if isinstance(exact, Affine):
        return [exact.offset, *(c for _, c in exact.coefficients)]
    return list(exact.values)


def _isin(node: fx.Node, state: Classified) -> Value:
    """Membership looks at every element of the second operand: that must be a constant."""
    elements, candidates = node.args[0], node.args[1]
    if isinstance(candidates, fx.Node):
        known = value_of(candidates, state)
        if known.kind is not Kind.CONSTANT or any(
            isinstance(a, str) for axis in known.axes for a in axis
        ):
            raise Refused("asks whether a value is among those of the tokens")
    if not isinstance(elements, fx.Node):
        raise Refused("asks whether a number is among the elements of a tensor")
    value = value_of(elements, state)
    return Value(value.axes, value.kind)


RULES: dict[str, Rule] = {
    "aten.isin": _isin,
    **dict.fromkeys(
        (
            "aten.to",
            "aten._to_copy",
            "aten.clone",
            "aten.contiguous",
            "aten.alias",
            "aten.detach",
            "aten.lift_fresh_copy",
            "aten.type_as",
            "aten.where",
            "aten.masked_fill",
            "aten.logical_not",
            "aten.__and__",
            "aten.__or__",
            "aten.__xor__",
            "aten.softplus",
            "aten.hardtanh",
            "aten.floor_divide",
            "aten.remainder",
            "aten.polar",
        ),
        pointwise,
    ),
}
