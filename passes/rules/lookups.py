"""Tables read by index, and where they end."""

from __future__ import annotations

import math

import torch
from torch import fx

from .. import exact as ex
from ..classify_tokens import Bound, Classified
from ..exact import Affine, Exact, Steps
from ..graph_tools import argument, extents
from ..token_axes import TOKEN, Axis, Kind, Refused, Value, broadcast
from .reading import Rule, known_exactly, lifted, rank_of, tensor_of, value_of


def _embedding(node: fx.Node, state: Classified) -> Value:
    weight, indices = tensor_of(node, state, "weight"), tensor_of(node, state, "indices")
    if weight.kind is not Kind.CONSTANT or weight.token_axes:
        raise Refused("an embedding table that depends on tokens")
    _note_bound(node, state, weight.axes[0], indices)
    return Value((*indices.axes, *weight.axes[1:]), indices.kind)


def _one_hot(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    return Value((*value.axes, state.extents.axis(extents(node)[-1])), value.kind)


def _note_bound(node: fx.Node, state: Classified, rows: Axis, indices: Value) -> None:
    """A table read at ``slope * position + offset`` ends the context where it ends."""
    limit = int(rows[0]) if rows else 1
    exact = indices.exact
    if indices.kind is Kind.POSITION and isinstance(exact, Affine):
        slopes = [c for axis, c in exact.coefficients if TOKEN in indices.axes[axis]]
        if len(slopes) != 1 or slopes[0] <= 0 or exact.offset < 0:
            raise Refused("reads a table at positions that are not counted from the start")
        bound = math.ceil((limit - exact.offset) / slopes[0])
        state.bounds.append(Bound(bound, node.name))


def _index(node: fx.Node, state: Classified) -> Value:
    value, indices = tensor_of(node, state), list(node.args[1])  # type: ignore[arg-type]
    indices += [None] * (rank_of(value) - len(indices))
    used = [i for i, index in enumerate(indices) if index is not None]
    picked = [value_of(indices[i], state) for i in used]
    if any(indices[i].meta["val"].dtype == torch.bool for i in used):
        raise Refused("indexes with a boolean mask")
    shape = broadcast([p.axes for p in picked])
    kind = max(value.kind, *(p.kind for p in picked))
    together = used == list(range(used[0], used[-1] + 1))
    rest = [axis for i, axis in enumerate(value.axes) if i not in used]
    at = used[0] if together else 0
    axes = (*rest[:at], *shape, *rest[at:])
    if not any(isinstance(a, str) for i in used for a in value.axes[i]):
        if len(used) == 1:
            _note_bound(node, state, value.axes[used[0]], picked[0])
        return Value(tuple(axes), kind)
    exact = _index_exact(value, used, picked, len(axes))
    if exact is None:
        raise Refused("reads other tokens by index")
    return known_exactly(node, state, tuple(axes), kind, exact)


def _index_exact(value: Value, used: list[int], picked: list[Value], rank: int) -> Exact | None:
    """Affine values looked up at affine indices, as ``position_ids[row, key]`` in mask code."""
    if isinstance(value.exact, Steps):
        return value.exact if value.exact.is_uniform else None
    if value.exact is None or len(used) != rank_of(value):
        return None
    total: Exact | None = Steps.uniform(value.exact.offset)
    for axis, coefficient in value.exact.coefficients:
        index = lifted(picked[used.index(axis)], rank)
        if index is None or total is None or not _counts_up(index):
            return None  # a negative index would count from the end
        total = ex.add(total, index, coefficient)
    return total


def _counts_up(index: Exact) -> bool:
    """Whether every element is shown to be at least 0."""
    if isinstance(index, Affine):
        return index.offset >= 0 and all(c > 0 for _, c in index.coefficients)
    return all(value >= 0 for value in index.values)


def _index_select(node: fx.Node, state: Classified) -> Value:
    value, index = tensor_of(node, state), tensor_of(node, state, "index")
    axis = argument(node, "dim") % rank_of(value)
    if any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("reads other tokens by index")
    _note_bound(node, state, value.axes[axis], index)
    axes = (*value.axes[:axis], *(index.axes or ((),)), *value.axes[axis + 1 :])
    return Value(axes, max(value.kind, index.kind))


def _gather(node: fx.Node, state: Classified) -> Value:
    value, index = tensor_of(node, state), tensor_of(node, state, "index")
    axis = argument(node, "dim") % rank_of(value)
    # The index may hold tokens along this axis: each then picks its own row of a constant.
    if any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("gathers along the token axis")
    for i, (a, b) in enumerate(zip(value.axes, index.axes, strict=True)):
        if i != axis and a != b:
            raise Refused("gathers across different axes")
    _note_bound(node, state, value.axes[axis], index)
    return Value(index.axes, max(value.kind, index.kind))


RULES: dict[str, Rule] = {
    "aten.embedding": _embedding,
    "aten.one_hot": _one_hot,
    "aten.index": _index,
    "aten.index_select": _index_select,
    "aten.gather": _gather,
}
