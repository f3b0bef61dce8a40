"""Turn an exported program into a fresh graph whose weights are attributes, not inputs."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from .result import Declined, PassResult

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def unlift(program: ExportedProgram) -> PassResult:
    """Copy the program's graph, weights as `get_attr` nodes; a graph from `program.module()` would
    check its inputs against the old signature. Regions that only switch gradients or autocast off
    lose their switch.

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
    regions: dict[fx.Node, Any] = {}
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
        elif (region := _region(node, program.graph_module)) is not None:
            body, arguments = region
            inputs = (n for n in body.nodes if n.op == "placeholder")
            inside = {n: copied[a] for n, a in zip(inputs, arguments, strict=True)}
            regions[node] = graph.graph_copy(body, inside)
            continue
        elif node.target is operator.getitem and node.args[0] in regions:
            new = regions[node.args[0]][node.args[1]]
        elif node.op == "get_attr":
            if all(_region(user, program.graph_module) is not None for user in node.users):
                continue
            setattr(root, str(node.target), operator.attrgetter(node.target)(program.graph_module))
            new = graph.node_copy(node, lambda n: copied[n])
        else:
            new = graph.node_copy(node, lambda n: copied[n])
        copied[node] = new
    assert result is not None
    return PassResult(fx.GraphModule(root, graph), 1, declined)


def _region(node: fx.Node, owner: fx.GraphModule) -> tuple[fx.Graph, list[fx.Node]] | None:
    """Body and arguments of a node that runs a part of the forward with gradients switched or
    autocast off: its values are those of the body. None if there is more to it."""
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        _, held, *arguments = node.args
    elif node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2] is False:
        _, _, _, _, held, *arguments = node.args
    else:
        return None
    assert isinstance(held, fx.Node)
    body: fx.Graph = operator.attrgetter(str(held.target))(owner).graph
    plain = not any(n.op == "get_attr" or _mutates(n) for n in body.nodes)
    nodes = [argument for argument in arguments if isinstance(argument, fx.Node)]
    return (body, nodes) if plain and len(nodes) == len(arguments) else None


def _mutates(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target._schema.is_mutable
        and bool(node.op == "call_function")
    )
