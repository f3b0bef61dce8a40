"""The rules of the proof: for each operation, when its result stays with its own token."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from . import exact as ex
from .classify_tokens import Bound, Classified, Gather, Rematerialise
from .exact import Affine, Exact, Steps
from .graph_tools import argument, aten, extent, extents, target_name
from .token_axes import (
    BATCH,
    TOKEN,
    Atom,
    Axis,
    Kind,
    Refused,
    Value,
    broadcast,
    merge_numbers,
    reshape,
)

Rule = Callable[[fx.Node, Classified], Value]

_LAST = 2**63 - 1
_FULL_PRECISION = (torch.float32, torch.float64)


def apply_rule(node: fx.Node, state: Classified) -> Value:
    """What is known of `node`, given its inputs; raises `Refused` with the reason."""
    fake = node.meta.get("val")
    if isinstance(fake, torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
        return Value(())
    rule = _rule(node)
    if rule is None:
        return _constant_only(node, state)
    if rule not in _TAKES_SIZES and any(_symbolic_argument(a, state) for a in _flat(node)):
        raise Refused(f"the number of tokens or rows is used as data by {target_name(node)}")
    return rule(node, state)


def _flat(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    for operand in (*node.args, *node.kwargs.values()):
        found += operand if isinstance(operand, list | tuple) else [operand]
    return found


def _symbolic_argument(operand: Any, state: Classified) -> bool:
    """Whether a number among the arguments is computed from the length or the batch size."""
    if not _is_number_node(operand):
        return False
    size = operand.meta.get("val")
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    return state.extents.depends(sympy.sympify(size.node.expr))


def _rule(node: fx.Node) -> Rule | None:
    target = node.target
    if target is operator.getitem:
        return _getitem
    if not isinstance(target, torch._ops.OpOverload):
        return None
    name = f"{target.namespace}.{target._schema.name.split('::')[1]}"
    if name in _RULES:
        return _RULES[name]
    tags = target.tags
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return pointwise
    return None


def _constant_only(node: fx.Node, state: Classified) -> Value:
    """An operation without a rule is fine on constants alone, sizes included."""
    inputs = [_value(n, state) for n in node.all_input_nodes]
    fake = node.meta.get("val")
    plain = all(
        isinstance(n.meta.get("val"), torch.Tensor)
        and v.kind is Kind.CONSTANT
        and not any(isinstance(a, str) for axis in v.axes for a in axis)
        for n, v in zip(node.all_input_nodes, inputs, strict=True)
    )
    if inputs and plain and isinstance(fake, torch.Tensor):
        axes = _fresh_axes(node, state)
        if not any(isinstance(a, str) for axis in axes for a in axis):
            return Value(axes, Kind.CONSTANT)
    raise Refused(f"{target_name(node)} is not known to keep tokens apart")


# --- reading inputs ----------------------------------------------------------------------------


def _value(node: Any, state: Classified) -> Value:
    value = state.values[node]
    assert isinstance(value, Value)
    return value


def _tensor(node: fx.Node, state: Classified, name: str = "self") -> Value:
    return _value(argument(node, name), state)


def _fresh_axes(node: fx.Node, state: Classified) -> tuple[Axis, ...]:
    return tuple(state.extents.axis(e) for e in extents(node))


def _rank(value: Value) -> int:
    return len(value.axes)


def _number(node: fx.Node, operand: Any, state: Classified) -> Any:
    """A literal operand; refuses numbers that are computed from the length or the batch size."""
    size: Any = operand
    if isinstance(operand, fx.Node):
        size = operand.meta.get("val")
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        if state.extents.depends(sympy.sympify(size.node.expr)):
            raise Refused("the number of tokens or rows is used as data")
        raise Refused("a symbolic number is used as data")
    return operand


def _symbol(size: Any) -> sympy.Expr:
    return extent(size.meta["val"] if isinstance(size, fx.Node) else size)


def _is_number_node(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and not isinstance(operand.meta.get("val"), torch.Tensor)


# --- elementwise -------------------------------------------------------------------------------


def pointwise(node: fx.Node, state: Classified) -> Value:
    """Elementwise operations: local when the token axes of all operands are the same axis."""
    operands: list[Any] = []
    for operand in itertools.chain(node.args, node.kwargs.values()):
        if isinstance(operand, fx.Node) and not _is_number_node(operand):
            operands.append(_value(operand, state))
        elif isinstance(operand, list | tuple):
            if any(isinstance(o, fx.Node) for o in operand):
                raise Refused(f"{target_name(node)} over a list of tensors")
        else:
            _number(node, operand, state)
    values = [v for v in operands if isinstance(v, Value)]
    axes = broadcast([v.axes for v in values])
    kind = max((v.kind for v in values), default=Kind.CONSTANT)
    exact = _pointwise_exact(node, state, len(axes))
    # A cut table's rows would no longer be known to be rows, so only whole constants are carried on.
    tensor = None if any(v.token_axes for v in values) else _evaluated(node, state)
    return Value(axes, kind, exact, tensor)


def _evaluated(node: fx.Node, state: Classified) -> torch.Tensor | None:
    """The result itself when every input is a small constant."""
    tensors = [_value(n, state).tensor for n in node.all_input_nodes]
    if not tensors or any(t is None for t in tensors):
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _value(n, state).tensor)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    return result if isinstance(result, torch.Tensor) else None


def _pointwise_exact(node: fx.Node, state: Classified, rank: int) -> Exact | None:
    nodes = [n for n in node.all_input_nodes if not _is_number_node(n)]
    found = [(n, _lifted(_value(n, state), rank)) for n in nodes]
    if not found or any(e is None for _, e in found):
        return None
    known = {n: e for n, e in found if e is not None}
    if any(isinstance(e, Affine) for e in known.values()):
        return _affine_pointwise(node, known)
    return _steps_pointwise(node, known)


def _lifted(value: Value, rank: int) -> Exact | None:
    """An operand's exact value over the result's axes."""
    shift = rank - _rank(value)
    return value.exact.moved(lambda axis: axis + shift) if value.exact is not None else None


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


# --- views -------------------------------------------------------------------------------------


def _moved(value: Value, axes: tuple[Axis, ...], where: Callable[[int], int | None]) -> Value:
    """The same elements with every axis at a new place."""
    exact = value.exact.moved(where) if value.exact is not None else None
    cut = tuple((t, start) for axis, start in value.cut if (t := where(axis)) is not None)
    if len(cut) != len(value.cut):
        cut = ()
    return Value(axes, value.kind, exact, None, cut)


def _with_tensor(value: Value, node: fx.Node, state: Classified) -> Value:
    tensor = _evaluated(node, state) if not value.token_axes else None
    return Value(value.axes, value.kind, value.exact, tensor, value.cut)


def _view(node: fx.Node, state: Classified) -> Value:
    value = _value(node.all_input_nodes[0], state)
    axes = reshape(value.axes, extents(node), state.extents)
    table = _kept_axes(value.axes, axes)
    moved = _with_tensor(_moved(value, axes, table.get), node, state)
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
    order = [None] * len(moved.axes)
    for axis in range(len(value.axes)):
        target = where(axis)
        if target is not None:
            order[target] = axis  # type: ignore[call-overload]
    kept = [axis for axis in order if axis is not None]
    dropped = [axis for axis in range(len(value.axes)) if axis not in kept]
    if any(value.tensor.shape[axis] != 1 for axis in dropped):
        return moved
    tensor = value.tensor.permute(*kept, *dropped)
    tensor = tensor.reshape([1 if axis is None else value.tensor.shape[axis] for axis in order])
    return Value(moved.axes, moved.kind, moved.exact, tensor, moved.cut)


def _permuted(node: fx.Node, state: Classified, order: Sequence[int]) -> Value:
    value = _value(node.all_input_nodes[0], state)
    axes = tuple(value.axes[i] for i in order)
    where = {old: new for new, old in enumerate(order)}
    moved = _with_tensor(_moved(value, axes, where.get), node, state)
    return _carry_table(value, moved, where.get)


def _transpose(node: fx.Node, state: Classified) -> Value:
    rank = _rank(_tensor(node, state))
    order = list(range(rank))
    if rank >= 2:
        a = argument(node, "dim0", rank - 2) % rank
        b = argument(node, "dim1", rank - 1) % rank
        order[a], order[b] = order[b], order[a]
    return _permuted(node, state, order)


def _permute(node: fx.Node, state: Classified) -> Value:
    rank = _rank(_tensor(node, state))
    return _permuted(node, state, [d % rank for d in argument(node, "dims")])


def _movedim(node: fx.Node, state: Classified) -> Value:
    rank = _rank(_tensor(node, state))
    source, target = argument(node, "source"), argument(node, "destination")
    source = [source] if isinstance(source, int) else source
    target = [target] if isinstance(target, int) else target
    probe = torch.empty(tuple(range(2, rank + 2)), device="meta").movedim(source, target)
    return _permuted(node, state, [size - 2 for size in probe.shape])


def _expand(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    sizes = extents(node)
    shift = len(sizes) - _rank(value)
    axes: list[Axis] = []
    for i, size in enumerate(sizes):
        have: Axis = value.axes[i - shift] if i >= shift else ()
        axes.append(have or state.extents.axis(size))
    grown = [i for i, axis in enumerate(axes) if TOKEN in axis and (
        i < shift or TOKEN not in value.axes[i - shift]
    )]
    if grown and value.kind is Kind.LOCAL:
        raise Refused("token data is spread over another token axis")
    return _with_tensor(_moved(value, tuple(axes), lambda axis: axis + shift), node, state)


def _slice(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    axis = argument(node, "dim") % _rank(value)
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    start = 0 if start is None else start
    if not isinstance(start, int) or not isinstance(step, int):
        raise Refused("a slice that starts at a place computed from the length")
    size = value.axes[axis]
    out = extents(node)[axis]
    if not any(isinstance(a, str) for a in size):
        return _slice_constant(node, state, value, axis, start, step, out)
    whole = end is None or end == _LAST or _symbol(end) == extents(node.args[0])[axis]  # type: ignore[arg-type]
    if start == 0 and whole and step == 1:
        return Value(value.axes, value.kind, value.exact, value.tensor, value.cut)
    if isinstance(start, int) and start >= 0 and out == 1 and value.exact is not None:
        return _pick(node, state, value, axis, start, keep=True)
    raise Refused("takes a part of the token axis")


def _narrow(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    axis, start = argument(node, "dim") % _rank(value), argument(node, "start")
    if any(isinstance(a, str) for a in value.axes[axis]):
        if start == 0 and _symbol(argument(node, "length")) == extents(node.args[0])[axis]:  # type: ignore[arg-type]
            return value
        raise Refused("takes a part of the token axis")
    return _slice_constant(node, state, value, axis, start, 1, extents(node)[axis])


def _slice_constant(
    node: fx.Node, state: Classified, value: Value, axis: int, start: Any, step: int, out: sympy.Expr
) -> Value:
    if not isinstance(start, int):
        raise Refused("a slice that starts at a place computed from the length")
    if not out.free_symbols:
        if any(_symbolic_argument(a, state) for a in _flat(node)):
            raise Refused("a slice that ends at a place computed from the length")
        axes = list(value.axes)
        axes[axis] = state.extents.axis(out)
        return _with_tensor(_moved(value, tuple(axes), lambda i: i), node, state)
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
    if tensor is not None and value.kind is Kind.CONSTANT:
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
    return _known(node, state, tuple(axes), value.kind, picked)


def _known(
    node: fx.Node, state: Classified, axes: tuple[Axis, ...], kind: Kind, exact: Exact
) -> Value:
    """An exactly known result of an operation that looks along the token axis."""
    state.rewrites[node] = Rematerialise(exact, axes)
    return Value(axes, kind, exact)


def _select(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    axis, index = argument(node, "dim") % _rank(value), argument(node, "index")
    if any(isinstance(a, str) for a in value.axes[axis]):
        if isinstance(index, int) and index >= 0 and value.exact is not None:
            return _pick(node, state, value, axis, index, keep=False)
        raise Refused("takes one token or row out of the sequence")
    axes = value.axes[:axis] + value.axes[axis + 1 :]

    def where(i: int) -> int | None:
        return None if i == axis else i - (i > axis)

    return _with_tensor(_moved(value, axes, where), node, state)


def _unsqueeze(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    axis = argument(node, "dim") % (_rank(value) + 1)
    axes = (*value.axes[:axis], (), *value.axes[axis:])
    moved = _with_tensor(_moved(value, axes, lambda i: i + (i >= axis)), node, state)
    return _carry_table(value, moved, lambda i: i + (i >= axis))


def _split(node: fx.Node, state: Classified) -> Value:
    """Chunk, split, unbind: pieces of an axis that holds no tokens."""
    value = _tensor(node, state)
    axis = argument(node, "dim", 0) % _rank(value)
    if any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("splits the token axis")
    return value


def _getitem(node: fx.Node, state: Classified) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    value = _value(source, state)
    name = target_name(source)
    if "split" in name or "chunk" in name:
        axis = argument(source, "dim", 0) % _rank(value)
        axes = list(value.axes)
        axes[axis] = state.extents.axis(extents(node)[axis])
        return Value(tuple(axes), value.kind)
    if "unbind" in name:
        axis = argument(source, "dim", 0) % _rank(value)
        return Value(value.axes[:axis] + value.axes[axis + 1 :], value.kind)
    if len(extents(node)) == _rank(value):
        # Reductions, normalisations and sorts with several results of the same axes.
        axes_out = tuple(
            axis if any(isinstance(a, str) for a in axis) else state.extents.axis(size)
            for axis, size in zip(value.axes, extents(node), strict=True)
        )
        return Value(axes_out, value.kind)
    raise Refused(f"one result of {name}")


def _repeat(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    repeats = argument(node, "repeats")
    shift = len(repeats) - _rank(value)
    axes: list[Axis] = []
    for i, count in enumerate(repeats):
        have: Axis = value.axes[i - shift] if i >= shift else ()
        factor = state.extents.axis(_symbol(count))
        if have and TOKEN in factor or (factor and TOKEN in have):
            raise Refused("repeats the token axis")
        if TOKEN in factor and value.kind is Kind.LOCAL:
            raise Refused("token data is spread over another token axis")
        axes.append(merge_numbers((*factor, *have)))
    exact = value.exact if isinstance(value.exact, Steps) and value.exact.is_uniform else None
    return Value(tuple(axes), value.kind, exact)


def _repeat_interleave(node: fx.Node, state: Classified) -> Value:
    value, axis = _tensor(node, state), argument(node, "dim")
    if axis is None or not isinstance(argument(node, "repeats"), int):
        raise Refused("repeat_interleave over all axes or by a tensor")
    axis %= _rank(value)
    if any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("repeats the token axis")
    axes = list(value.axes)
    axes[axis] = merge_numbers((*axes[axis], argument(node, "repeats")))
    return Value(tuple(axes), value.kind)


def _as_complex(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    return Value(value.axes[:-1], value.kind)


def _as_real(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    return Value((*value.axes, (2,)), value.kind)


def _cat(node: fx.Node, state: Classified) -> Value:
    parts = [_value(n, state) for n in node.args[0]]  # type: ignore[union-attr]
    stacked = "stack" in target_name(node)
    rank = _rank(parts[0]) + stacked
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
    value, pads = _tensor(node, state), argument(node, "pad")
    axes = list(value.axes)
    for i in range(len(pads) // 2):
        axis = _rank(value) - 1 - i
        if pads[2 * i] == 0 and pads[2 * i + 1] == 0:
            continue
        if any(isinstance(a, str) for a in axes[axis]):
            raise Refused("pads the token axis, which shifts tokens against each other")
        if extents(node)[axis].free_symbols:
            raise Refused("pads a constant to the number of tokens")
        axes[axis] = state.extents.axis(extents(node)[axis])
    return Value(tuple(axes), value.kind)


# --- reductions and normalisations -------------------------------------------------------------


def _reduced_axes(node: fx.Node, value: Value) -> list[int]:
    dims = argument(node, "dim")
    if dims is None or dims == []:
        return list(range(_rank(value)))
    dims = [dims] if isinstance(dims, int) else dims
    return [d % _rank(value) for d in dims] if _rank(value) else []


def _reduction(node: fx.Node, state: Classified) -> Value:
    """Sums, means, maxima and the like: local unless they run over tokens or rows."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if any(a.name == "other" for a in node.target._schema.arguments):
        return pointwise(node, state)
    value = _tensor(node, state)
    reduced = _reduced_axes(node, value)
    _keeps_apart(value, reduced, "reduces over")
    fake = node.meta["val"]
    first = fake[0] if isinstance(fake, tuple | list) else fake
    keep = first.dim() == _rank(value)
    axes = tuple(
        () if i in reduced else axis
        for i, axis in enumerate(value.axes)
        if keep or i not in reduced
    )
    return Value(axes, value.kind)


