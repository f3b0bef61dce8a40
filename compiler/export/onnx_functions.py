"""What torch's functions, and our own, are in ONNX: on symbols, in standard nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

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


def _put_rows(cache: Symbol, at: Symbol, new: Symbol) -> Symbol:
    """ScatterND straight on the cache: where its output is bound to its input, it is updated in
    place."""
    batch, heads = cache.shape[:2]
    row = at[:, None].expand(-1, heads, -1)  # [B, Hkv, n]
    first = _iota(batch, at)[:, None, None].expand(*row.shape)
    second = _iota(heads, at)[None, :, None].expand(*row.shape)
    apart = [x.unsqueeze(3) for x in (first, second, row)]
    where = at.recorder.op("Concat", *(x.value for x in apart), axis=-1)
    return cache._new(cache._op("ScatterND", where, new.to(cache.dtype).value))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "iota": _iota,
    "where": where,
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
    "put_rows": _put_rows,
}
