"""What torch's functions, and our own, are in ONNX: on symbols, in standard nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...models import contiguous
from .onnx_recorder import Size, broadcast
from .onnx_symbols import Symbol, operand, pair, where


def _div(value: Symbol, by: Any, rounding_mode: str) -> Symbol:
    if value.dtype.is_floating_point or rounding_mode != "trunc":
        raise TypeError(f"division of {value.dtype} rounded by {rounding_mode!r}")
    b = operand(by, value, value.dtype)  # ONNX divides whole numbers towards zero
    return value._new(value._op("Div", b.value), shape=broadcast(value.shape, b.shape))


def _remainder(value: Symbol, by: Any) -> Symbol:
    if value.dtype.is_floating_point:
        raise TypeError(f"remainder of {value.dtype}")
    return pair("Mod", value, by)


def _pow(base: float, power: Symbol) -> Symbol:
    return power._new(
        power.recorder.op("Pow", power.recorder.constant(base, power.dtype), power.value)
    )


def _iota(count: int | Size, like: Symbol) -> Symbol:
    recorder = like.recorder
    if isinstance(count, int):
        return like._new(recorder.constant(np.arange(count)), torch.int64, [count])
    stop = recorder.op("Squeeze", count.value())
    made = recorder.op("Range", recorder.constant(0), stop, recorder.constant(1))
    return like._new(made, torch.int64, [count])


def _stack(values: Sequence[Symbol]) -> Symbol:
    apart = [value.unsqueeze(0) for value in values]
    first = apart[0]
    made = first.recorder.op("Concat", *(x.value for x in apart), axis=0)
    return first._new(made, shape=[len(apart), *values[0].shape])


def _cat(values: Sequence[Symbol], dim: int) -> Symbol:
    first = values[0]
    axis = first._axis(dim)
    made = first.recorder.op("Concat", *(x.value for x in values), axis=axis)
    whole: Any = 0
    for value in values:
        whole = whole + value.shape[axis]
    return first._new(made, shape=[*first.shape[:axis], whole, *first.shape[axis + 1 :]])


def _softmax(of: Symbol, dim: int, **rest: Any) -> Symbol:
    return of._new(of._op("Softmax", axis=of._axis(dim)))


def _pad(of: Symbol, amounts: tuple[int, int], *, mode: str = "constant", value: Any) -> Symbol:
    if mode != "constant":
        raise TypeError(f"pad by {mode!r} has no form in ONNX here")
    before, after = amounts
    whole = [0] * (of.dim() - 1) + [before] + [0] * (of.dim() - 1) + [after]
    constant = of.recorder.constant
    made = of._op("Pad", constant(whole), constant(value, of.dtype))
    return of._new(made, shape=[*of.shape[:-1], of.shape[-1] + before + after])


def _full_like(like: Symbol, value: float, dtype: torch.dtype | None = None) -> Symbol:
    kind = dtype or like.dtype
    one = like._new(like.recorder.constant(value, kind), kind, [])
    return one.expand(*like.shape)


def _largest(scores: Symbol, count: int) -> tuple[Symbol, Symbol]:
    k = scores.recorder.constant([count])
    values, order = scores._op("TopK", k, outputs=2, axis=-1, largest=1, sorted=1)
    shape = [*scores.shape[:-1], count]
    return scores._new(values, shape=shape), scores._new(order, torch.int64, shape)


def _sort(of: Symbol, dim: int) -> tuple[Symbol, Symbol]:
    count = of.shape[dim]
    if isinstance(count, Size):
        raise TypeError(f"sort of an axis of {count!r}")
    k = of.recorder.constant([count])
    values, order = of._op("TopK", k, outputs=2, axis=of._axis(dim), largest=0, sorted=1)
    return of._new(values), of._new(order, torch.int64)


def _rows_of(of: Symbol, at: Symbol) -> Symbol:
    """GatherND: batch and heads are the operator's own axes, there is nothing to be numbered."""
    made = of._op("GatherND", at.unsqueeze(at.dim()).value, batch_dims=2)
    return of._new(made, shape=[*at.shape, *of.shape[3:]])


def _put_rows(cache: Symbol, at: Symbol, new: Symbol) -> Symbol:
    """ScatterND straight on the cache: where its output is bound to its input, it is updated in
    place."""
    return _scattered(cache, _slots(cache, at), new.to(cache.dtype))


def _scattered(cache: Symbol, slots: Symbol, new: Symbol) -> Symbol:
    return cache._new(cache._op("ScatterND", slots.value, new.value))


def _slots(cache: Symbol, at: Symbol) -> Symbol:
    """(b, h, row) [B, Hkv, n, 3] of rows [B, n]: a sum of three, each in its own place."""
    batch, heads = cache.shape[:2]
    if isinstance(heads, Size):
        raise TypeError(f"rows put at {heads!r} heads")
    sequence = _iota(batch, at)[:, None, None, None] * _own(at, [[1, 0, 0]])
    head = _own(at, [[[[0, h, 0]] for h in range(heads)]])  # [1, Hkv, 1, 3]
    return (sequence + head) + at.unsqueeze(1, 3) * _own(at, [[0, 0, 1]])


def _put_if_any(
    counts: Symbol, pools: list[Symbol], compute: Callable[[], tuple[Symbol, list[Symbol]]]
) -> list[Symbol]:
    """ScatterND of rows that are computed in a branch; of none where there is nothing to be put."""
    recorder = counts.recorder
    some = counts.amax(0).to(torch.bool)
    if not recorder.branches:
        text: Any = contiguous.put_where
        made: list[Symbol] = text(some, pools, *compute())
        return made
    with recorder.branch() as then:
        column, rows = compute()
        made = [_slots(pools[0], column).view(-1, 3)]
        made += [row.view(-1, row.shape[-1]) for row in rows]
    with recorder.branch() as otherwise:
        none = [recorder.constant(np.zeros((0, x.shape[1])), x.dtype) for x in made]
    slots, *rest = (
        symbol._new(value)
        for symbol, value in zip(
            made,
            recorder.choice(
                some.value,
                [symbol.dtype for symbol in made],
                (then, [symbol.value for symbol in made]),
                (otherwise, none),
            ),
            strict=True,
        )
    )
    return [_scattered(pool, slots, row) for pool, row in zip(pools, rest, strict=True)]


def _own(like: Symbol, numbers: Any) -> Symbol:
    array = np.asarray(numbers)
    return like._new(like.recorder.constant(array), torch.int64, array.shape)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "iota": _iota,
    "where": where,
    "maximum": lambda a, b: pair("Max", a, b),
    "minimum": lambda a, b: pair("Min", a, b),
    "remainder": _remainder,
    "div": _div,
    "pow": _pow,
    "tanh": lambda x: x._each("Tanh"),
    "stack": _stack,
    "cat": _cat,
    "softmax": _softmax,
    "pad": _pad,
    "full_like": _full_like,
    "ones_like": lambda x, dtype=None: _full_like(x, 1, dtype),
    "largest": _largest,
    "sort": _sort,
    "rows_of": _rows_of,
    "put_if_any": _put_if_any,
    "put_rows": _put_rows,
}