def _along(node: fx.Node, state: Classified) -> Value:
    """Softmax, cumulative operations and sorts along one axis that holds no tokens."""
    value = _tensor(node, state)
    axis = argument(node, "dim") % _rank(value)
    if "cumsum" in target_name(node) and any(isinstance(a, str) for a in value.axes[axis]):
        return _cumsum(node, state, value, axis)
    _keeps_apart(value, [axis], "runs along")
    axes = list(value.axes)
    if "topk" in target_name(node):
        axes[axis] = (argument(node, "k"),)
    return Value(tuple(axes), value.kind)


def _keeps_apart(value: Value, axes: Sequence[int], verb: str) -> None:
    atoms = {atom for axis in axes for atom in value.axes[axis]}
    if TOKEN in atoms:
        raise Refused(f"{verb} the token axis")
    if BATCH in atoms:
        raise Refused(f"{verb} the batch axis, which lets rows see each other")


def _cumsum(node: fx.Node, state: Classified, value: Value, axis: int) -> Value:
    exact = value.exact
    if not isinstance(exact, Steps) or not exact.is_uniform or value.axes[axis] != (TOKEN,):
        raise Refused("accumulates data along the token axis")
    step = exact.value
    step = int(step) if isinstance(step, bool) else step
    return _known(node, state, value.axes, Kind.POSITION, Affine.of(step, {axis: step}))


