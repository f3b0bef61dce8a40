"""Views and rearrangements: where the token axis goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..classify_tokens import Classified
from ..graph_tools import argument, aten, extents, target_name
from ..token_axes import BATCH, TOKEN, Axis, Kind, Refused, Value, reshape
from .reading import Rule, moved_axes, rank_of, tensor_of, value_of, with_tensor


def _view(node: fx.Node, state: Classified) -> Value:
    value = value_of(node.all_input_nodes[0], state)
    axes = reshape(value.axes, extents(node), state.extents)
    if node.target is aten.view.dtype:
        return Value(axes, value.kind)  # the same bits mean other numbers
    table = _kept_axes(value.axes, axes)
    moved = with_tensor(moved_axes(value, axes, table.get), node, state)
    return _carry_table(value, moved, table.get)


def _kept_axes(before: tuple[Axis, ...], after: tuple[Axis, ...]) -> dict[int, int]:
    """Where axes went in a row-major view: those that are whole on both sides keep their order."""
    table: dict[int, int] = {}
    for atom in (TOKEN, BATCH):
        old = [i for i, axis in enumerate(before) if atom in axis]
        new = [i for i, axis in enumerate(after) if atom in axis]
        for i, j in zip(old, new, strict=True):
            if before[i] == after[j] == (atom,):
                table[i] = j
    sized = [[i for i, axis in enumerate(axes) if axis] for axes in (before, after)]
    if [before[i] for i in sized[0]] == [after[i] for i in sized[1]]:
        table = dict(zip(*sized, strict=True))
    return table


def _carry_table(value: Value, moved: Value, where: Callable[[int], int | None]) -> Value:
    """A sliced table keeps its rows while axes of size one come and go or axes are swapped."""
    if not value.cut or value.tensor is None:
        return moved
    order: list[int | None] = [None] * len(moved.axes)
    for axis in range(len(value.axes)):
        target = where(axis)
        if target is not None:
            order[target] = axis
    kept = [axis for axis in order if axis is not None]
    dropped = [axis for axis in range(len(value.axes)) if axis not in kept]
    if any(value.tensor.shape[axis] != 1 for axis in dropped):
        return moved
    tensor = value.tensor.permute([*kept, *dropped])
    tensor = tensor.reshape([1 if axis is None else value.tensor.shape[axis] for axis in order])
    return Value(moved.axes, moved.kind, moved.exact, tensor, moved.cut)


def _permuted(node: fx.Node, state: Classified, order: Sequence[int]) -> Value:
    value = value_of(node.all_input_nodes[0], state)
    axes = tuple(value.axes[i] for i in order)
    where = {old: new for new, old in enumerate(order)}
    moved = with_tensor(moved_axes(value, axes, where.get), node, state)
    return _carry_table(value, moved, where.get)


def _transpose(node: fx.Node, state: Classified) -> Value:
    rank = rank_of(tensor_of(node, state))
    order = list(range(rank))
    if target_name(node).startswith("aten.numpy_T"):
        return _permuted(node, state, order[::-1])
    if rank >= 2:
        a = argument(node, "dim0", argument(node, "axis0", rank - 2)) % rank
        b = argument(node, "dim1", argument(node, "axis1", rank - 1)) % rank
        order[a], order[b] = order[b], order[a]
    return _permuted(node, state, order)


def _permute(node: fx.Node, state: Classified) -> Value:
    rank = rank_of(tensor_of(node, state))
    return _permuted(node, state, [d % rank for d in argument(node, "dims")])


def _movedim(node: fx.Node, state: Classified) -> Value:
    rank = rank_of(tensor_of(node, state))
    source, target = argument(node, "source"), argument(node, "destination")
    source = [source] if isinstance(source, int) else source
    target = [target] if isinstance(target, int) else target
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta").movedim(source, target)
    return _permuted(node, state, [size - 2 for size in probe.shape])


def _expand(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    sizes = extents(node)
    shift = len(sizes) - rank_of(value)
    axes: list[Axis] = []
    for i, size in enumerate(sizes):
        have: Axis = value.axes[i - shift] if i >= shift else ()
        axes.append(have or state.extents.axis(size))
    grown = [
        i
        for i, axis in enumerate(axes)
        if TOKEN in axis and (i < shift or TOKEN not in value.axes[i - shift])
    ]
    if grown and value.kind is Kind.LOCAL:
        raise Refused("token data is spread over another token axis")
    return with_tensor(moved_axes(value, tuple(axes), lambda axis: axis + shift), node, state)


def _unsqueeze(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    axis = argument(node, "dim") % (rank_of(value) + 1)
    axes = (*value.axes[:axis], (), *value.axes[axis:])
    moved = with_tensor(moved_axes(value, axes, lambda i: i + (i >= axis)), node, state)
    return _carry_table(value, moved, lambda i: i + (i >= axis))


def _as_complex(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    return Value(value.axes[:-1], value.kind)


def _as_real(node: fx.Node, state: Classified) -> Value:
    value = tensor_of(node, state)
    return Value((*value.axes, (2,)), value.kind)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "aten.view",
            "aten.reshape",
            "aten._unsafe_view",
            "aten.flatten",
            "aten.unflatten",
            "aten.squeeze",
            "aten.view_as",
            "aten.reshape_as",
        ),
        _view,
    ),
    "aten.unsqueeze": _unsqueeze,
    **dict.fromkeys(
        ("aten.transpose", "aten.t", "aten.mT", "aten.numpy_T", "aten.swapaxes", "aten.swapdims"),
        _transpose,
    ),
    "aten.permute": _permute,
    "aten.movedim": _movedim,
    "aten.expand": _expand,
    "aten.expand_as": _expand,
    "aten.view_as_complex": _as_complex,
    "aten.view_as_real": _as_real,
}

# Their sizes end up in the shape of the result, where they are checked against its axes.
TAKES_SIZES = frozenset({_view, _expand})
