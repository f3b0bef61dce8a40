"""The nodes of a body as they are written, and sizes that only a running engine knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import sympy
import torch

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
    """The nodes written so far.

    Args:
        branches: whether what is not always needed may be computed in a branch, an If of its own.
    """

    def __init__(self, opset: int, branches: bool = True) -> None:
        self.opset, self.branches = opset, branches
        self.nodes: list[ir.Node] = []
        self.choices = 0
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

    @contextmanager
    def branch(self) -> Iterator[list[ir.Node]]:
        """The nodes written inside, for a graph of their own: nothing outside can use them.

        It has constants of its own, too: onnxruntime joins equal ones within a graph alone.
        """
        nodes, made = self.nodes, self.made
        inside: list[ir.Node] = []
        self.nodes = inside
        self.made = {key: found for key, found in made.items() if key[0] != "Constant"}
        try:
            yield inside
        finally:
            self.nodes, self.made = nodes, made

    def choice(
        self,
        condition: ir.Value,
        dtypes: Sequence[torch.dtype],
        *branches: tuple[Sequence[ir.Node], Sequence[ir.Value]],
    ) -> Sequence[ir.Value]:
        """If: the results of the first of two branches (its nodes, its results) where the condition
        holds, those of the second otherwise.

        Args:
            dtypes: of the results.
        """
        import onnx_ir as ir

        self.choices += 1
        graphs = {}
        for kind, (nodes, values) in zip(("then_branch", "else_branch"), branches, strict=True):
            # Results are made inside, each once; what is only handed on is copied.
            results: list[ir.Value] = []
            inside = [*nodes]
            for value, dtype in zip(values, dtypes, strict=True):
                if value.producer() not in nodes or value in results:
                    inside.append(ir.node("Identity", [value]))
                    value = inside[-1].outputs[0]
                value.type = ir.TensorType(ir.DataType.from_numpy(numpy_of(dtype)))
                results.append(value)
            # Names of their own: a graph within another may not use its names again.
            for number, value in enumerate(output for node in inside for output in node.outputs):
                value.name = f"{kind}_{self.choices}_{number}"
            graphs[kind] = ir.Graph([], results, nodes=inside, name=kind)
        made = ir.node("If", [condition], graphs, num_outputs=len(branches[0][1]))
        self.nodes.append(made)
        chosen: Sequence[ir.Value] = made.outputs
        return chosen

    def sizes(self, value: ir.Value, shape: Sequence[int | str]) -> list[int | Size]:
        """Those of an input; those that only a running engine knows are expressions, `8*units`."""
        made: list[int | Size] = []
        for axis, size in enumerate(shape):
            if isinstance(size, int):
                made.append(size)
                continue
            expression = parsed(size)
            factor, symbol = expression.as_coeff_Mul()
            # The first input that has it as it is: bodies that share a graph then share a node.
            if symbol.is_Symbol and self.sources.get(symbol, (None, 0, 2))[2] != 1:
                self.sources[symbol] = (value, axis, int(factor))
            made.append(Size(self, expression))
        return made


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
        if not isinstance(other, Size | int):
            return NotImplemented  # a tensor's
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


def product(sizes: Sequence[int | Size]) -> Any:
    made: Any = 1
    for size in sizes:
        made = made * size
    return made


def ratio(whole: Any, part: Any) -> Any:
    found = sympy.cancel(_expression(whole) / _expression(part))
    if found.is_Integer:
        return int(found)
    if found.as_numer_denom()[1] != 1:
        raise TypeError(f"{whole!r} elements do not divide into {part!r}")
    source = whole if isinstance(whole, Size) else part
    return Size(source.recorder, sympy.expand(found))


def broadcast(first: Sequence[int | Size], second: Sequence[int | Size]) -> list[int | Size]:
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
