"""Find where a program was traced for some sizes only: branches that a graph cannot show."""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from .graph_tools import extent
from .result import Declined

_ROWS = (2, 3, 4, 5, 8)
_TOKENS = tuple(
    sorted({*range(2, 66), *(2**power + near for power in range(7, 14) for near in (-1, 0, 1))})
)
_OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"max": max, "min": min, "Max": max, "Min": min}


def keeps_guards(program: ExportedProgram) -> bool:
    """Whether this torch leaves the guards with the program; without them no branch is found."""
    return hasattr(program, "_guards_code")


def find_branches(program: ExportedProgram) -> list[Declined]:
    """The branches on sizes that torch.export took on the way, each as a decline.

    A forward that asks ``T % 2`` or ``T != B`` is traced along one side, and the program keeps the
    question as a guard. A guard that fails at some size within the program's own range (bounds of a
    single size are part of that) means that the graph is not the forward there.
    """
    signature = program.graph_signature
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    inputs = [
        placeholders[spec.arg.name]
        for spec in signature.input_specs
        if spec.kind is InputKind.USER_INPUT and getattr(spec.arg, "name", None) in placeholders
    ]
    shape = inputs[0].meta["val"].shape if inputs else ()
    if len(shape) != 2:
        return []
    sizes, full = [], []
    for axis, (size, tried) in enumerate(zip(shape, (_ROWS, _TOKENS), strict=True)):
        bounds = program.range_constraints.get(extent(size))
        if bounds is not None:
            full.append(f".size()[{axis}] != {bounds.upper}")
        sizes.append([n for n in tried if bounds is None or bounds.lower <= n <= bounds.upper])
    declined = []
    for guard in getattr(program, "_guards_code", None) or ():
        # Cutting a table asks whether all of it is wanted; the cut and the table are then the same.
        if guard.startswith("L[") and guard.endswith(tuple(full)):
            continue
        try:
            tree = ast.parse(guard, mode="eval").body
            wrong = next((at for at in itertools.product(*sizes) if not _value(tree, at)), None)
        except (ValueError, SyntaxError, ArithmeticError):
            declined.append(_branch(guard, "a condition that cannot be read"))
            continue
        if wrong is not None:
            declined.append(
                _branch(guard, f"not so for {wrong[0]} rows of {wrong[1]} tokens, for one")
            )
    return declined


def _branch(guard: str, why: str) -> Declined:
    return Declined(
        f"the forward branches on its sizes: it was traced where {guard} ({why})",
        "(whole model)",
        "find_branches",
    )


def _value(node: ast.expr, sizes: tuple[int, int]) -> Any:
    """A guard at given sizes; a program may come from a file, so its text is never executed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, sizes), _value(node.right, sizes))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand, sizes))
    if isinstance(node, ast.BoolOp):
        parts = [bool(_value(part, sizes)) for part in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _OPERATIONS:
        compared = _OPERATIONS[type(node.ops[0])]
        return compared(_value(node.left, sizes), _value(node.comparators[0], sizes))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
    ):
        return _FUNCTIONS[node.func.id](*(_value(part, sizes) for part in node.args))
    axis = _size(node)
    if axis is None:
        raise ValueError(f"unknown expression {ast.unparse(node)}")
    return sizes[axis]


def _size(node: ast.expr) -> int | None:
    """The axis of ``L['input'].size()[axis]``; every input is [rows, tokens]."""
    if (
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, int)
        and node.slice.value in (0, 1)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "size"
        and not node.value.args
    ):
        return node.slice.value
    return None
