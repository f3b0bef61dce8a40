"""Turn an exported program into a fresh graph whose weights are attributes, not inputs."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from .result import Declined, PassResult

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def unlift(program: ExportedProgram) -> PassResult:
    """Copy the program's graph, weights as `get_attr` nodes; a graph from `program.module()` would
    check its inputs against the old signature.

    Graphs that write in place are functionalised first; one that writes to a buffer (a cache or
    table that outlives the call) is declined.
    """
    if any(_mutates(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    signature = program.graph_signature
    declined = [
        Declined(
            f"the forward writes to {spec.target!r}: a model that keeps state of its own cannot be "
            "given a memory; return the value instead",
            str(getattr(spec.arg, "name", spec.arg)),
            "unlift",
        )
        for spec in signature.output_specs
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    ]
    root = nn.Module()
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
    shared: dict[int, str] = {}
    result: fx.Node | None = None
    for node in program.graph.nodes:
        if node.op == "placeholder" and specs[node.name].kind in _WEIGHTS:
            spec = specs[node.name]
            weight = program.state_dict.get(spec.target)
            if weight is None:
                weight = program.constants[spec.target]
            name = shared.setdefault(id(weight), node.name)
            if name == node.name:
                if isinstance(weight, nn.Parameter):
                    root.register_parameter(name, weight)
                else:
                    root.register_buffer(name, weight)
            if not node.users:
                continue
            new = graph.get_attr(name)
            new.meta = dict(node.meta)
        elif node.op == "placeholder" and isinstance(specs[node.name].arg, ConstantArgument):
            continue  # an argument that was a plain number or flag at export
        elif node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            declined.append(
                Declined(
                    f"input {node.name!r} is a {specs[node.name].kind.name.lower()}, not a tensor",
                    node.name,
                    "unlift",
                )
            )
            new = graph.node_copy(node, lambda n: copied[n])
        elif node.op == "output":
            outputs = node.args[0]
            wanted = [
                outputs[i]
                for i, spec in enumerate(signature.output_specs)
                if spec.kind is OutputKind.USER_OUTPUT
            ]
            result = graph.output(copied[wanted[0]])
            continue
        elif node.op == "get_attr":
            setattr(root, str(node.target), operator.attrgetter(node.target)(program.graph_module))
            new = graph.node_copy(node, lambda n: copied[n])
        else:
            new = graph.node_copy(node, lambda n: copied[n])
        copied[node] = new
    assert result is not None
    return PassResult(fx.GraphModule(root, graph), 1, declined)


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.is_mutable
        and bool(node.op == "call_function")
    )
