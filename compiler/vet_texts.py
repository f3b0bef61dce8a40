"""Texts of a serialised graph that torch would execute, and what of each is let through.

Names become source text of a function that is compiled; operators are looked up by attribute, from
`torch` on, where `torch.os.system` is as good a name as any; shape expressions go through sympy's
parser, which calls `eval`; guards are executed; tree contexts import modules.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from typing import Any

import torch

PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}")
_DOTTED = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
SYMBOL = re.compile(r"[a-z]{1,8}\d{1,9}")
_FLOAT = re.compile(r"[-+]?[0-9.]{1,40}(e[-+]?\d\d?)?")
_EXPONENT = re.compile(
    r"(?:Integer\(|Rational\(|Float\(')?"
    r"(-?\d{1,9}(?:\.\d{0,40})?)"
    r"(?:\)|, \d+\)|'(?:, precision=\d+)?\))?"
)
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)")
_HIGHER_ORDER = re.compile(r"torch\.ops\.higher_order\.(\w+)")

_NAMESPACES = ("aten", "prims", "memcompile")
# These only run the subgraphs they are given.
_HIGHER_ORDER_OPERATORS = {
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
    "cond",
    "while_loop",
    "scan",
    "associative_scan",
    "map_impl",
    "flex_attention",
    "tag_activation_checkpoint",
}
_OPERATORS = """
    eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift getitem
"""
_SYMBOLIC = {f"_operator.{name}" for name in _OPERATORS.split()}
_SYMBOLIC |= {f"math.{name}" for name in ("trunc", "floor", "ceil")}
_SYMBOLIC |= {
    f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt", "sum")
}
_SYMBOLIC |= {"torch._sym_sqrt"}

_CALLS = """
    Add Mul Pow Integer Float Rational Symbol Max Min Mod Abs And Or Not Eq Ne Lt Le Gt Ge Equality
    Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan floor ceiling FloorDiv
    ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift
    PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal
    ToFloat Identity IsNonOverlappingAndDenseIndicator
