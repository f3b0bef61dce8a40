"""A serialised graph, checked and copied field by field, so that reading it can execute nothing.

Loading an exported program evaluates more of its JSON than one would think: shape expressions go
through sympy's parser, which calls `eval`; operator names are looked up by attribute, from `torch`
on, where `torch.os.system` is as good a name as any; tree contexts import modules; guards, node
names and parameter names become source text of a function that is compiled. So every string is
checked by what it is for, a field that is not known is refused, and what only serves debugging is
left out of the copy.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import torch

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,511}")
_DOTTED = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,9}")
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
_SYMBOLIC = {
    f"_operator.{name}"
    for name in (
        "eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv and_ or_ lshift rshift getitem"
    ).split()
}
_SYMBOLIC |= {f"math.{name}" for name in ("trunc", "floor", "ceil")}
_SYMBOLIC |= {
    f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt", "sum")
}
_SYMBOLIC |= {"torch._sym_sqrt"}

_EXPRESSION_CALLS = set(
    "Add Mul Pow Integer Float Rational Symbol Max Min Mod Abs And Or Not Eq Ne Lt Le Gt Ge Equality "
    "Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan floor ceiling FloorDiv "
    "ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift "
    "PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt RoundDecimal "
    "ToFloat Identity IsNonOverlappingAndDenseIndicator".split()
)
_EXPRESSION_NAMES = {"oo", "int_oo", "true", "false"}
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}
_LARGEST_POWER = 64
_LONGEST_EXPRESSION = 4096
_LARGEST_INTEGER = 2**63

_VERIFIERS = {"TRAINING", "ATEN", ""}


class Refused(ValueError):
    """Something in the file would run, or could make something run, when it is loaded."""


def vet_program(data: Any) -> dict[str, Any]:
    """A copy of a serialised ExportedProgram that holds only what was checked.

    Raises:
        Refused: a field that would be executed or is not known; the message names it.
    """
    program = _object(data, "the program")
    graph = _object(program.get("graph_module"), "graph_module")
    cleaned = _fields(program, _PROGRAM, "the program")
    cleaned["verifiers"] = [
        _one_of(v, _VERIFIERS, "verifier") for v in program.get("verifiers", [])
    ]
    cleaned["guards_code"] = [_guard(text) for text in _list(program.get("guards_code", []))]
    cleaned["graph_module"] = {
        "graph": _walk(graph.get("graph"), "graph"),
        "signature": _walk(graph.get("signature"), "signature"),
        "module_call_graph": _calls(graph.get("module_call_graph")),
        "metadata": {},
        "treespec_namedtuple_fields": {},
    }
    return cleaned


def vet_payloads(data: Any, config: str) -> dict[str, dict[str, Any]]:
    """The entries of a weights or constants config: name -> {path_name, is_param, tensor_meta}.

    Raises:
        Refused: an entry that is unpickled, or one without tensor metadata.
    """
    entries = _object(_object(data, config).get("config"), f"{config}: config")
    checked: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        dotted(name)
        fields = _object(entry, f"{config}: {name}")
        path = fields.get("path_name")
        if not isinstance(path, str) or not _IDENTIFIER.fullmatch(path):
            raise Refused(f"{config}: entry {name!r} has the path {path!r}, not a plain file name")
        if fields.get("use_pickle") is not False:
            raise Refused(f"{config}: {name!r} is stored as a pickle ({path}), which can run code")
        if fields.get("tensor_meta") is None:
            raise Refused(f"{config}: {name!r} ({path}) is no tensor but an object")
        checked[name] = {
            "path_name": path,
            "is_param": fields.get("is_param") is True,
            "use_pickle": False,
            "tensor_meta": _walk(fields["tensor_meta"], "tensor_meta"),
        }
    return checked


def identifier(text: Any) -> str:
    """`text`, if it can stand as a name in generated source.

    Raises:
        Refused: it cannot.
    """
    if isinstance(text, str) and (text == "" or _IDENTIFIER.fullmatch(text)):
        return text
    raise Refused(f"the name {_shown(text)} is not an identifier, and names become source code")


def dotted(text: Any) -> str:
    """`text`, if it can stand as the path of a module or parameter in generated source.

    Raises:
        Refused: it cannot.
    """
    if isinstance(text, str) and (text == "" or _DOTTED.fullmatch(text)):
        return text
    raise Refused(f"the path {_shown(text)} is not dotted names, and paths become source code")


def _target(text: Any) -> str:
    if not isinstance(text, str):
        raise Refused(f"an operator is named {_shown(text)}")
    return _operator(text)


@functools.lru_cache(maxsize=4096)
def _operator(text: str) -> str:
    """The name of an operator that only computes."""
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
        raise Refused(f"the graph calls {_shown(text)}, a Python function and not an operator")
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


def _expression(text: Any) -> str:
    if not isinstance(text, str) or len(text) > _LONGEST_EXPRESSION:
        raise Refused(f"the shape expression {_shown(text)} is not a short text")
    return _sympy(text)


@functools.lru_cache(maxsize=4096)
def _sympy(text: str) -> str:
    """A shape expression: calls of known functions on symbols and numbers, nothing else."""
    try:
        tree = ast.parse(text, mode="eval")
        _arithmetic(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(
            f"the shape expression {_shown(text)} is more than arithmetic on symbols, and sympy "
            "would evaluate it as Python"
        ) from error
    return ast.unparse(tree)


def _arithmetic(node: ast.AST, inside_power: bool = False) -> None:
    match node:
        case ast.Constant(value=bool()):
            return
        case ast.Constant(value=int() | float() as number) if abs(number) <= _LARGEST_INTEGER:
            return
        case ast.Name(id=name) if name in _EXPRESSION_NAMES or _SYMBOL.fullmatch(name):
            return
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _arithmetic(operand, inside_power)
        case ast.BinOp(op=ast.Pow(), left=left, right=right):
            return _power([left, right], inside_power)
        case ast.BinOp(
            op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod()
        ):
            _arithmetic(node.left, inside_power)
            return _arithmetic(node.right, inside_power)
        case ast.Compare(left=left, comparators=others):
            for part in (left, *others):
                _arithmetic(part, inside_power)
            return None
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)]):
            assumptions = all(isinstance(k.value, ast.Constant) for k in node.keywords)
            if _SYMBOL.fullmatch(name) and assumptions:
                return None
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str() as number)]):
            if re.fullmatch(r"[-+0-9.e]{1,40}", number) and abs(float(number)) < 1e300:
                return None
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            if name in _POWERS:
                return _power(arguments, inside_power)
            if name in _EXPRESSION_CALLS:
                for argument in arguments:
                    _arithmetic(argument, inside_power)
                return None
    raise ValueError(ast.dump(node))


def _power(arguments: list[ast.expr], inside_power: bool) -> None:
    """sympy works powers of numbers out at once, so neither large nor nested ones."""
    if inside_power or len(arguments) != 2:
        raise ValueError("nested power")
    base, exponent = arguments
    text = ast.unparse(exponent)
    number = re.fullmatch(r"(?:Integer\()?(-?\d{1,3})\)?|Rational\(-?\d{1,2}, \d{1,2}\)", text)
    if number is None or abs(int(number[1] or 0)) > _LARGEST_POWER:
        raise ValueError("large power")
    _arithmetic(base, inside_power=True)
    _arithmetic(exponent, inside_power=True)


def _guard(text: Any) -> str:
    """An input guard: comparisons of the inputs' sizes. torch executes its text."""
    try:
        if not isinstance(text, str) or len(text) > _LONGEST_EXPRESSION:
            raise ValueError("not a short text")
        tree = ast.parse(text, mode="eval")
        _guard_node(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Refused(
            f"the guard {_shown(text)} is more than a comparison of input sizes, and guards are "
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


def _calls(entries: Any) -> list[dict[str, Any]]:
    """Only the root's calling convention: the others serve `unflatten`, which is not used."""
    calls = []
    for entry in _list(entries):
        fields = _object(entry, "module_call_graph")
        path, signature = dotted(fields.get("fqn", "")), fields.get("signature")
        if path != "":
            calls.append({"fqn": path, "signature": None})
        elif signature is not None:
            calls.append({"fqn": "", "signature": _call_signature(signature)})
    return calls


def _call_signature(signature: Any) -> dict[str, Any]:
    fields = _object(signature, "module_call_graph: signature")
    names = fields.get("forward_arg_names")
    return {
        "inputs": [_walk(x, "inputs") for x in _list(fields.get("inputs"))],
        "outputs": [_walk(x, "outputs") for x in _list(fields.get("outputs"))],
        "in_spec": _tree_text(fields.get("in_spec")),
        "out_spec": _tree_text(fields.get("out_spec")),
        "forward_arg_names": None if names is None else [identifier(n) for n in _list(names)],
    }


def _tree_text(text: Any) -> str:
    try:
        protocol, tree = json.loads(text)
    except (TypeError, ValueError) as error:
        raise Refused(f"the tree {_shown(text)} is no JSON pair") from error
    if protocol != 1:
        raise Refused(f"a tree has protocol {protocol!r}; 1 is known")
    return json.dumps([1, _tree(tree)])


def _tree(tree: Any) -> dict[str, Any]:
    """Tuples, lists and dicts stay; an output class of transformers becomes the dict it is.

    Contexts of other types import modules and call what they find there.
    """
    fields = _object(tree, "a tree")
    kind, context = fields.get("type"), fields.get("context")
    children = [_tree(child) for child in _list(fields.get("children_spec"))]
    if kind is None and context is None and not children:
        return {"type": None, "context": None, "children_spec": []}
    if isinstance(kind, str) and "cache" in kind.lower():
        raise Refused(
            f"its signature takes or returns a cache ({_shown(kind)}); export the forward without "
            "one (use_cache=False): memcompile derives the memory itself"
        )
    if kind in ("builtins.tuple", "builtins.list"):
        if context not in ("null", None):
            raise Refused(f"a {kind} in the signature has the context {_shown(context)}")
        return {"type": kind, "context": "null", "children_spec": children}
    output = isinstance(kind, str) and re.fullmatch(r"transformers\.[\w.]+Output\w*", kind)
    if kind in ("builtins.dict", "collections.OrderedDict") or output:
        try:
            keys = json.loads(context)
        except (TypeError, ValueError) as error:
            raise Refused(f"a {kind} in the signature has the context {_shown(context)}") from error
        names = [identifier(key) for key in _list(keys)]
        if len(names) == len(children):
            return {
                "type": "builtins.dict",
                "context": json.dumps(names),
                "children_spec": children,
            }
    raise Refused(
        f"the signature holds {_shown(kind)}; only tuples, lists, dicts and transformers outputs "
        "can be read without running code"
    )


def _metadata(data: Any) -> dict[str, str]:
    """Where a node comes from, for reports; nothing else of its metadata."""
    kept = {}
    for key in ("stack_trace", "nn_module_stack"):
        text = _object(data, "metadata").get(key)
        if isinstance(text, str):
            kept[key] = "".join(c for c in text if c == "\n" or c.isprintable())
    return kept


def _device(text: Any) -> str:
    known = ("cpu", "meta", "cuda", "mps", "xpu")
    kind = _one_of(text, known, "device")
    if kind in ("cuda", "mps", "xpu") and not (
        torch.accelerator.is_available()
        and str(torch.accelerator.current_accelerator()).startswith(kind)
    ):
        raise Refused(
            f"it was exported for {kind}, which this machine does not have; export on cpu"
        )
    return kind


def _names(data: Any, of: str) -> dict[str, Any]:
    return {identifier(name): _walk(value, of) for name, value in _object(data, of).items()}


def _ranges(data: Any) -> dict[str, Any]:
    checked = {}
    for name, bounds in _object(data, "range_constraints").items():
        if not _SYMBOL.fullmatch(name):
            raise Refused(f"range_constraints has the symbol {_shown(name)}")
        checked[name] = _walk(bounds, "range_constraints")
    return checked


def _versions(data: Any) -> dict[str, Any]:
    return {identifier(name): _number(value) for name, value in _object(data, "versions").items()}


def _script_object(data: Any) -> Any:
    if data:
        raise Refused(
            "the graph holds a script or opaque object (custom_obj), which runs on loading"
        )
    return data


def _number(data: Any) -> Any:
    """A number, a truth value or nothing; JSON has no infinities, torch spells them."""
    if data is None or isinstance(data, bool | int | float):
        return data
    if data in ("Infinity", "-Infinity", "NaN"):
        return data
    raise Refused(f"{_shown(data)} stands where a number is expected")


def _free_text(data: Any) -> str:
    if isinstance(data, str):
        return data
    raise Refused(f"{_shown(data)} stands where a text is expected")


def _texts(data: Any) -> list[str]:
    return [_free_text(item) for item in _list(data)]


def _numbers(data: Any) -> Any:
    return [_numbers(x) for x in data] if isinstance(data, list) else _number(data)


def _nested(data: Any) -> Any:
    return _walk(data, "a field")


_PROGRAM: dict[str, Callable[[Any], Any]] = {
    "opset_version": _versions,
    "range_constraints": _ranges,
    "schema_version": _versions,
    "torch_version": _free_text,
    # Read by vet_program itself.
    "graph_module": lambda data: None,
    "verifiers": lambda data: None,
    "guards_code": lambda data: None,
}

# Every field of a graph and its signature, by what it is for.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("name", "as_name"), identifier),
    **dict.fromkeys(("target", "as_operator"), _target),
    **dict.fromkeys(
        ("parameter_name", "buffer_name", "tensor_constant_name", "user_input_name"), dotted
    ),
    **dict.fromkeys(("custom_obj", "custom_obj_values", "as_custom_obj"), _script_object),
    **dict.fromkeys(
        ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"),
        lambda data: _names(data, "values"),
    ),
    **dict.fromkeys(
        (
            "as_none as_int as_float as_bool as_scalar_type as_memory_format as_layout real imag "
            "index kind dtype layout requires_grad persistent min_val max_val "
            "is_single_tensor_return is_hop_single_tensor_return"
        ).split(),
        _number,
    ),
    **dict.fromkeys(
        ("as_ints", "as_floats", "as_bools", "as_int_lists", "as_float_lists"), _numbers
    ),
    **dict.fromkeys(
        (
            "arg args as_tensor as_tensors as_optional_tensor as_optional_tensors as_nested_tensors "
            "as_sym_int as_sym_ints as_sym_float as_sym_floats as_sym_bool as_sym_bools as_expr hint "
            "as_device as_graph as_complex graph nodes inputs outputs input_specs output_specs "
            "user_input parameter buffer tensor_constant token constant_input value user_output "
            "loss_output buffer_mutation gradient_to_parameter gradient_to_user_input "
            "user_input_mutation parameter_mutation sizes strides storage_offset device"
        ).split(),
        _nested,
    ),
    "as_string": _free_text,
    "as_strings": _texts,
    "as_string_to_argument": lambda data: _names(data, "arguments"),
    "expr_str": _expression,
    "metadata": _metadata,
    "type": _device,
}


def _walk(data: Any, of: str) -> Any:
    if isinstance(data, dict):
        return _fields(data, _FIELDS, of)
    if isinstance(data, list):
        return [_walk(item, of) for item in data]
    return _number(data)


def _fields(
    data: dict[str, Any], known: dict[str, Callable[[Any], Any]], of: str
) -> dict[str, Any]:
    checked = {}
    for key, value in data.items():
        check = known.get(key)
        if check is None:
            if value in (None, False, "", [], {}):
                continue
            raise Refused(
                f"{of} has the field {_shown(key)}, which this version of memcompile does not know"
            )
        if (value is None) or (key == "value" and value == {}):
            checked[key] = value
        else:
            checked[key] = check(value)
    return checked


def _object(data: Any, of: str) -> dict[str, Any]:
    if isinstance(data, dict):
        return data
    raise Refused(f"{of} is {_shown(data)} and not a JSON object")


def _list(data: Any) -> list[Any]:
    if isinstance(data, list):
        return data
    raise Refused(f"{_shown(data)} stands where a list is expected")


def _one_of(data: Any, known: Any, what: str) -> str:
    if isinstance(data, str) and data in known:
        return data
    raise Refused(f"the {what} {_shown(data)} is not one of {', '.join(map(repr, known))}")


def _shown(data: Any) -> str:
    text = ascii(data)
    return text if len(text) <= 80 else text[:77] + "..."