def _diff(node: fx.Node, state: Classified) -> Value:
    """``diff(position_ids, prepend=first - 1)``: how transformers finds packed sequences."""
    value = _tensor(node, state)
    axis = argument(node, "dim") % _rank(value)
    if not any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("diff over another axis")
    prepend = argument(node, "prepend")
    before = _value(prepend, state).exact if prepend is not None else None
    exact = value.exact
    if (
        argument(node, "n") != 1
        or argument(node, "append") is not None
        or not isinstance(exact, Affine)
        or before is None
        or value.axes[axis] != (TOKEN,)
    ):
        raise Refused("takes differences along the token axis")
    slope = dict(exact.coefficients).get(axis, 0)
    expected = Affine.of(
        exact.offset - slope, {a: c for a, c in exact.coefficients if a != axis}
    )
    if before != expected:
        raise Refused("takes differences along the token axis")
    return _known(node, state, value.axes, Kind.POSITION, Steps.uniform(slope))


def _normalisation(node: fx.Node, state: Classified) -> Value:
    """Layer and RMS normalisation over the last axes."""
    value = _tensor(node, state, "input")
    count = len(argument(node, "normalized_shape"))
    _keeps_apart(value, range(_rank(value) - count, _rank(value)), "normalises over")
    return Value(value.axes, value.kind)


