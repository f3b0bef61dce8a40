"""A program from a file says which shape and type each of its values has: hold it to that.

Every pass believes what the graph says of its values. torch writes it down beside the operations
and reads it back unchecked, so a damaged file may say anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from ..passes.graph_tools import describe, extent

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def check_claims(program: ExportedProgram) -> None:
    """Runs every operation on fake tensors and compares what comes out with what the file says.

    Raises:
        ValueError: an operation cannot be run on what it is given, or gives something else.
    """
    for name, weight, claimed in _weights(program):
        if weight is None:
            raise ValueError(
                f"damaged: its graph takes the weight {name!r}, which it does not hold"
            )
        if not _same(weight, claimed):
            raise ValueError(
                f"damaged: the weight {name!r} is {_shown(weight)}, and its graph takes it for "
                f"{_shown(claimed)}"
            )
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            _check_graph(module.graph)


def _weights(program: ExportedProgram) -> Iterator[tuple[str, Any, Any]]:
    claimed = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.kind in _WEIGHTS and spec.target is not None:
            held = program.state_dict.get(spec.target, program.constants.get(spec.target))
            yield spec.target, held, claimed.get(str(getattr(spec.arg, "name", "")))


def _check_graph(graph: fx.Graph) -> None:
    mode = detect_fake_mode([n.meta.get("val") for n in graph.nodes])
    for node in graph.nodes:
        # Subgraphs are walked by themselves; arithmetic on sizes is checked where it is used.
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if any("val" not in source.meta for source in node.all_input_nodes):
            raise ValueError(f"damaged: nothing is said of an input of {describe(node)}")
        _check_arguments(node)
        arguments, named = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            if mode is None:
                made = node.target(*arguments, **named)
            else:
                with mode:
                    made = node.target(*arguments, **named)
        except Exception as error:  # operators raise many types; each means "not runnable"
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"damaged: {describe(node)} cannot be run: {reason}") from error
        claimed = node.meta.get("val")
        if not _same(made, claimed):
            raise ValueError(
                f"damaged: {describe(node)} gives {_shown(made)}, and the file says "
                f"{_shown(claimed)}"
            )


def _check_arguments(node: fx.Node) -> None:
    """torch takes a number for the tensor that an operation is on, and the passes do not."""
    schemas = node.target._schema.arguments  # type: ignore[union-attr]
    first = node.args[0] if node.args else None
    value = first.meta["val"] if isinstance(first, fx.Node) else first
    if schemas and node.args and isinstance(schemas[0].type, torch.TensorType):
        if isinstance(value, Tensor):
            return
        raise ValueError(
            f"damaged: {describe(node)} is given {ascii(first)[:40]} as its {schemas[0].name}, "
            "where a tensor belongs"
        )


def _same(made: Any, claimed: Any) -> bool:
    if isinstance(made, list | tuple):
        return (
            isinstance(claimed, list | tuple)
            and len(made) == len(claimed)
            and all(map(_same, made, claimed))
        )
    if not isinstance(made, Tensor):
        # Sizes are symbols of their own where the data decides them.
        return made is None or isinstance(claimed, Tensor) is False
    return (
        isinstance(claimed, Tensor)
        and made.dtype == claimed.dtype
        and made.dim() == claimed.dim()
        and all(map(_same_size, made.shape, claimed.shape))
    )


def _same_size(made: Any, claimed: Any) -> bool:
    """Whether two sizes are one number, however they are spelled; adds no guard."""
    one, other = extent(made), extent(claimed)
    if one == other:
        return True
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if any(str(symbol).startswith("u") for symbol in symbols):
        return True
    for start in (5, 64):
        at = {symbol: start + 2 * i for i, symbol in enumerate(symbols)}
        if one.subs(at) != other.subs(at):
            return False
    return bool(symbols)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{[str(size) for size in value.shape]} {value.dtype}".replace("'", "")
    return f"a {type(value).__name__}"
