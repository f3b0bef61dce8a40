"""Stand-ins for tensors that write what is done with them as ONNX nodes.

The texts of `models/memory/contiguous.py` are run on these: each operation that the texts use is
one or two standard nodes here, repeated ones once. A size that only a running engine knows is a
`Size`, which is no `int`: whatever would take it for a number raises, and nothing is baked in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch

from ...models.memory import contiguous

if TYPE_CHECKING:
    import onnx_ir as ir

NUMPY = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}


def numpy_of(dtype: torch.dtype) -> np.dtype[Any]:
    """numpy's type; it has no bfloat16 of its own."""
    if dtype is torch.bfloat16:
        import onnx_ir as ir

        found: np.dtype[Any] = ir.DataType.BFLOAT16.numpy()
        return found
    return np.dtype(NUMPY[dtype])


class Recorder:
    """The nodes written so far."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.made: dict[Any, Sequence[ir.Value]] = {}
        self.sources: dict[Any, tuple[ir.Value, int, int]] = {}  # symbol: tensor, axis, factor

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """The output of a node, or its outputs; the same node is written once."""
        import onnx_ir as ir

        key = (kind, tuple(map(id, inputs)), tuple(sorted(attributes.items())), outputs)
        if key not in self.made:
            made = ir.node(kind, inputs, attributes, num_outputs=outputs)
            self.nodes.append(made)
            self.made[key] = made.outputs
        found = self.made[key]
        return found[0] if outputs == 1 else found

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        import onnx_ir as ir

        array: Any = np.asarray(value, numpy_of(dtype))
        key = ("Constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self.made:
            made = ir.node("Constant", [], {"value": ir.tensor(array)})
            self.nodes.append(made)
            self.made[key] = made.outputs
        return self.made[key][0]

    def given(self, value: ir.Value, dtype: torch.dtype, shape: Sequence[int | str]) -> Symbol:
        """An input; sizes that only a running engine knows are expressions, `8*units` say."""
        sizes: list[int | Size] = []
        for axis, size in enumerate(shape):
            if isinstance(size, int):
                sizes.append(size)
                continue
            expression = parsed(size)
            factor, symbol = expression.as_coeff_Mul()
            if symbol.is_Symbol and (symbol not in self.sources or factor == 1):
                self.sources[symbol] = (value, axis, int(factor))
            sizes.append(Size(self, expression))
        return Symbol(self, value, dtype, sizes)


def parsed(text: str) -> sympy.Expr:
    """A size as the exporter writes it."""
    expression = sympy.sympify(text)
    return expression.xreplace(
        {s: sympy.Symbol(s.name, integer=True, positive=True) for s in expression.free_symbols}
    )


class Size:
    """A whole number that is known when the engine runs."""

    def __init__(self, recorder: Recorder, expression: sympy.Expr) -> None:
        self.recorder, self.expression = recorder, expression

    def _with(self, made: Any) -> Any:
        made = sympy.expand(made)
        return int(made) if made.is_Integer else Size(self.recorder, made)

    def __add__(self, other: Any) -> Any:
        return self._with(self.expression + _expression(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._with(self.expression - _expression(other))

    def __rsub__(self, other: Any) -> Any:
        return self._with(_expression(other) - self.expression)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Symbol):
            return NotImplemented
        return self._with(self.expression * _expression(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self._with(sympy.floor(self.expression / _expression(other)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Size) and self.expression == other.expression

    def __hash__(self) -> int:
        return hash(self.expression)

    def __repr__(self) -> str:
        return str(self.expression)

    def value(self) -> ir.Value:
        """It as an int64 tensor of one element."""
        return self._value(self.expression)

    def _value(self, of: sympy.Expr) -> ir.Value:
        op, constant = self.recorder.op, self.recorder.constant
        if of.is_Integer:
            return constant([int(of)])
        if of.is_Symbol:
            tensor, axis, factor = self.recorder.sources[of]
            size = op("Shape", tensor, start=axis, end=axis + 1)
            return size if factor == 1 else op("Div", size, constant([factor]))
        if isinstance(of, sympy.floor):
            numerator, denominator = of.args[0].as_numer_denom()
            return op("Div", self._value(numerator), self._value(denominator))
        kind = {sympy.Add: "Add", sympy.Mul: "Mul"}.get(of.func)
        if kind is None:
            raise TypeError(f"the size {of} has no form in ONNX")
        made = self._value(of.args[0])
        for part in of.args[1:]:
            made = op(kind, made, self._value(part))
        return made


def _expression(number: Any) -> sympy.Expr:
    if isinstance(number, Size):
        return number.expression
    if type(number) is not int:
        raise TypeError(f"{number!r} where a size was expected")
    return sympy.Integer(number)


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
        known = _FUNCTIONS.get(name)
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
        return _pair("Add", self, other)

    def __radd__(self, other: Any) -> Symbol:
        return _pair("Add", other, self)

    def __sub__(self, other: Any) -> Symbol:
        return _pair("Sub", self, other)

    def __rsub__(self, other: Any) -> Symbol:
        return _pair("Sub", other, self)

    def __mul__(self, other: Any) -> Symbol:
        return _pair("Mul", self, other)

    def __rmul__(self, other: Any) -> Symbol:
        return _pair("Mul", other, self)

    def __truediv__(self, other: Any) -> Symbol:
        return _pair("Div", self, other)

    def __and__(self, other: Any) -> Symbol:
        return _pair("And", self, other)

    def __or__(self, other: Any) -> Symbol:
        return _pair("Or", self, other)

    def __lt__(self, other: Any) -> Symbol:
        return _pair("Less", self, other, torch.bool)

    def __le__(self, other: Any) -> Symbol:
        return _pair("LessOrEqual", self, other, torch.bool)

    def __gt__(self, other: Any) -> Symbol:
        return _pair("Greater", self, other, torch.bool)

    def __ge__(self, other: Any) -> Symbol:
        return _pair("GreaterOrEqual", self, other, torch.bool)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return _pair("Equal", self, other, torch.bool)

    __hash__ = object.__hash__

    def clamp_min(self, least: Any) -> Symbol:
        return _pair("Max", self, least)

    def clamp_max(self, most: Any) -> Symbol:
        return _pair("Min", self, most)

    def clamp(self, least: Any, most: Any) -> Symbol:
        return self.clamp_min(least).clamp_max(most)

    def masked_fill(self, mask: Symbol, value: float | Size) -> Symbol:
        return _where(mask, value, self)

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
        lead = _broadcast(self.shape[:-2], other.shape[:-2])
        made = self._op("MatMul", other.value)
        return self._new(made, shape=[*lead, self.shape[-2], other.shape[-1]])

    # --- shapes ---

    def view(self, *shape: int | Size) -> Symbol:
        """A reshape; one size may be -1."""
        whole = _product(self.shape)
        rest = _product([size for size in shape if size != -1])
        sizes = [_ratio(whole, rest) if size == -1 else size for size in shape]
        if sizes == [*self.shape]:
            return self
        if self.reshaped is not None:
            return self.reshaped.view(*sizes)
        # 0 keeps an axis as it is, and one size may be left to follow from the others.
        target: list[int | Size] = []
        for axis, size in enumerate(sizes):
            kept = axis < self.dim() and size == self.shape[axis] and isinstance(size, Size)
            target.append(0 if kept else size)
        unknown = [axis for axis, size in enumerate(target) if isinstance(size, Size)]
        if len(unknown) == 1:
            target[unknown[0]] = -1
        made = self._new(self._op("Reshape", self._sizes(target)), shape=sizes)
        made.reshaped = self
        return made

    def _sizes(self, sizes: Sequence[int | Size]) -> ir.Value:
        """Sizes as one int64 tensor."""
        if all(isinstance(size, int) for size in sizes):
            return self.recorder.constant(list(sizes))
        parts = [s.value() if isinstance(s, Size) else self.recorder.constant([s]) for s in sizes]
        return parts[0] if len(parts) == 1 else self.recorder.op("Concat", *parts, axis=0)

    def flatten(self, start: int = 0, end: int = -1) -> Symbol:
        start, end = self._axis(start), self._axis(end)
        one = _product(self.shape[start : end + 1])
        return self.view(*self.shape[:start], one, *self.shape[end + 1 :])

    def unflatten(self, axis: int, sizes: Sequence[int | Size]) -> Symbol:
        axis = self._axis(axis)
        rest = _product([size for size in sizes if size != -1])
        whole = self.shape[axis]
        into = [_ratio(whole, rest) if size == -1 else size for size in sizes]
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
        for axis in sorted(axes):
            shape.insert(axis, 1)
        return self._new(self._op("Unsqueeze", self.recorder.constant(sorted(axes))), shape=shape)

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


def _product(sizes: Sequence[int | Size]) -> Any:
    made: Any = 1
    for size in sizes:
        made = made * size
    return made


def _ratio(whole: Any, part: Any) -> Any:
    found = sympy.cancel(_expression(whole) / _expression(part))
    if found.is_Integer:
        return int(found)
    if found.as_numer_denom()[1] != 1:
        raise TypeError(f"{whole!r} elements do not divide into {part!r}")
    source = whole if isinstance(whole, Size) else part
    return Size(source.recorder, sympy.expand(found))


def _broadcast(first: Sequence[int | Size], second: Sequence[int | Size]) -> list[int | Size]:
    rank = max(len(first), len(second))
    made: list[int | Size] = []
    for a, b in zip(
        [1] * (rank - len(first)) + list(first), [1] * (rank - len(second)) + list(second),
        strict=True,
    ):  # fmt: skip
        if a != 1 and b != 1 and a != b:
            raise TypeError(f"sizes {first} and {second} do not go together")
        made.append(b if a == 1 else a)
    return made


def _operand(value: Any, like: Symbol, dtype: torch.dtype) -> Symbol:
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


def _pair(kind: str, first: Any, second: Any, result: torch.dtype | None = None) -> Symbol:
    if type(second) is int and second == _NEUTRAL.get(kind) and first.dtype != torch.bool:
        kept: Symbol = first
        return kept
    like = first if isinstance(first, Symbol) else second
    dtype = _common([first, second])
    if kind == "Div" and not dtype.is_floating_point:
        raise TypeError("/ of whole numbers; say how to round: torch.div(…, rounding_mode=…)")
    a, b = (_operand(x, like, dtype) for x in (first, second))
    made = like.recorder.op(kind, a.value, b.value)
    return like._new(made, result or dtype, _broadcast(a.shape, b.shape))


def _where(condition: Symbol, first: Any, second: Any) -> Symbol:
    if all(isinstance(x, Symbol) and x.dtype == torch.bool for x in (first, second)):
        # onnxruntime's Where has no kernel for these.
        chosen: Symbol = (condition & first) | (~condition & second)
        return chosen
    dtype = _common([first, second])
    a, b = (_operand(x, condition, dtype) for x in (first, second))
    made = condition._op("Where", a.value, b.value)
    shape = _broadcast(_broadcast(condition.shape, a.shape), b.shape)
    return condition._new(made, dtype, shape)


def _div(value: Symbol, by: Any, rounding_mode: str) -> Symbol:
    if value.dtype.is_floating_point or rounding_mode != "trunc":
        raise TypeError(f"division of {value.dtype} rounded by {rounding_mode!r}")
    b = _operand(by, value, value.dtype)  # ONNX divides whole numbers towards zero
    return value._new(value._op("Div", b.value), shape=_broadcast(value.shape, b.shape))


def _remainder(value: Symbol, by: Any) -> Symbol:
    if value.dtype.is_floating_point:
        raise TypeError(f"remainder of {value.dtype}")
    return _pair("Mod", value, by)


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


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "iota": _iota,
    "where": _where,
    "minimum": lambda a, b: _pair("Min", a, b),
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
