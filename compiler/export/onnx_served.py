"""One ONNX model for a server that keeps the state: tokens in, logits out, all else is state.

The position is state, too, lengths follow from the tokens, and a call of many tokens reads densely,
as a prompt is read; all others read through the policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .contract import Contract
from .onnx_write import identity
from .triton_config import LAST, new_name

if TYPE_CHECKING:
    import onnx_ir as ir

# Calls of up to this many tokens read through the policy, as the torch.compile backend's do.
DECODE_TOKENS = 16
POLICY, DENSE = "policy", "dense"


def served(models: Mapping[str, ir.Model], contract: Contract) -> ir.Model:
    """The model that a server runs.

    Args:
        models: complete ones of the contract: POLICY, and DENSE where the policy chooses what it
            reads; they are taken apart.

    Returns:
        inputs: tokens int64 [batch, n], position int32 [batch, 1], the contract's state;
        outputs: logits [batch, n, V], LAST [batch, V], and `new_name` of each state, the position
        first.
    """
    import onnx_ir as ir

    main = models[POLICY]
    source = {str(value.name): value for value in main.graph.inputs}
    logits_like = main.graph.outputs[0]
    tokens = _like(source[contract.tokens])
    position = _like(source[contract.position])
    position.shape = ir.Shape([*(position.shape or ()), 1])
    state = [_like(source[tensor.input]) for tensor in contract.state]
    build = _Builder()
    one, last = build.constant("one", [1]), build.constant("last", -1)
    count = build.op("Shape", tokens, name="count", start=1, end=2)
    rows = build.op("Cast", count, name="rows", to=int(ir.DataType.INT32))
    given = {str(value.name): value for value in (tokens, *state)}
    given[contract.position] = build.op("Squeeze", position, one, name="positions")
    if contract.lengths is not None:
        batch = build.op("Shape", tokens, name="sequences", start=0, end=1)
        given[contract.lengths] = build.op("Expand", rows, batch, name="lengths")
    moved = build.op("Add", position, rows, name=new_name(contract.position))
    moved.type, moved.shape = position.type, position.shape
    types = [(value.type, value.shape) for value in main.graph.outputs]
    parts = {name: _taken(name, model, given, build.weights) for name, model in models.items()}
    results, nodes = parts[POLICY]
    if DENSE in parts:
        most, zero = build.constant("decode_tokens", DECODE_TOKENS), build.constant("zero", 0)
        tokens_now = build.op("Gather", count, zero, name="tokens_now", axis=0)
        many = build.op("Greater", tokens_now, most, name="many")
        branches = [
            ir.AttrGraph(branch, ir.Graph([], outputs, nodes=inner, name=name))
            for branch, name in (("then_branch", DENSE), ("else_branch", POLICY))
            for outputs, inner in [parts[name]]
        ]
        nodes = [ir.Node("", "If", [many], branches, num_outputs=len(results))]
        results = list(nodes[0].outputs)
    build.nodes += nodes
    names = [contract.logits, *(new_name(tensor.input) for tensor in contract.state)]
    for value, name, (kind, shape) in zip(results, names, types, strict=True):
        value.name, value.type, value.shape = name, kind, shape
    final = build.op("Gather", results[0], last, name=LAST, axis=1)
    final.type = logits_like.type
    sizes = [*(logits_like.shape or ())]
    final.shape = ir.Shape([sizes[0], sizes[2]])
    graph = ir.Graph(
        [tokens, position, *state],
        [results[0], final, moved, *results[1:]],
        nodes=build.nodes,
        initializers=[*build.constants, *build.weights.values()],
        opset_imports=main.graph.opset_imports,
        name="served",
    )
    functions = {key: body for model in models.values() for key, body in model.functions.items()}
    return ir.Model(
        graph,
        ir_version=main.ir_version,
        producer_name=main.producer_name,
        functions=list(functions.values()),
    )


class _Builder:
    """Nodes and constants of the outer graph."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.weights: dict[Any, ir.Value] = {}

    def constant(self, name: str, value: int | list[int]) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor(value, dtype=ir.DataType.INT64, name=name)
        made = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([1] if isinstance(value, list) else []),
        )
        self.constants.append(made)
        return made

    def op(self, kind: str, *inputs: ir.Value, name: str, **attributes: Any) -> ir.Value:
        import onnx_ir as ir

        given = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", kind, list(inputs), given, num_outputs=1)
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]


def _like(value: ir.Value) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _taken(
    prefix: str, model: ir.Model, given: Mapping[str, ir.Value], weights: dict[Any, ir.Value]
) -> tuple[list[ir.Value], list[ir.Node]]:
    """A graph's outputs and nodes, on the outer graph's values, under names of their own.

    Args:
        weights: the outer graph's by what they hold; this graph's are added.
    """
    graph = model.graph
    for value in list(graph.inputs):
        value.replace_all_uses_with(given[str(value.name)])
    for name, value in list(graph.initializers.items()):
        del graph.initializers[name]
        assert value.const_value is not None
        key = identity(value.const_value)
        if key in weights:
            value.replace_all_uses_with(weights[key])
        else:
            value.name = f"{prefix}/{name}"
            weights[key] = value
    outputs, nodes = list(graph.outputs), list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    for node in nodes:
        node.name = None
        for value in node.outputs:
            value.name = f"{prefix}/{value.name}"
    return outputs, nodes
