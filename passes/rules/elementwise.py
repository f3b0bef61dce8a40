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
from ..graph_tools import target_name
from ..token_axes import Kind, Refused, Value, broadcast
from .reading import Rule, evaluated, is_number_node, lifted, number, value_of

_FULL_PRECISION = (torch.float32, torch.float64)


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
    samples = {
        n: torch.tensor(values, dtype=n.meta["val"].dtype)
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
    return ex.compact(Steps(breaks, tuple(out.tolist()), row, col))


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
    if dtype.is_floating_point and dtype not in _FULL_PRECISION:
        return None

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
    if name in ("minimum", "maximum", "clamp", "clamp_min"):
        return None
    if len(node.args) < 2:
        return None
    left, right = operand(node.args[0]), operand(node.args[1])
    if left is None or right is None:
        return None
    alpha = node.kwargs.get("alpha", 1)
    if name in ("add", "sub") and isinstance(alpha, int | float):
        return ex.add(left, right, alpha if name == "add" else -alpha)
    if name == "rsub":
        return ex.add(right, left, -1)
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


RULES: dict[str, Rule] = dict.fromkeys(
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
        "aten.isin",
        "aten.floor_divide",
        "aten.remainder",
    ),
    pointwise,
)