def _group_norm(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state, "input")
    _keeps_apart(value, range(1, _rank(value)), "normalises over")
    return Value(value.axes, value.kind)


def _batch_norm(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state, "input")
    if argument(node, "training"):
        raise Refused("normalises over the batch axis, which lets rows see each other")
    if any(isinstance(a, str) for a in value.axes[1]):
        raise Refused("batch normalisation with tokens as channels")
    return Value(value.axes, value.kind)


# --- products ----------------------------------------------------------------------------------


def _product_axes(left: Value, right: Value) -> Value:
    """``left @ right``: local when the summed axis holds no tokens and rows keep their token."""
    a = left.axes if _rank(left) > 1 else ((), *left.axes)
    b = right.axes if _rank(right) > 1 else (*right.axes, ())
    for summed in (a[-1], b[-2]):
        if TOKEN in summed:
            raise Refused("sums over the token axis")
        if BATCH in summed:
            raise Refused("sums over the batch axis, which lets rows see each other")
    out = [*broadcast([a[:-2], b[:-2]]), a[-2], b[-1]]
    if _rank(left) == 1:
        del out[-2]
    if _rank(right) == 1:
        del out[-1]
    return Value(tuple(out), max(left.kind, right.kind))


def _matmul(node: fx.Node, state: Classified) -> Value:
    left, right = (_value(n, state) for n in node.args[-2:])
    value = _product_axes(left, right)
    extra = [_value(n, state) for n in node.args[:-2] if isinstance(n, fx.Node)]
    if not extra:
        return value
    axes = broadcast([value.axes, *(v.axes for v in extra)])
    return Value(axes, max(value.kind, *(v.kind for v in extra)))


