"""What an exported program must look like to be compiled: tokens in, logits out, both axes free."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

_EXPORT = (
    "export the model again with torch.export.export(model, (input_ids, position_ids), "
    "dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},) * 2, strict=False)"
)
_CACHE = re.compile(r"past|cache|key_value|(^|_)kv(_|$)")
# A captured graph has the whole ones. The default decompositions leave none of them and put the
# shredded ones instead, in which an attention can no longer be told from other arithmetic.
_WHOLE = {"linear", "matmul", "einsum", "softmax", "scaled_dot_product_attention"}
_SHREDDED = {"addmm", "mm", "bmm", "baddbmm", "_softmax", "_safe_softmax", "native_layer_norm"}


def check_program(program: ExportedProgram) -> None:
    """Refuses a program from which no step with a memory can be derived.

    Expected are inputs ``input_ids[B, T]`` and, optionally, ``position_ids[B, T]`` of an integer
    type, B and T symbolic, logits ``[B, T, V]`` as the first output, and a graph as captured, not
    decomposed.

    Raises:
        ValueError: something else was found; the message names it and how to export instead.
    """
    inputs = _inputs(program)
    if not inputs:
        raise ValueError(
            f"the exported program takes no tensor; expected input_ids[B, T]; {_EXPORT}"
        )
    _refuse_caches(program, inputs)
    names = list(inputs)
    tokens = names[0]
    for name, value in inputs.items():
        if value.is_floating_point() or value.dim() != 2:
            raise ValueError(
                f"the exported program takes {name}{_shape(value)} {value.dtype}; expected only "
                f"input_ids[B, T] and position_ids[B, T] of integers; {_EXPORT}"
            )
        for axis, meaning in enumerate(("batch", "token")):
            size = value.shape[axis]
            if isinstance(size, int):
                raise ValueError(
                    f"the {meaning} axis of the exported program is static: {name}{_shape(value)} "
                    f"fixes it to {size}; {_EXPORT}"
                )
            if not re.fullmatch(r"\w+", str(size)):
                raise ValueError(
                    f"the {meaning} axis of the exported program is not free: "
                    f"{name}{_shape(value)}; {_EXPORT}"
                )
    for name in names[1:]:
        if len(names) > 2 or "pos" not in name:
            raise ValueError(
                f"the exported program takes {', '.join(names)}; expected input_ids and, "
                "optionally, position_ids (masks are derived, padding is given by lengths); "
                f"{_EXPORT}"
            )
    batch, length = inputs[tokens].shape
    for name in names[1:]:
        if [str(x) for x in inputs[name].shape] != [str(batch), str(length)]:
            raise ValueError(
                f"{name}{_shape(inputs[name])} has another shape than {tokens}"
                f"{_shape(inputs[tokens])}; both are [B, T]; {_EXPORT}"
            )
    if str(batch) == str(length):
        raise ValueError(
            f"batch and token axis of the exported program are the same symbol: {tokens}"
            f"{_shape(inputs[tokens])}; export from an example with two different sizes"
        )
    _check_bounds(program, {"batch": batch, "token": length})
    _check_output(program)
    _check_captured(program)


def _inputs(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The tensors a caller passes, in order: name -> fake tensor. Constants are bound already."""
    user = {name for name in program.graph_signature.user_inputs if isinstance(name, str)}
    found = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in user:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                found[node.name] = value
            elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
                raise ValueError(
                    f"the exported program takes the number {node.name}; bind it before the export"
                )
    return found


def _refuse_caches(program: ExportedProgram, inputs: dict[str, torch.Tensor]) -> None:
    mend = (
        "export the forward without a cache (use_cache=False): memcompile derives the memory itself"
    )
    for name, value in inputs.items():
        if _CACHE.search(name.lower()) or (value.is_floating_point() and value.dim() >= 4):
            raise ValueError(
                f"the signature of the exported program takes a cache: {name}{_shape(value)}; "
                f"{mend}"
            )
    if mutated := _written(program):
        raise ValueError(
            f"the exported program keeps a state of its own: it writes {', '.join(mutated[:3])}; "
            f"{mend}"
        )
    for value in _outputs(program)[1:]:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 4:
            raise ValueError(f"the exported program returns a cache{_shape(value)}; {mend}")


def _written(program: ExportedProgram) -> list[str]:
    """Buffers and inputs that the forward changes: named by the signature of a functional graph,
    written in place by the operators of one as captured."""
    signature = program.graph_signature
    found = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.is_write and isinstance(value, torch.fx.Node):
                origin = _origin(value)
                if origin.op == "placeholder":
                    found.append(names.get(origin.name, origin.name))
    return found


def _origin(node: torch.fx.Node) -> torch.fx.Node:
    """The node whose memory `node` is a view of."""
    while isinstance(node.target, torch._ops.OpOverload):
        returned = node.target._schema.returns
        source = node.args[0] if node.args else None
        if not returned or returned[0].alias_info is None or not isinstance(source, torch.fx.Node):
            break
        node = source
    return node


def _check_bounds(program: ExportedProgram, axes: dict[str, Any]) -> None:
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    for meaning, size in axes.items():
        bounds = ranges.get(str(size))
        # 2 stands for 1 as well: export never traces a size of 0 or 1 as a symbol.
        if bounds is not None and bool(bounds.lower > 2):
            raise ValueError(
                f"the exported program holds for a {meaning} axis of at least {bounds.lower} "
                f"only, and a step takes one token; {_EXPORT}"
            )
    for guard in getattr(program, "_guards_code", []):
        if "%" in guard or "//" in guard:
            raise ValueError(
                f"the exported program holds only where {guard}: its token axis is not free; "
                f"{_EXPORT}"
            )


def _check_output(program: ExportedProgram) -> None:
    outputs = _outputs(program)
    logits = outputs[0] if outputs else None
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        found = f"a tensor {_shape(logits)}" if isinstance(logits, torch.Tensor) else repr(logits)
        raise ValueError(
            f"the first output of the exported program is {found}; expected logits [B, T, V] of "
            "every token; return them first from the forward"
        )


def _outputs(program: ExportedProgram) -> list[Any]:
    user = program.graph_signature.user_outputs
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    nodes: Sequence[Any] = output.args[0]
    by_name = {node.name: node.meta.get("val") for node in nodes if isinstance(node, torch.fx.Node)}
    return [by_name.get(name, name) if isinstance(name, str) else name for name in user]


def _check_captured(program: ExportedProgram) -> None:
    names = set()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload):
                    names.add(node.target._schema.name.removeprefix("aten::"))
    shredded = {
        name for name in names if name in _SHREDDED or name.startswith("_scaled_dot_product")
    }
    if shredded and not names & _WHOLE:
        raise ValueError(
            "the exported program is decomposed into core ATen operators "
            f"({', '.join(sorted(shredded))}): attention cannot be told from other arithmetic any "
            "more; save what torch.export.export returns, without run_decompositions()"
        )


def _shape(value: torch.Tensor) -> str:
    return "[" + ", ".join(str(size) for size in value.shape) + "]"
