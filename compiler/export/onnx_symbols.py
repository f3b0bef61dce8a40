"""Stand-ins for tensors that write what is done with them as ONNX nodes.

The texts of `models/contiguous/` are run on these: each operation that the texts use is
one or two standard nodes here, repeated ones once. A size that only a running engine knows is a
`Size`, which is no `int`: whatever would take it for a number raises, and nothing is baked in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...models import contiguous
from .onnx_recorder import Recorder, Size, broadcast, numpy_of, product, ratio

if TYPE_CHECKING:
    import onnx_ir as ir


class Symbol:
    """A tensor that is written down rather than computed."""

    device = torch.device("cpu")

    def __init__(
        self, recorder: Recorder, value: ir.Value, dtype: torch.dtype, shape: Sequence[int | Size]
    ) -> None:
        self.recorder, self.value, self.dtype = recorder, value, dtype
        self.shape = tuple(shape)
        self.reshaped: Symbol | None = None  # what it is a reshape of

    # --- what torch asks ---

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", str(function)).split(".")[0]
        from .onnx_functions import FUNCTIONS

        known = FUNCTIONS.get(name)
        if known is None:
            raise NotImplementedError(f"torch's {name} has no form in ONNX here")
        return known(*args, **(kwargs or {}))

    def dim(self) -> int:
        return len(self.shape)

    def _new(self, value: ir.Value, dtype: torch.dtype | None = None, shape: Any = None) -> Symbol:
        return Symbol(
            self.recorder, value, dtype or self.dtype, self.shape if shape is None else shape
        )

    def _op(self, kind: str, *others: Any, **attributes: Any) -> Any:
        return self.recorder.op(kind, self.value, *others, **attributes)

    def _axis(self, axis: int) -> int:
        return axis % self.dim()

    # --- types ---

    def to(self, dtype: torch.dtype) -> Symbol:
        import onnx_ir as ir

        if dtype == self.dtype:
            return self
        number = ir.DataType.from_numpy(numpy_of(dtype)).value
        return self._new(self._op("Cast", to=number), dtype)

    def long(self) -> Symbol:
        return self.to(torch.int64)

    # --- element by element ---

    def _each(self, kind: str) -> Symbol:
        return self._new(self._op(kind))

    def abs(self) -> Symbol:
        return self._each("Abs")

    def exp(self) -> Symbol:
        return self._each("Exp")

    def log(self) -> Symbol:
        return self._each("Log")

    def sqrt(self) -> Symbol:
        return self._each("Sqrt")

    def square(self) -> Symbol:
        return self * self

    def __neg__(self) -> Symbol:
        return self._each("Neg")

    def __invert__(self) -> Symbol:
        return self._each("Not")

    def __add__(self, other: Any) -> Symbol:
        return pair("Add", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return pair("Add", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return pair("Sub", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return pair("Sub", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return pair("Mul", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return pair("Mul", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return pair("Div", self, other)

    def __and__(self, other: Any) -> Symbol:
        return pair("And", self, other)

    def __or__(self, other: Any) -> Symbol:
        return pair("Or", self, other)

    def __lt__(self, other: Any) -> Symbol:
        return pair("Less", self, other, torch.bool)

    def __le__(self, other: Any) -> Symbol:
        return pair("LessOrEqual", self, other, torch.bool)

    def __gt__(self, other: Any) -> Symbol:
        return pair("Greater", self, other, torch.bool)

    def __ge__(self, other: Any) -> Symbol:
        return pair("GreaterOrEqual", self, other, torch.bool)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return pair("Equal", self, other, torch.bool)

    __hash__ = object.__hash__

    def clamp_min(self, least: Any) -> Symbol:
        return pair("Max", self, least)

    def clamp_max(self, most: Any) -> Symbol:
        return pair("Min", self, most)

    def clamp(self, least: Any, most: Any) -> Symbol:
        if not self.dtype.is_floating_point:
            return self.clamp_min(least).clamp_max(most)
        ends = (self.recorder.constant(end, self.dtype) for end in (least, most))
        return self._new(self._op("Clip", *ends))

    def masked_fill(self, mask: Symbol, value: float | Size) -> Symbol:
        return where(mask, value, self)

    # --- along axes ---

    def _reduced(self, kind: str, axis: int, keepdim: bool) -> Symbol:
        axis = self._axis(axis)
        made = self._op(kind, self.recorder.constant([axis]), keepdims=int(keepdim))
        kept: list[int | Size] = [1] if keepdim else []
        return self._new(made, shape=[*self.shape[:axis], *kept, *self.shape[axis + 1 :]])

    def sum(self, axis: int, keepdim: bool = False) -> Symbol:
        return self._reduced("ReduceSum", axis, keepdim)

    def mean(self, axis: int, keepdim: bool = False) -> Symbol:
        return self._reduced("ReduceMean", axis, keepdim)

    def amax(self, axis: int, keepdim: bool = False) -> Symbol:
        return self._reduced("ReduceMax", axis, keepdim)

    def amin(self, axis: int, keepdim: bool = False) -> Symbol:
        return self._reduced("ReduceMin", axis, keepdim)

    def norm(self, dim: int, keepdim: bool = False) -> Symbol:
        return self._reduced("ReduceL2", dim, keepdim)

    def logsumexp(self, axis: int) -> Symbol:
        # Not ReduceLogSumExp: what it makes of -inf alone is left to the runtime.
        peak = self.amax(axis, keepdim=True).clamp_min(contiguous.LOWEST)
        total = (self - peak).exp().sum(axis, keepdim=True).log() + peak
        return total.squeeze(axis)

    def cumsum(self, axis: int) -> Symbol:
        return self._new(self._op("CumSum", self.recorder.constant(self._axis(axis))))

    def __matmul__(self, other: Symbol) -> Symbol:
        lead = broadcast(self.shape[:-2], other.shape[:-2])
        made = self._op("MatMul", other.value)
        return self._new(made, shape=[*lead, self.shape[-2], other.shape[-1]])

    # --- shapes ---

    def view(self, *shape: int | Size) -> Symbol:
        """A reshape; one size may be -1."""
        whole = product(self.shape)
        rest = product([size for size in shape if size != -1])
        sizes = [ratio(whole, rest) if size == -1 else size for size in shape]
        if sizes == [*self.shape]:
            return self
        if self.reshaped is not None:
            return self.reshaped.view(*sizes)
        made = self._new(self._op("Reshape", self._sizes(self._target(sizes))), shape=sizes)
        made.reshaped = self
        return made

    def _target(self, sizes: Sequence[int | Size]) -> list[int | Size]:
        """What Reshape is told: 0 keeps an axis as it is, and one may follow from the others."""
        target: list[int | Size] = []
        for axis, size in enumerate(sizes):
            kept = axis < self.dim() and size == self.shape[axis] and isinstance(size, Size)
            target.append(0 if kept else size)
        unknown = [axis for axis, size in enumerate(target) if isinstance(size, Size)]
        if len(unknown) == 1:
            target[unknown[0]] = -1
        return target

    def _sizes(self, sizes: Sequence[int | Size]) -> ir.Value:
        """Sizes as one int64 tensor."""
        if all(isinstance(size, int) for size in sizes):
            return self.recorder.constant(list(sizes))
        parts = [s.value() if isinstance(s, Size) else self.recorder.constant([s]) for s in sizes]
        return parts[0] if len(parts) == 1 else self.recorder.op("Concat", *parts, axis=0)

    def flatten(self, start: int = 0, end: int = -1) -> Symbol:
        start, end = self._axis(start), self._axis(end)
        one = product(self.shape[start : end + 1])
        return self.view(*self.shape[:start], one, *self.shape[end + 1 :])

    def unflatten(self, axis: int, sizes: Sequence[int | Size]) -> Symbol:
        axis = self._axis(axis)
        rest = product([size for size in sizes if size != -1])
        whole = self.shape[axis]
        into = [ratio(whole, rest) if size == -1 else size for size in sizes]
        return self.view(*self.shape[:axis], *into, *self.shape[axis + 1 :])

    def transpose(self, first: int, second: int) -> Symbol:
        order = list(range(self.dim()))
        first, second = self._axis(first), self._axis(second)
        order[first], order[second] = order[second], order[first]
        made = self._op("Transpose", perm=tuple(order))
        return self._new(made, shape=[self.shape[axis] for axis in order])

    def unsqueeze(self, *axes: int) -> Symbol:
        """With axes of size 1 at these places of the result."""
        shape = list(self.shape)
        axes = tuple(sorted(axis % (self.dim() + len(axes)) for axis in axes))
        for axis in axes:
            shape.insert(axis, 1)
        source = self.reshaped
        if source is not None and not any(isinstance(x, Size) for x in source._target(shape)):
            return source.view(*shape)
        return self._new(self._op("Unsqueeze", self.recorder.constant(axes)), shape=shape)

    def squeeze(self, axis: int) -> Symbol:
        axis = self._axis(axis)
        if self.shape[axis] != 1:
            raise TypeError(f"squeeze of an axis of {self.shape[axis]!r}")
        shape = [*self.shape[:axis], *self.shape[axis + 1 :]]
        return self._new(self._op("Squeeze", self.recorder.constant([axis])), shape=shape)

    def expand(self, *given: Any) -> Symbol:
        sizes = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
        old = [1] * (len(sizes) - self.dim()) + list(self.shape)
        wanted = [o if s == -1 else s for s, o in zip(sizes, old, strict=True)]
        if wanted == list(self.shape):
            return self
        # ONNX broadcasts both ways: an axis that stays is 1 here.
        target = [1 if size == o else size for size, o in zip(wanted, old, strict=True)]
        return self._new(self._op("Expand", self._sizes(target)), shape=wanted)

    def repeat_interleave(self, times: int, axis: int) -> Symbol:
        if times == 1:
            return self
        axis = self._axis(axis)
        apart = self.unsqueeze(axis + 1)
        wide = apart.expand(*[times if i == axis + 1 else -1 for i in range(apart.dim())])
        return wide.flatten(axis, axis + 1)

    def new_zeros(self, shape: Sequence[int | Size], dtype: torch.dtype) -> Symbol:
        zero = self._new(self.recorder.constant(0, dtype), dtype, [])
        return zero.expand(*shape)

    def __getitem__(self, key: Any) -> Symbol:
        keys = list(key) if isinstance(key, tuple) else [key]
        if any(k is ... for k in keys):
            at = next(i for i, k in enumerate(keys) if k is ...)
            used = sum(k is not None and k is not ... for k in keys)
            keys[at : at + 1] = [slice(None)] * (self.dim() - used)
        made, axis = self, 0
        added: list[int] = []
        dropped: list[int] = []
        for k in keys:
            if k is None:
                added.append(axis + len(added))
                continue
            if isinstance(k, slice):
                made = made._sliced(axis, k)
            elif type(k) is int:
                made = made._sliced(axis, slice(k, k + 1 if k != -1 else None))
                dropped.append(axis)
            else:
                raise TypeError(f"index {k!r} has no form in ONNX here")
            axis += 1
        if dropped and added:
            raise TypeError(f"index {key!r} both adds and drops axes")
        for axis in reversed(dropped):
            made = made.squeeze(axis)
        return made.unsqueeze(*added) if added else made

    def _sliced(self, axis: int, of: slice) -> Symbol:
        if of == slice(None):
            return self
        if of.step is not None:
            raise TypeError("slices with steps have no form in ONNX here")
        start = 0 if of.start is None else of.start
        stop = self.shape[axis] if of.stop is None else of.stop
        if start == -1 and of.stop is None:
            size: int | Size = 1
        else:
            size = stop - start
        ends = self.recorder.constant([np.iinfo(np.int64).max]) if of.stop is None else None
        made = self._op(
            "Slice",
            self._sizes([start]),
            self._sizes([stop]) if ends is None else ends,
            self.recorder.constant([axis]),
        )
        return self._new(made, shape=[*self.shape[:axis], size, *self.shape[axis + 1 :]])

    # --- by index ---

    def index_select(self, axis: int, at: Symbol) -> Symbol:
        shape = [*self.shape[:axis], *at.shape, *self.shape[axis + 1 :]]
        return self._new(self._op("Gather", at.value, axis=axis), shape=shape)

    def gather(self, axis: int, at: Symbol) -> Symbol:
        return self._new(self._op("GatherElements", at.value, axis=axis), shape=at.shape)

    def scatter(self, axis: int, at: Symbol, new: Symbol) -> Symbol:
        return self._new(self._op("ScatterElements", at.value, new.value, axis=axis))


def symbol_of(
    recorder: Recorder, value: ir.Value, dtype: torch.dtype, shape: Sequence[int | str]
) -> Symbol:
    """An input as a symbol; see `Recorder.sizes`."""
    return Symbol(recorder, value, dtype, recorder.sizes(value, shape))


def operand(value: Any, like: Symbol, dtype: torch.dtype) -> Symbol:
    """A symbol, size or number as a symbol of this type."""
    if isinstance(value, Symbol):
        return value.to(dtype)
    if isinstance(value, Size):
        return like._new(value.value(), torch.int64, [1]).to(dtype)
    return like._new(like.recorder.constant(value, dtype), dtype, [])


def _common(values: Sequence[Any]) -> torch.dtype:
    """The type that torch gives a result: numbers follow tensors unless of a higher kind."""
    dtypes = [v.dtype for v in values if isinstance(v, Symbol)]
    found = dtypes[0] if dtypes else torch.bool
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    for value in values:
        if isinstance(value, float) and not found.is_floating_point:
            found = torch.float32
        if isinstance(value, int | Size) and type(value) is not bool and found == torch.bool:
            found = torch.int64
    return found


# What leaves the other operand as it is.
_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}


def pair(kind: str, first: Any, second: Any, result: torch.dtype | None = None) -> Symbol:
    if type(second) is int and second == _NEUTRAL.get(kind) and first.dtype != torch.bool:
        kept: Symbol = first
        return kept
    like = first if isinstance(first, Symbol) else second
    dtype = _common([first, second])
    if kind == "Div" and not dtype.is_floating_point:
        raise TypeError("/ of whole numbers; say how to round: torch.div(…, rounding_mode=…)")
    a, b = (operand(x, like, dtype) for x in (first, second))
    made = like.recorder.op(kind, a.value, b.value)
    return like._new(made, result or dtype, broadcast(a.shape, b.shape))


def where(condition: Symbol, first: Any, second: Any) -> Symbol:
    if all(isinstance(x, Symbol) and x.dtype == torch.bool for x in (first, second)):
        # onnxruntime's Where has no kernel for these.
        chosen: Symbol = (condition & first) | (~condition & second)
        return chosen
    dtype = _common([first, second])
    a, b = (operand(x, condition, dtype) for x in (first, second))
    made = condition._op("Where", a.value, b.value)
    shape = broadcast(broadcast(condition.shape, a.shape), b.shape)
    return condition._new(made, dtype, shape)


def written(symbols: Sequence[Symbol]) -> list[ir.Value]:
    """Values of their own for results: an input, or a value given twice, is copied."""
    import onnx_ir as ir

    seen: set[int] = set()
    values = []
    for symbol in symbols:
        value = symbol.value
        if value.producer() is None or id(value) in seen:
            copy = ir.node("Identity", [value])
            symbol.recorder.nodes.append(copy)
            value = copy.outputs[0]
        seen.add(id(value))
        values.append(value)
    return values