def _linear(node: fx.Node, state: Classified) -> Value:
    value, weight = _tensor(node, state, "input"), _tensor(node, state, "weight")
    if weight.kind is not Kind.CONSTANT or weight.token_axes:
        raise Refused("a linear layer whose weights depend on tokens")
    _keeps_apart(value, [_rank(value) - 1], "sums over")
    return Value((*value.axes[:-1], *weight.axes[:-1]), max(value.kind, weight.kind))


def _outer(node: fx.Node, state: Classified) -> Value:
    left, right = (_value(n, state) for n in node.args)
    return Value((*left.axes, *right.axes), max(left.kind, right.kind))


def _one_hot(node: fx.Node, state: Classified) -> Value:
    value = _tensor(node, state)
    return Value((*value.axes, state.extents.axis(extents(node)[-1])), value.kind)


def _einsum(node: fx.Node, state: Classified) -> Value:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if "." in equation or "->" not in equation:
        raise Refused(f"einsum {equation!r} with unnamed axes")
    inputs, out = equation.split("->")
    letters: dict[str, Axis] = {}
    values = [_value(n, state) for n in operands]  # type: ignore[union-attr]
    for names, value in zip(inputs.split(","), values, strict=True):
        for letter, axis in zip(names, value.axes, strict=True):
            known = letters.get(letter, ())
            if known and axis and known != axis:
                raise Refused("two different axes meet in one einsum letter")
            letters[letter] = known or axis
    for letter, axis in letters.items():
        if letter not in out and TOKEN in axis:
            raise Refused("sums over the token axis")
        if letter not in out and BATCH in axis:
            raise Refused("sums over the batch axis, which lets rows see each other")
    return Value(tuple(letters[c] for c in out), max(v.kind for v in values))


