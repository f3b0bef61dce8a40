"""Slices, splits and joins: which parts of an axis a result holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from .. import exact as ex
from ..classify_tokens import Bound, Classified, Gather
from ..exact import Affine, Exact, Steps
from ..graph_tools import argument, extents, target_name
from ..token_axes import TOKEN, Axis, Kind, Refused, Value, broadcast, merge_numbers
from .reading import (
    Rule,
    flat,
    known_exactly,
    moved_axes,
    rank_of,
    symbol_of,
    symbolic_argument,
    tensor_of,
    value_of,
    with_tensor,
)

_LAST = 2**63 - 1


def _slice(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    axis = argument(node, "dim") % rank_of(value)
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    start = 0 if start is None else start
    if not isinstance(start, int) or not isinstance(step, int):
        raise Refused("a slice that starts at a place computed from the length")
    size = value.axes[axis]
    out = extents(node)[axis]
    if not any(isinstance(a, str) for a in size):
        return _slice_constant(node, state, value, axis, start, step, out)
    whole = end is None or end == _LAST or symbol_of(end) == extents(node.args[0])[axis]  # type: ignore[arg-type]
    if start == 0 and whole and step == 1:
        return Value(value.axes, value.kind, value.exact, value.tensor, value.cut)
    if isinstance(start, int) and start >= 0 and out == 1 and value.exact is not None:
        return _pick(node, state, value, axis, start, keep=True)
    raise Refused("takes a part of the token axis")


def _narrow(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    axis, start = argument(node, "dim") % rank_of(value), argument(node, "start")
    if any(isinstance(a, str) for a in value.axes[axis]):
        if start == 0 and symbol_of(argument(node, "length")) == extents(node.args[0])[axis]:  # type: ignore[arg-type]
            return value
        raise Refused("takes a part of the token axis")
    return _slice_constant(node, state, value, axis, start, 1, extents(node)[axis])


def _slice_constant(
    node: fx.Node,
    state: Classified,
    value: Value,
    axis: int,
    start: Any,
    step: int,
    out: sympy.Expr,
) -> Value:
    if not isinstance(start, int):
        raise Refused("a slice that starts at a place computed from the length")
    if not out.free_symbols:
        if any(symbolic_argument(a, state) for a in flat(node)):
            raise Refused("a slice that ends at a place computed from the length")
        axes = list(value.axes)
        axes[axis] = state.extents.axis(out)
        return with_tensor(moved_axes(value, tuple(axes), lambda i: i), node, state)
    # A constant table cut to the number of tokens: row i is for the token at position i.
    if out != state.extents.token or step != 1 or not isinstance(start, int) or start < 0:
        raise Refused("cuts a constant to a length that is not the number of tokens")
    rows = value.axes[axis]
    limit = int(rows[0]) if rows else 1
    axes = list(value.axes)
    axes[axis] = (TOKEN,)
    cut = (*value.cut, (axis, start))
    state.rewrites[node] = Gather(axis, start)
    state.bounds.append(Bound(limit - start, node.name))
    tensor = value.tensor
    if tensor is not None:
        tensor = tensor.narrow(axis, start, limit - start)
    exact = _toeplitz(tensor, [a for a, _ in cut]) if len(cut) == 2 else None
    if exact is None and value.exact is not None and value.exact.moved(lambda i: i) is not None:
        exact = value.exact if isinstance(value.exact, Steps) and value.exact.is_uniform else None
    return Value(tuple(axes), Kind.POSITION, exact, tensor, cut)


def _toeplitz(tensor: torch.Tensor | None, axes: list[int]) -> Steps | None:
    """A constant [.., N, .., N] mask as a function of distance, if by value it is one."""
    if tensor is None or tensor.numel() != math.prod(tensor.shape[a] for a in axes):
        return None
    row, col = sorted(axes)
    square = tensor.reshape(tensor.shape[row], tensor.shape[col])
    if not torch.equal(square[1:, 1:], square[:-1, :-1]) or bool(torch.isnan(square).any()):
        return None
    below, above = square[:, 0].tolist(), square[0, 1:].tolist()
    values = [*reversed(above), *below]  # distance -(len(above)) .. len(below) - 1
    breaks = [i - len(above) for i in range(1, len(values)) if values[i] != values[i - 1]]
    pieces = [values[0], *(values[b + len(above)] for b in breaks)]
    steps = Steps(tuple(breaks), tuple(pieces), row, col)
    return ex.compact(steps) if len(breaks) <= 8 else None


def _pick(
    node: fx.Node, state: Classified, value: Value, axis: int, index: int, keep: bool
) -> Value:
    """One index of an axis of an exactly known value."""
    exact = value.exact
    gone: Callable[[int], int | None] = (
        (lambda i: i) if keep else (lambda i: i - (i > axis) if i != axis else None)
    )
    if isinstance(exact, Affine):
        coefficients = dict(exact.coefficients)
        offset = exact.offset + coefficients.pop(axis, 0) * index
        picked: Exact | None = Affine.of(offset, coefficients).moved(gone)
    elif exact is not None and exact.is_uniform:
        picked = exact
    else:
        picked = None
    if picked is None:
        raise Refused("takes one token out of the token axis")
    axes = list(value.axes)
    if keep:
        axes[axis] = ()
    else:
        del axes[axis]
    return known_exactly(node, state, tuple(axes), value.kind, picked)


def _select(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    axis, index = argument(node, "dim") % rank_of(value), argument(node, "index")
    if any(isinstance(a, str) for a in value.axes[axis]):
        if isinstance(index, int) and index >= 0 and value.exact is not None:
            return _pick(node, state, value, axis, index, keep=False)
        raise Refused("takes one token or row out of the sequence")
    axes = value.axes[:axis] + value.axes[axis + 1 :]

    def where(i: int) -> int | None:
        return None if i == axis else i - (i > axis)

    return with_tensor(moved_axes(value, axes, where), node, state)


def _split(node: fx.Node, state: Classified) -> Value:
    """Chunk, split, unbind: pieces of an axis that holds no tokens."""
    value = tensor_of(node, state)
    axis = argument(node, "dim", 0) % rank_of(value)
    if any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("splits the token axis")
    return value


def getitem(node: fx.Node, state: Classified) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = value_of(source, state)
    name = target_name(source)
    if "split" in name or "chunk" in name:
        axis = argument(source, "dim", 0) % rank_of(value)
        axes = list(value.axes)
        axes[axis] = state.extents.axis(extents(node)[axis])
        return Value(tuple(axes), value.kind)
    if "unbind" in name:
        axis = argument(source, "dim", 0) % rank_of(value)
        return Value(value.axes[:axis] + value.axes[axis + 1 :], value.kind)
    if len(extents(node)) == rank_of(value):
        # Reductions, normalisations and sorts with several results of the same axes.
        axes_out = tuple(
            axis if any(isinstance(a, str) for a in axis) else state.extents.axis(size)
            for axis, size in zip(value.axes, extents(node), strict=True)
        )
        return Value(axes_out, value.kind)
    raise Refused(f"one result of {name}")


def _repeat(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    repeats = argument(node, "repeats")
    shift = len(repeats) - rank_of(value)
    axes: list[Axis] = []
    kept: dict[int, int] = {}
    for i, count in enumerate(repeats):
        have: Axis = value.axes[i - shift] if i >= shift else ()
        factor = state.extents.axis(symbol_of(count))
        if (have and TOKEN in factor) or (factor and TOKEN in have):
            raise Refused("repeats the token axis")
        if TOKEN in factor and value.kind is Kind.LOCAL:
            raise Refused("token data is spread over another token axis")
        axes.append(merge_numbers((*factor, *have)))
        if not factor:
            kept[i - shift] = i
    exact = value.exact.moved(kept.get) if value.exact is not None else None
    return Value(tuple(axes), value.kind, exact)


def _repeat_interleave(node: fx.Node, state: Classified) -> Value:
    value, axis = tensor_of(node, state), argument(node, "dim")
    if axis is None or not isinstance(argument(node, "repeats"), int):
        raise Refused("repeat_interleave over all axes or by a tensor")
    axis %= rank_of(value)
    if any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("repeats the token axis")
    axes = list(value.axes)
    axes[axis] = merge_numbers((*axes[axis], argument(node, "repeats")))
    return Value(tuple(axes), value.kind)


def _cat(node: fx.Node, state: Classified) -> Value:
    parts = [value_of(n, state) for n in node.args[0]]  # type: ignore[union-attr]
    stacked = "stack" in target_name(node)
    rank = rank_of(parts[0]) + stacked
    axis = argument(node, "dim") % rank
    kind = max(p.kind for p in parts)
    if stacked:
        axes = list(broadcast([p.axes for p in parts]))
        axes.insert(axis, state.extents.axis(extents(node)[axis]))
        return Value(tuple(axes), kind)
    if any(isinstance(a, str) for p in parts for a in p.axes[axis]):
        raise Refused("concatenates along the token axis")
    rest = [(*p.axes[:axis], (), *p.axes[axis + 1 :]) for p in parts]
    if len(set(rest)) > 1:
        raise Refused("concatenates tensors whose token axes differ")
    axes = list(rest[0])
    axes[axis] = state.extents.axis(extents(node)[axis])
    return Value(tuple(axes), kind)


def _pad(node: fx.Node, state: Classified) -> Value:
    value, pads = tensor_of(node, state), argument(node, "pad")
    axes = list(value.axes)
    for i in range(len(pads) // 2):
        axis = rank_of(value) - 1 - i
        if pads[2 * i] == 0 and pads[2 * i + 1] == 0:
            continue
        if any(isinstance(a, str) for a in axes[axis]):
            raise Refused("pads the token axis, which shifts tokens against each other")
        if extents(node)[axis].free_symbols:
            raise Refused("pads a constant to the number of tokens")
        axes[axis] = state.extents.axis(extents(node)[axis])
    return Value(tuple(axes), value.kind)


RULES: dict[str, Rule] = {
    "aten.slice": _slice,
    "aten.narrow": _narrow,
    "aten.select": _select,
    **dict.fromkeys(
        ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split"),
        _split,
    ),
    "aten.repeat": _repeat,
    "aten.repeat_interleave": _repeat_interleave,
    **dict.fromkeys(("aten.cat", "aten.concat", "aten.stack"), _cat),
    "aten.pad": _pad,
    "aten.constant_pad_nd": _pad,
}

# These judge symbolic numbers themselves.
TAKES_SIZES = frozenset({_slice, _narrow, _repeat})
