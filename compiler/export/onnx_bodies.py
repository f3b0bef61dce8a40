"""What memory nodes mean: a function of standard operators for each kind of call.

The functions are not written by hand: each is the operator's text (`models.portable.TEXTS`),
exported by itself with the call's types and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models import portable
from .onnx_model import DOMAIN, NODES, exported, largest_as_topk, optimise, strip

if TYPE_CHECKING:
    import onnx_ir as ir

_OPERATORS = {node: name for name, node in NODES.items()}


def attach_bodies(models: Sequence[ir.Model]) -> None:
    """Gives every memory node of these models a body; calls alike share one.

    Bodies depend on types, sizes and static arguments: where an operator is called in several ways,
    each has its own function, told apart by the node's `overload`.
    """
    import onnx_ir as ir

    calls: dict[Any, list[ir.Node]] = {}
    for model in models:
        for node in model.graph:
            if node.domain == DOMAIN:
                calls.setdefault(_key(node), []).append(node)
    if not calls:
        return
    firsts = [nodes[0] for nodes in calls.values()]
    functions = _functions(firsts, models[0].opset_imports[""])
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


def _key(node: ir.Node) -> Any:
    attributes = tuple((name, _static(value)) for name, value in sorted(node.attributes.items()))
    types = tuple((value.dtype, str(value.shape)) for value in node.inputs if value is not None)
    return node.op_type, attributes, types


def _static(attribute: Any) -> Any:
    value = attribute.value
    return tuple(value) if isinstance(value, list | tuple) else value


class _Bodies(nn.Module):
    """Every call, one after the other, on tensors of its own."""

    def __init__(self, calls: Sequence[_Call]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *given: Tensor) -> list[Tensor]:
        rest, made = list(given), []
        for call in self.calls:
            count = len(call.names)
            made += call(rest[:count])
            del rest[:count]
        return made


class _Call:
    """One way that an operator is called."""

    def __init__(self, node: ir.Node, number: int) -> None:
        self.name = _OPERATORS[node.op_type]
        self.operator = portable.operator(self.name)
        self.static = {name: _static(value) for name, value in node.attributes.items()}
        self.names: tuple[str, ...] = self.static["inputs"]
        self.number = number
        self.outputs = len(node.outputs)
        self.given, self.axes = [], []
        dims: dict[str, Any] = {}
        for value in node.inputs:
            tensor, axes = _example(value, dims, number)
            self.given.append(tensor)
            self.axes.append(axes)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        by_name = dict(zip(self.names, tensors, strict=True))
        args: list[Any] = []
        for argument in self.operator._schema.arguments:
            kind, name = str(argument.type), argument.name
            if kind == "List[Tensor]":
                args.append([x for key, x in by_name.items() if re.fullmatch(rf"{name}_\d+", key)])
            elif "Tensor" in kind:
                args.append(by_name.get(name))
            elif kind.startswith("List"):
                args.append(list(self.static.get(name, ())))
            else:
                args.append(self.static[name])
        made = portable.TEXTS[self.operator](*args)
        return [made] if isinstance(made, Tensor) else [*made]


def _example(value: Any, dims: dict[str, Any], number: int) -> tuple[Tensor, dict[int, Any]]:
    """A tensor of the value's type and shape, and which of its axes are symbols of this call."""
    from torch.export import Dim

    shape, axes = [], {}
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(size)
            continue
        times, symbol = _factor(str(size.value))
        if symbol not in dims:
            dims[symbol] = Dim(f"call{number}_{len(dims)}")
            # Each its own size, so that no two are taken for one.
        shape.append(times * (3 + 2 * list(dims).index(symbol)))
        axes[axis] = times * dims[symbol] if times > 1 else dims[symbol]
    return torch.zeros(shape, dtype=_torch_dtype(value.dtype)), axes


def _factor(text: str) -> tuple[int, str]:
    """`8*units` as (8, "units"); another symbol or expression stands for itself."""
    found = re.fullmatch(r"(\d+)\*(\w+)", text)
    return (int(found[1]), found[2]) if found else (1, text)


def _torch_dtype(dtype: Any) -> torch.dtype:
    name = {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
    found: torch.dtype = getattr(torch, name)
    return found


def _put_rows(cache: Any, at: Any, new: Any) -> Any:
    """`put_rows`: ScatterND straight on the cache, which a bound output updates in place."""
    from onnxscript import opset18 as op

    batch, heads = op.Shape(cache, start=0, end=1), op.Shape(cache, start=1, end=2)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    whole = op.Concat(batch, heads, op.Shape(at, start=1, end=2), op.Constant(value_ints=[1]), axis=0)
    first = op.Range(zero, op.Squeeze(batch), one)
    second = op.Range(zero, op.Squeeze(heads), one)
    where = op.Concat(
        op.Expand(op.Unsqueeze(first, op.Constant(value_ints=[1, 2, 3])), whole),
        op.Expand(op.Unsqueeze(second, op.Constant(value_ints=[0, 2, 3])), whole),
        op.Expand(op.Unsqueeze(at, op.Constant(value_ints=[1, 3])), whole),
        axis=-1,
    )
    return op.ScatterND(cache, where, new)


def _functions(nodes: Sequence[ir.Node], opset: int) -> list[ir.Function]:
    """A function for each call. All are exported at once; symbols of their own keep them apart."""
    import onnx_ir as ir

    calls = [_Call(node, number) for number, node in enumerate(nodes)]
    names = [f"call{call.number}_{name}" for call in calls for name in call.names]
    results = [f"call{call.number}_out{i}" for call in calls for i in range(call.outputs)]
    table = {
        portable.operator("largest"): largest_as_topk,
        portable.operator("put_rows"): _put_rows,
    }
    given = [x for call in calls for x in call.given]
    axes = (tuple(x for call in calls for x in call.axes),)  # of forward's *given
    model = exported(
        _Bodies(calls), given, axes, table, opset, input_names=names, output_names=results
    )
    optimise(model)
    strip(model)
    made = []
    for call, node in zip(calls, nodes, strict=True):
        first, last = f"call{call.number}_", f"call{call.number}_out"
        body = ir.convenience.extract(
            model.graph,
            [f"{first}{name}" for name in call.names],
            [f"{last}{i}" for i in range(call.outputs)],
        )
        made.append(_function(body, node, first))
    return made


def _function(body: ir.Graph, node: ir.Node, prefix: str) -> ir.Function:
    import onnx_ir as ir

    for value in list(body.initializers.values()):
        constant = ir.node("Constant", [], {"value": value.const_value})
        constant.outputs[0].name = value.name
        body.insert_before(body[0], constant)
        value.replace_all_uses_with(constant.outputs[0])
        del body.initializers[value.name]
    for value in [*body.inputs, *body.outputs]:
        value.name = value.name.removeprefix(prefix)
    attributes = [ir.Attr(name, value.type, None) for name, value in node.attributes.items()]
    return ir.Function(DOMAIN, node.op_type, "", graph=body, attributes=attributes)


def _copy(function: ir.Function) -> ir.Function:
    import onnx_ir as ir

    made: ir.Function = ir.serde.deserialize_function(ir.serde.serialize_function(function))
    return made