def _conv(node: fx.Node, state: Classified) -> Value:
    value, weight = _tensor(node, state, "input"), _tensor(node, state, "weight")
    pointwise_kernel = all(size == () for size in weight.axes[2:])
    padding, stride = argument(node, "padding"), argument(node, "stride")
    if not pointwise_kernel or any(p not in (0,) for p in padding) or any(s != 1 for s in stride):
        raise Refused("a convolution over tokens")
    if any(isinstance(a, str) for a in value.axes[1]):
        raise Refused("a convolution with tokens as channels")
    axes = (value.axes[0], *weight.axes[:1], *value.axes[2:])
    return Value(axes, value.kind)


# --- look-ups ----------------------------------------------------------------------------------


def _embedding(node: fx.Node, state: Classified) -> Value:
    weight, indices = _tensor(node, state, "weight"), _tensor(node, state, "indices")
    if weight.kind is not Kind.CONSTANT or weight.token_axes:
        raise Refused("an embedding table that depends on tokens")
    _note_bound(node, state, weight.axes[0], indices)
    return Value((*indices.axes, *weight.axes[1:]), indices.kind)


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
    value, indices = _tensor(node, state), list(node.args[1])  # type: ignore[arg-type]
    indices += [None] * (_rank(value) - len(indices))
    used = [i for i, index in enumerate(indices) if index is not None]
    picked = [_value(indices[i], state) for i in used]
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
    return _known(node, state, tuple(axes), kind, exact)


def _index_exact(value: Value, used: list[int], picked: list[Value], rank: int) -> Exact | None:
    """Affine values looked up at affine indices, as ``position_ids[row, key]`` in mask code."""
    if isinstance(value.exact, Steps):
        return value.exact if value.exact.is_uniform else None
    if value.exact is None or len(used) != _rank(value):
        return None
    total: Exact | None = Steps.uniform(value.exact.offset)
    for axis, coefficient in value.exact.coefficients:
        index = _lifted(picked[used.index(axis)], rank)
        if index is None or total is None:
            return None
        total = ex.add(total, index, coefficient)
    return total


def _index_select(node: fx.Node, state: Classified) -> Value:
    value, index = _tensor(node, state), _tensor(node, state, "index")
    axis = argument(node, "dim") % _rank(value)
    if any(isinstance(a, str) for a in value.axes[axis]):
        raise Refused("reads other tokens by index")
    _note_bound(node, state, value.axes[axis], index)
    axes = (*value.axes[:axis], *(index.axes or ((),)), *value.axes[axis + 1 :])
    return Value(axes, max(value.kind, index.kind))


