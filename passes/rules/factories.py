"""Tensors made from sizes and numbers: positions and masks begin here."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import exact as ex
from ..classify_tokens import Classified
from ..exact import Affine, Steps
from ..graph_tools import argument, extents
from ..token_axes import BATCH, TOKEN, Kind, Refused, Value
from .reading import (
    HOLDS_POSITIONS,
    Rule,
    fresh_axes,
    known_exactly,
    number,
    rank_of,
    tensor_of,
    value_of,
    with_tensor,
)


def _arange(node: fx.Node, state: Classified) -> Value:
    start = argument(node, "start", 0)
    step = argument(node, "step", 1)
    end = argument(node, "end")
    if not isinstance(start, int | float) or not isinstance(step, int | float):
        raise Refused("a range that starts or steps by a computed number")
    size = extents(node)[0]
    if not size.free_symbols and isinstance(end, int | float):
        tensor = torch.arange(start, end, step, dtype=node.meta["val"].dtype)
        return Value(fresh_axes(node, state), Kind.CONSTANT, None, tensor)
    axes = fresh_axes(node, state)
    if axes not in (((TOKEN,),), ((BATCH,),)):
        raise Refused("a range whose length is not the number of tokens")
    if step <= 0:
        raise Refused("positions counted from the end of the sequence")
    if not node.meta["val"].is_floating_point() and not float(start + step).is_integer():
        raise Refused("a range of whole numbers with fractional steps")
    if node.meta["val"].dtype not in HOLDS_POSITIONS:
        raise Refused("positions in a type that cannot count them all")
    exact = Affine.of(start, {0: step})
    if axes == ((BATCH,),):
        return Value(axes, Kind.CONSTANT, exact)
    return known_exactly(node, state, axes, Kind.POSITION, exact)


def _filled(value: Any) -> Rule:
    """zeros, ones, full and their `_like` and `new_` forms."""

    def rule(node: fx.Node, state: Classified) -> Value:
        fill: Any = value
        if fill is None:
            fill = argument(node, "fill_value", argument(node, "value"))
            number(node, fill, state)
            if isinstance(fill, fx.Node):
                source = value_of(fill, state).exact
                if not isinstance(source, Steps) or not source.is_uniform:
                    raise Refused("fills a tensor with a computed number")
                fill = source.value
        dtype = node.meta["val"].dtype
        filled = torch.tensor(fill).to(dtype).item()
        return Value(fresh_axes(node, state), Kind.CONSTANT, Steps.uniform(filled))

    return rule


def _scalar_tensor(node: fx.Node, state: Classified) -> Value:
    return Value((), Kind.CONSTANT, Steps.uniform(number(node, node.args[0], state)))


def _triangle(lower: bool) -> Rule:
    """tril and triu of exactly known values."""

    def rule(node: fx.Node, state: Classified) -> Value:
        value, diagonal = tensor_of(node, state), argument(node, "diagonal")
        row, col = rank_of(value) - 2, rank_of(value) - 1
        if not isinstance(diagonal, int):
            raise Refused("a triangle with a computed diagonal")
        if not any(isinstance(a, str) for axis in value.axes for a in axis):
            return with_tensor(Value(value.axes, value.kind), node, state)
        if value.axes[row] != (TOKEN,) or value.axes[col] != (TOKEN,):
            raise Refused("a triangle over other axes than two token axes")
        edge = Steps(
            (-diagonal,), (False, True), row, col
        )  # keeps index[col] - index[row] <= diagonal
        if not lower:
            edge = Steps((1 - diagonal,), (True, False), row, col)
        if not isinstance(value.exact, Steps):
            raise Refused("a triangle of values that are not a known mask")
        aligned = ex.align([edge, value.exact])
        if aligned is None:
            raise Refused("a triangle of values that are not a known mask")
        breaks, (keep, inner), row, col = aligned
        zero = type(inner[0])(0)
        pieces = tuple(v if k else zero for k, v in zip(keep, inner, strict=True))
        return Value(value.axes, value.kind, ex.compact(Steps(breaks, pieces, row, col)))

    return rule


def _eye(node: fx.Node, state: Classified) -> Value:
    axes = fresh_axes(node, state)
    if axes == ((TOKEN,), (TOKEN,)):
        return Value(axes, Kind.CONSTANT, Steps((0, 1), (0, 1, 0), 0, 1))
    if any(isinstance(a, str) for axis in axes for a in axis):
        raise Refused("an identity matrix of other than the number of tokens")
    return Value(axes, Kind.CONSTANT)


_zeros, _ones, _full = _filled(0), _filled(1), _filled(None)

RULES: dict[str, Rule] = {
    "aten.arange": _arange,
    **dict.fromkeys(("aten.zeros", "aten.zeros_like", "aten.new_zeros"), _zeros),
    **dict.fromkeys(("aten.ones", "aten.ones_like", "aten.new_ones"), _ones),
    **dict.fromkeys(("aten.full", "aten.full_like", "aten.new_full", "aten.fill"), _full),
    "aten.scalar_tensor": _scalar_tensor,
    "aten.tril": _triangle(True),
    "aten.triu": _triangle(False),
    "aten.eye": _eye,
}

# Their sizes end up in the shape of the result; numbers they are filled with they judge themselves.
TAKES_SIZES = frozenset({_zeros, _ones, _full, _arange, _eye, _scalar_tensor})