"""
_EXPRESSION_CALLS = set(_CALLS.split())
_EXPRESSION_NAMES = {"oo", "int_oo", "true", "false"}
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}
_LARGEST_POWER = 64
_LONGEST_EXPRESSION = 4096
_LARGEST_INTEGER = 2**63


class Refused(ValueError):
    """Something in the file would run, or could make something run, when it is loaded."""


def identifier(text: Any) -> str:
    """`text`, if it can stand as a name in generated source.

    Raises:
        Refused: it cannot.
    """
    if isinstance(text, str) and (text == "" or PLAIN_NAME.fullmatch(text)):
        return text
    raise Refused(f"the name {shown(text)} is not an identifier, and names become source code")


def dotted(text: Any) -> str:
    """`text`, if it can stand as the path of a module or parameter in generated source.

    Raises:
        Refused: it cannot.
    """
    if isinstance(text, str) and (text == "" or _DOTTED.fullmatch(text)):
        return text
    raise Refused(f"the path {shown(text)} is not dotted names, and paths become source code")


def operator(text: Any) -> str:
    """`text`, if it names an operator that only computes.

    Raises:
        Refused: it is something else.
    """
    if not isinstance(text, str):
        raise Refused(f"an operator is named {shown(text)}")
    return _computes(text)


@functools.lru_cache(maxsize=4096)
def _computes(text: str) -> str:
    if text in _SYMBOLIC:
        return text
    if match := _HIGHER_ORDER.fullmatch(text):
        if match[1] in _HIGHER_ORDER_OPERATORS:
            return text
        raise Refused(
            f"the graph calls {text}, a higher-order operator that is not known to be safe"
        )
    match = _OPERATOR.fullmatch(text)
    if match is None:
        raise Refused(f"the graph calls {shown(text)}, a Python function and not an operator")
    namespace, name, overload = match.groups()
    if namespace not in _NAMESPACES:
        known = ", ".join(_NAMESPACES)
        raise Refused(f"the graph calls {text}; operators are taken from {known} only")
    found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise Refused(f"the graph calls {text}, which this torch {torch.__version__} does not have")
    arguments = {argument.name for argument in found._schema.arguments}
    unchecked = name.startswith("_unsafe") and name != "_unsafe_view"
    if "filename" in arguments or unchecked or name == "set_":
        raise Refused(f"the graph calls {text}, which reaches outside its tensors")
    return text


def expression(text: Any) -> str:
    """`text`, if it is arithmetic on symbols; sympy evaluates it as Python.

    Raises:
        Refused: it is something else.
    """
    if not isinstance(text, str) or len(text) > _LONGEST_EXPRESSION:
        raise Refused(f"the shape expression {shown(text)} is not a short text")
    return _sympy(text)


@functools.lru_cache(maxsize=4096)
def _sympy(text: str) -> str:
    try:
        tree = ast.parse(text, mode="eval")
        _arithmetic(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(
            f"the shape expression {shown(text)} is more than arithmetic on symbols, and sympy "
            "would evaluate it as Python"
        ) from error
    return ast.unparse(tree)


def _arithmetic(node: ast.AST, power: float = 1) -> None:
    match node:
        case ast.Constant(value=bool()):
            return
        case ast.Constant(value=int() | float() as number) if abs(number) <= _LARGEST_INTEGER:
            return
        case ast.Name(id=name) if name in _EXPRESSION_NAMES or SYMBOL.fullmatch(name):
            return
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _arithmetic(operand, power)
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            return _power([left, right], power)
        case ast.BinOp(
            op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()
        ):
            _arithmetic(node.left, power)
            return _arithmetic(node.right, power)
        case ast.Compare(left=left, comparators=others):
            for part in (left, *others):
                _arithmetic(part, power)
            return None
        case ast.Call(
            func=ast.Name(id="Symbol" | "Float" as kind),
            args=[ast.Constant(value=str() as text)],
            keywords=keywords,
        ):
            simple = all(
                isinstance(k.value, ast.Constant) and k.arg and isinstance(k.value.value, int)
                for k in keywords
            )
            if simple and kind == "Symbol" and SYMBOL.fullmatch(text):
                return None
            if simple and kind == "Float" and _FLOAT.fullmatch(text):
                return None
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name in _POWERS:
                return _power(arguments, power)
            if name in _EXPRESSION_CALLS:
                for argument in arguments:
                    _arithmetic(argument, power)
                return None
    raise ValueError(ast.dump(node))


def _power(arguments: list[ast.expr], power: float) -> None:
    """sympy works powers of numbers out at once: only small ones, nested ones multiplied."""
    if len(arguments) != 2:
        raise ValueError("a power of two arguments")
    base, exponent = arguments
    if (match := _EXPONENT.fullmatch(ast.unparse(exponent))) is None:
        raise ValueError("a power that is no number")
    power *= max(1.0, abs(float(match[1])))
    if power > _LARGEST_POWER:
        raise ValueError("a large power")
    _arithmetic(base, power)


def guard(text: Any) -> str:
    """`text`, if it compares sizes of inputs; torch executes it.

    Raises:
        Refused: it is something else.
    """
    try:
        if not isinstance(text, str) or len(text) > _LONGEST_EXPRESSION:
            raise ValueError("not a short text")
        tree = ast.parse(text, mode="eval")
        _guard_node(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(
            f"the guard {shown(text)} is more than a comparison of input sizes, and guards are "
            "executed"
        ) from error
    return ast.unparse(tree)


def _guard_node(node: ast.AST) -> None:
    match node:
        case ast.Constant(value=bool() | int() | float()):
            return
        case ast.BoolOp(values=parts):
            pass
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            parts = [operand]
        case ast.BinOp(
            op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()
        ):
            parts = [node.left, node.right]
        case ast.Compare(left=left, comparators=others):
            parts = [left, *others]
        case ast.Call(func=ast.Name(id="min" | "max"), args=parts, keywords=[]):
            pass
        case ast.Subscript(
            value=ast.Call(
                func=ast.Attribute(value=source, attr="size" | "stride"), args=[], keywords=[]
            ),
            slice=ast.Constant(value=int()),
        ):
            return _guard_source(source)
        case ast.Call(
            func=ast.Attribute(value=source, attr="storage_offset"), args=[], keywords=[]
        ):
            return _guard_source(source)
        case ast.Subscript():
            return _guard_source(node)
        case _:
            raise ValueError(ast.dump(node))
    for part in parts:
        _guard_node(part)


def _guard_source(node: ast.AST) -> None:
    """`L['input_ids']`, `L['args'][0]`."""
    match node:
        case ast.Name(id="L"):
            return
        case ast.Subscript(value=value, slice=ast.Constant(value=str() as name)):
            identifier(name)
        case ast.Subscript(value=value, slice=ast.Constant(value=int())):
            pass
        case _:
            raise ValueError(ast.dump(node))
    _guard_source(value)


def tree_text(text: Any) -> str:
    """`text`, if it is a tree of tuples, lists and dicts; other types import modules.

    Raises:
        Refused: it is something else.
    """
    try:
        protocol, tree = json.loads(text)
    except (TypeError, ValueError) as error:
        raise Refused(f"the tree {shown(text)} is no JSON pair") from error
    if protocol != 1:
        raise Refused(f"a tree has protocol {protocol!r}; 1 is known")
    return json.dumps([1, _tree(tree)])


def _tree(tree: Any) -> dict[str, Any]:
    """Tuples, lists and dicts stay; an output class of transformers becomes the dict it is."""
    fields = json_object(tree, "a tree")
    kind, context = fields.get("type"), fields.get("context")
    children = [_tree(child) for child in json_list(fields.get("children_spec"))]
    if kind is None and context is None and not children:
        return {"type": None, "context": None, "children_spec": []}
    if isinstance(kind, str) and "cache" in kind.lower():
        raise Refused(
            f"its signature takes or returns a cache ({shown(kind)}); export the forward without "
            "one (use_cache=False): memcompile derives the memory itself"
        )
    if kind in ("builtins.tuple", "builtins.list"):
        if context not in ("null", None):
            raise Refused(f"a {kind} in the signature has the context {shown(context)}")
        return {"type": kind, "context": "null", "children_spec": children}
    output = isinstance(kind, str) and re.fullmatch(r"transformers\.[\w.]+Output\w*", kind)
    if kind in ("builtins.dict", "collections.OrderedDict") or output:
        try:
            keys = json.loads(str(context))
        except (TypeError, ValueError) as error:
            raise Refused(f"a {kind} in the signature has the context {shown(context)}") from error
        names = [identifier(key) for key in json_list(keys)]
        if len(names) == len(children):
            return {
                "type": "builtins.dict",
                "context": json.dumps(names),
                "children_spec": children,
            }
    raise Refused(
        f"the signature holds {shown(kind)}; only tuples, lists, dicts and transformers outputs "
        "can be read without running code"
    )


def json_object(data: Any, of: str) -> dict[str, Any]:
    """`data`, if it is a JSON object."""
    if isinstance(data, dict):
        return data
    raise Refused(f"{of} is {shown(data)} and not a JSON object")


def json_list(data: Any) -> list[Any]:
    """`data`, if it is a list."""
    if isinstance(data, list):
        return data
    raise Refused(f"{shown(data)} stands where a list is expected")


def one_of(data: Any, known: Any, what: str) -> str:
    """`data`, if it is one of the texts in `known`."""
    if isinstance(data, str) and data in known:
        return data
    raise Refused(f"the {what} {shown(data)} is not one of {', '.join(map(repr, known))}")


def shown(data: Any) -> str:
    """`data` for a message: printable, on one line, short."""
    text = ascii(data)
    return text if len(text) <= 80 else text[:77] + "..."