def _gather(node: fx.Node, state: Classified) -> Value:
    value, index = _tensor(node, state), _tensor(node, state, "index")
    axis = argument(node, "dim") % _rank(value)
    if any(isinstance(a, str) for a in (*value.axes[axis], *index.axes[axis])):
        raise Refused("gathers along the token axis")
    for i, (a, b) in enumerate(zip(value.axes, index.axes, strict=True)):
        if i != axis and a != b:
            raise Refused("gathers across different axes")
    return Value(index.axes, max(value.kind, index.kind))


# --- factories ---------------------------------------------------------------------------------


def _arange(node: fx.Node, state: Classified) -> Value:
    start = argument(node, "start", 0)
    step = argument(node, "step", 1)
    end = argument(node, "end")
    if not isinstance(start, int | float) or not isinstance(step, int | float):
        raise Refused("a range that starts or steps by a computed number")
    size = extents(node)[0]
    if not size.free_symbols and isinstance(end, int | float):
        tensor = torch.arange(start, end, step, dtype=node.meta["val"].dtype)
        return Value(_fresh_axes(node, state), Kind.CONSTANT, None, tensor)
    axes = _fresh_axes(node, state)
    if axes not in (((TOKEN,),), ((BATCH,),)):
        raise Refused("a range whose length is not the number of tokens")
    if step <= 0:
        raise Refused("positions counted from the end of the sequence")
    exact = Affine.of(start, {0: step})
    if axes == ((BATCH,),):
        return Value(axes, Kind.CONSTANT, exact)
    return _known(node, state, axes, Kind.POSITION, exact)


def _filled(value: Any) -> Rule:
    """zeros, ones, full and their `_like` and `new_` forms."""

    def rule(node: fx.Node, state: Classified) -> Value:
        fill: Any = value
        if fill is None:
            fill = argument(node, "fill_value", argument(node, "value"))
            _number(node, fill, state)
            if isinstance(fill, fx.Node):
                source = _value(fill, state).exact
                if not isinstance(source, Steps) or not source.is_uniform:
                    raise Refused("fills a tensor with a computed number")
                fill = source.value
        dtype = node.meta["val"].dtype
        number = torch.tensor(fill).to(dtype).item()
        return Value(_fresh_axes(node, state), Kind.CONSTANT, Steps.uniform(number))

    return rule


def _scalar_tensor(node: fx.Node, state: Classified) -> Value:
    number = _number(node, node.args[0], state)
    return Value((), Kind.CONSTANT, Steps.uniform(number))


def _triangle(lower: bool) -> Rule:
    """tril and triu of exactly known values."""

    def rule(node: fx.Node, state: Classified) -> Value:
        value, diagonal = _tensor(node, state), argument(node, "diagonal")
        row, col = _rank(value) - 2, _rank(value) - 1
        if not isinstance(diagonal, int):
            raise Refused("a triangle with a computed diagonal")
        if not any(isinstance(a, str) for axis in value.axes for a in axis):
            return _with_tensor(Value(value.axes, value.kind), node, state)
        if value.axes[row] != (TOKEN,) or value.axes[col] != (TOKEN,):
            raise Refused("a triangle over other axes than two token axes")
        edge = Steps((-diagonal,), (False, True), row, col)  # keeps index[col] - index[row] <= diagonal
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
    axes = _fresh_axes(node, state)
    if axes == ((TOKEN,), (TOKEN,)):
        return Value(axes, Kind.CONSTANT, Steps((0, 1), (0, 1, 0), 0, 1))
    if any(isinstance(a, str) for axis in axes for a in axis):
        raise Refused("an identity matrix of other than the number of tokens")
    return Value(axes, Kind.CONSTANT)


# --- attention ---------------------------------------------------------------------------------


def _attention(node: fx.Node, state: Classified) -> Value:
    """The one operation that may look at other tokens; `find_sites` judges its mask."""
    query, key, value = (_value(n, state) for n in node.args[:3])
    heads: list[Atom | None] = []
    for name, operand in (("queries", query), ("keys", key), ("values", value)):
        if len(operand.axes) != 4 or operand.axes[2] != (TOKEN,):
            raise Refused(f"{name} are not [batch, heads, tokens, width] with all tokens")
        if operand.axes[0] != (BATCH,):
            raise Refused(f"the first axis of {name} is not the batch")
        if any(isinstance(a, str) for a in (*operand.axes[1], *operand.axes[3])):
            raise Refused(f"heads or width of {name} hold tokens or rows")
        heads.append(operand.axes[1][0] if operand.axes[1] else 1)
    return Value((*query.axes[:3], value.axes[3]), Kind.LOCAL)


