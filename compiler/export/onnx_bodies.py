"""What memory nodes mean: a function of standard operators for each kind of call.

The functions are not written by hand: each is the operator's text (`models.portable.TEXTS`), run on
stand-ins (`onnx_symbols.py`) of the call's types and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...models import portable
from .onnx_model import DOMAIN, NODES
from .onnx_recorder import Recorder, numpy_of, parsed
from .onnx_symbols import Symbol, symbol_of, written

if TYPE_CHECKING:
    import onnx_ir as ir

_OPERATORS = {node: name for name, node in NODES.items()}


def attach_bodies(models: Sequence[ir.Model], branches: bool = True) -> None:
    """Gives every memory node of these models a body; calls alike share one.

    Bodies depend on types, sizes and static arguments: where an operator is called in several ways,
    each has its own function, told apart by the node's `overload`.

    Args:
        branches: whether bodies may hold an If.
    """

    calls: dict[Any, list[ir.Node]] = {}
    for model in models:
        for node in model.graph:
            if node.domain == DOMAIN:
                _drop_unread(node)
                calls.setdefault(_key(node), []).append(node)
    if not calls:
        return
    opset = models[0].opset_imports[""]
    functions = [_function(nodes[0], opset, branches) for nodes in calls.values()]
    used: dict[str, int] = {}
    for nodes, function in zip(calls.values(), functions, strict=True):
        kind = nodes[0].op_type
        used[kind] = used.get(kind, 0) + 1
        overload = "" if used[kind] == 1 else str(used[kind])
        function.overload = overload
        for node in nodes:
            node.overload = overload
    for model in models:
        wanted = {n.op_identifier() for n in model.graph if n.domain == DOMAIN}
        for function in functions:
            if function.identifier() in wanted:
                model.functions[function.identifier()] = _copy(function)
        model.opset_imports[DOMAIN] = 1


def _drop_unread(node: ir.Node) -> None:
    """Drops outputs at a node's end that nothing reads: runtimes compute them all the same."""
    count = len(node.outputs)
    while count > 1:
        last = node.outputs[count - 1]
        if last.uses() or last.is_graph_output():
            break
        count -= 1
    node.resize_outputs(count)


def _key(node: ir.Node) -> Any:
    attributes = tuple((name, _static(value)) for name, value in sorted(node.attributes.items()))
    types = tuple((value.dtype, str(value.shape)) for value in node.inputs if value is not None)
    return node.op_type, attributes, types, len(node.outputs)


def _static(attribute: Any) -> Any:
    value = attribute.value
    return tuple(value) if isinstance(value, list | tuple) else value


def _function(node: ir.Node, opset: int, branches: bool) -> ir.Function:
    """What a node means."""
    import onnx_ir as ir

    static = {name: _static(value) for name, value in node.attributes.items()}
    given = {}
    for name, value in zip(static["inputs"], node.inputs, strict=True):
        assert value is not None and value.shape is not None and value.dtype is not None
        sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
        given[name] = (_torch_dtype(value.dtype), sizes)
    graph, results = write_body(
        *(_OPERATORS[node.op_type], given, static, opset, len(node.outputs), branches)
    )
    _check_results(node, results)
    attributes = [ir.Attr(name, value.type, None) for name, value in node.attributes.items()]
    return ir.Function(DOMAIN, node.op_type, "", graph=graph, attributes=attributes)


def write_body(
    name: str,
    given: Mapping[str, tuple[torch.dtype, Sequence[int | str]]],
    static: Mapping[str, Any],
    opset: int,
    count: int | None = None,
    branches: bool = True,
) -> tuple[ir.Graph, list[Symbol]]:
    """An operator's text, run on stand-ins of its tensors.

    Args:
        name: in `models.portable.OPS`.
        given: type and shape of each tensor; those of a list are `index_0`, `index_1`, ... Sizes
            that are only known when the engine runs are symbols or multiples: `8*units`.
        static: its other arguments.
        count: of its outputs, as many as are wanted; None: all.
        branches: as `attach_bodies`.

    Returns:
        The graph; its outputs, `out0`, `out1`, ...
    """
    import onnx_ir as ir
    import onnx_ir.passes.common as passes

    recorder = Recorder(opset, branches)
    by_name: dict[str, Symbol] = {}
    for key, (dtype, sizes) in given.items():
        number = ir.DataType.from_numpy(numpy_of(dtype))
        value = ir.Value(name=key, type=ir.TensorType(number), shape=ir.Shape(sizes))
        by_name[key] = symbol_of(recorder, value, dtype, sizes)
    operator = portable.operator(name)
    made = portable.TEXTS[operator](*_arguments(operator, by_name, static))
    results = ([made] if isinstance(made, Symbol) else [*made])[:count]
    outputs = written(results)
    for order, output in enumerate(outputs):
        output.name = f"out{order}"
    inputs = [symbol.value for symbol in by_name.values()]
    graph = ir.Graph(inputs, outputs, nodes=recorder.nodes, opset_imports={"": opset}, name=name)
    passes.RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
    return graph, results


def _arguments(
    operator: torch._ops.OpOverload, by_name: Mapping[str, Symbol], static: Mapping[str, Any]
) -> list[Any]:
    args: list[Any] = []
    for argument in operator._schema.arguments:
        kind, name = str(argument.type), argument.name
        if kind == "List[Tensor]":
            args.append([x for key, x in by_name.items() if re.fullmatch(rf"{name}_\d+", key)])
        elif "Tensor" in kind:
            args.append(by_name.get(name))
        elif kind.startswith("List"):
            args.append(list(static.get(name, ())))
        else:
            args.append(static[name])
    return args


def _check_results(node: ir.Node, symbols: Sequence[Symbol]) -> None:
    """The types and sizes that the exporter has for the outputs are those that were written."""
    for output, symbol in zip(node.outputs, symbols, strict=True):
        sizes = [d if isinstance(d, int) else parsed(str(d.value)) for d in output.shape or ()]
        have = [d if isinstance(d, int) else d.expression for d in symbol.shape]
        if _torch_dtype(output.dtype) != symbol.dtype or sizes != have:
            raise AssertionError(
                f"{node.op_type}: wrote {symbol.dtype} {have} where {output.dtype} {sizes} was "
                "expected"
            )


def _torch_dtype(dtype: Any) -> torch.dtype:
    name = {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
    found: torch.dtype = getattr(torch, name)
    return found


def _copy(function: ir.Function) -> ir.Function:
    import onnx_ir as ir

    made: ir.Function = ir.serde.deserialize_function(ir.serde.serialize_function(function))
    return made