_RULES: dict[str, Rule] = {
    "memcompile.attention": _attention,
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
            "aten.glu_jvp",
            "aten.isin",
            "aten.floor_divide",
            "aten.remainder",
        ),
        pointwise,
    ),
    **dict.fromkeys(
        ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten",
         "aten.squeeze", "aten.view_as", "aten.reshape_as"),
        _view,
    ),
    "aten.unsqueeze": _unsqueeze,
    **dict.fromkeys(("aten.transpose", "aten.t", "aten.mT", "aten.numpy_T", "aten.swapaxes",
                     "aten.swapdims"), _transpose),
    "aten.permute": _permute,
    "aten.movedim": _movedim,
    "aten.expand": _expand,
    "aten.expand_as": _expand,
    "aten.slice": _slice,
    "aten.narrow": _narrow,
    "aten.select": _select,
    **dict.fromkeys(
        ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.tensor_split"),
        _split,
    ),
    "aten.repeat": _repeat,
    "aten.repeat_interleave": _repeat_interleave,
    "aten.view_as_complex": _as_complex,
    "aten.view_as_real": _as_real,
    "aten.cat": _cat,
    "aten.stack": _cat,
    "aten.concat": _cat,
    "aten.pad": _pad,
    "aten.constant_pad_nd": _pad,
    **dict.fromkeys(
        (
            "aten.sum",
            "aten.mean",
            "aten.amax",
            "aten.amin",
            "aten.max",
            "aten.min",
            "aten.any",
            "aten.all",
            "aten.argmax",
            "aten.argmin",
            "aten.var",
            "aten.std",
            "aten.var_mean",
            "aten.norm",
            "aten.linalg_vector_norm",
            "aten.logsumexp",
            "aten.prod",
        ),
        _reduction,
    ),
    **dict.fromkeys(
        (
            "aten.softmax",
            "aten._softmax",
            "aten.log_softmax",
            "aten._log_softmax",
            "aten.cumsum",
            "aten.cumprod",
            "aten.sort",
            "aten.topk",
        ),
        _along,
    ),
    "aten.diff": _diff,
    "aten.layer_norm": _normalisation,
    "aten.native_layer_norm": _normalisation,
    "aten.rms_norm": _normalisation,
    "aten._fused_rms_norm": _normalisation,
    "aten.group_norm": _group_norm,
    "aten.batch_norm": _batch_norm,
    **dict.fromkeys(
        ("aten.matmul", "aten.bmm", "aten.mm", "aten.addmm", "aten.baddbmm", "aten.mv", "aten.dot"),
        _matmul,
    ),
    "aten.linear": _linear,
    "aten.einsum": _einsum,
    **dict.fromkeys(("aten.outer", "aten.ger"), _outer),
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.convolution"), _conv),
    "aten.embedding": _embedding,
    "aten.one_hot": _one_hot,
    "aten.index": _index,
    "aten.index_select": _index_select,
    "aten.gather": _gather,
    "aten.arange": _arange,
    **dict.fromkeys(("aten.zeros", "aten.zeros_like", "aten.new_zeros"), _filled(0)),
    **dict.fromkeys(("aten.ones", "aten.ones_like", "aten.new_ones"), _filled(1)),
    **dict.fromkeys(("aten.full", "aten.full_like", "aten.new_full", "aten.fill"), _filled(None)),
    "aten.scalar_tensor": _scalar_tensor,
    "aten.tril": _triangle(True),
    "aten.triu": _triangle(False),
    "aten.eye": _eye,
}

# Rules whose sizes end up in the shape of the result, where they are checked against its axes, and
# those that judge symbolic numbers themselves.
_TAKES_SIZES: frozenset[Rule] = frozenset(
    {pointwise, _view, _expand, _repeat, _slice, _narrow, _arange, _eye, _scalar_tensor}
    | {_RULES[f"aten.{name}"] for name in ("zeros", "ones", "full")}
)
