"""Dense decode attention as ONNX models: the forms that an exporter would write for onnxruntime.

Each takes query [1, H, 1, D], key and value [1, Hkv, 1, D], the caches [1, Hkv, tokens, D] and the
`position` of the new token, writes it in place, and reads the whole cache, which it fills: nothing
has to be masked, which favours them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention_step import Shape

OPSETS = {"attention": 23, "attention, padded": 24}
OPSET = 20


def dense_model(name: str, shape: Shape, tokens: int) -> bytes:
    """The model of a form of FORMS, serialised."""
    from onnx import TensorProto, checker, helper

    heads, kv_heads, dim = shape.heads, shape.kv_heads, shape.dim
    sizes = {
        "query": [1, heads, 1, dim],
        "key": [1, kv_heads, 1, dim],
        "value": [1, kv_heads, 1, dim],
        "keys": [1, kv_heads, tokens, dim],
        "values": [1, kv_heads, tokens, dim],
    }
    values = {x: helper.make_tensor_value_info(x, TensorProto.FLOAT, s) for x, s in sizes.items()}
    values["position"] = helper.make_tensor_value_info("position", TensorProto.INT32, [1])
    results = {"out": [1, heads, 1, dim], "new_keys": sizes["keys"], "new_values": sizes["values"]}
    nodes, constants = FORMS[name](shape)
    graph = helper.make_graph(
        nodes,
        "step",
        list(values.values()),
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, s) for x, s in results.items()],
        initializer=[_constant(x, v) for x, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSETS.get(name, OPSET))]
    opsets.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    checker.check_model(model)
    written: bytes = model.SerializeToString()
    return written


def _constant(name: str, value: Any) -> Any:
    import numpy as np
    from onnx import numpy_helper

    kind = np.float32 if isinstance(value, float) else np.int64
    return numpy_helper.from_array(np.array(value, kind), name)


Form = tuple[list[Any], dict[str, Any]]


def _appended(shape: Shape) -> Form:
    """Key and value written to their caches by ScatterND, which a bound output runs in place."""
    from onnx import helper

    heads = range(shape.kv_heads)
    nodes = [
        helper.make_node("Cast", ["position"], ["at"], to=7),
        helper.make_node("Reshape", ["at", "one"], ["slot"]),
        helper.make_node("Expand", ["slot", "places"], ["slots"]),
        helper.make_node("Concat", ["before", "slots"], ["where"], axis=3),
    ]
    for new, cache in (("key", "keys"), ("value", "values")):
        nodes.append(helper.make_node("ScatterND", [cache, "where", new], [f"new_{cache}"]))
    constants = {
        "one": [1, 1, 1, 1],
        "places": [1, shape.kv_heads, 1, 1],
        "before": [[[[0, head]] for head in heads]],
    }
    return nodes, constants


def _folded(shape: Shape) -> Form:
    """Query heads of a group as rows of one product: keys and values are read once."""
    from onnx import helper

    nodes, constants = _appended(shape)
    nodes += [
        helper.make_node("Mul", ["query", "scale"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "folded"], ["rows"]),
        helper.make_node("Transpose", ["new_keys"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["rows", "turned"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "new_values"], ["read"]),
        helper.make_node("Reshape", ["read", "whole"], ["out"]),
    ]
    constants |= {
        "scale": float(shape.scale),
        "folded": [1, shape.kv_heads, shape.heads // shape.kv_heads, shape.dim],
        "whole": [1, shape.heads, 1, shape.dim],
    }
    return nodes, constants


def _grouped(shape: Shape) -> Form:
    """onnxruntime's own operator, past and present in the same memory."""
    from onnx import helper

    nodes = [
        helper.make_node("Reshape", [name, f"{name}_row"], [f"{name}_packed"])
        for name in ("query", "key", "value")
    ]
    nodes += [
        helper.make_node("Cast", ["position"], ["wide"], to=7),
        helper.make_node("Add", ["wide", "single"], ["length"]),
        helper.make_node("Cast", ["position"], ["last"], to=6),
        helper.make_node("Cast", ["length"], ["total"], to=6),
        helper.make_node(
            "GroupQueryAttention",
            ["query_packed", "key_packed", "value_packed", "keys", "values", "last", "total"],
            ["read", "new_keys", "new_values"],
            domain="com.microsoft",
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            scale=shape.scale,
        ),
        helper.make_node("Reshape", ["read", "whole"], ["out"]),
    ]
    constants: dict[str, Any] = {
        "query_row": [1, 1, shape.heads * shape.dim],
        "key_row": [1, 1, shape.kv_heads * shape.dim],
        "value_row": [1, 1, shape.kv_heads * shape.dim],
        "single": [1],
        "whole": [1, shape.heads, 1, shape.dim],
    }
    return nodes, constants


def _attention(shape: Shape) -> Form:
    """ai.onnx Attention 23 over the written cache."""
    from onnx import helper

    nodes, constants = _appended(shape)
    given = ["query", "new_keys", "new_values"]
    nodes.append(helper.make_node("Attention", given, ["out"], scale=shape.scale))
    return nodes, constants


def _padded(shape: Shape) -> Form:
    """ai.onnx Attention 24, told how much of the cache is valid, behind TensorScatter."""
    from onnx import helper

    nodes = [helper.make_node("Cast", ["position"], ["at"], to=7)]
    for new, cache in (("key", "keys"), ("value", "values")):
        nodes.append(helper.make_node("TensorScatter", [cache, new, "at"], [f"new_{cache}"]))
    nodes += [
        helper.make_node("Add", ["at", "single"], ["valid"]),
        helper.make_node(
            "Attention",
            ["query", "new_keys", "new_values", "", "", "", "valid"],
            ["out"],
            scale=shape.scale,
        ),
    ]
    return nodes, {"single": [1]}


FORMS: dict[str, Callable[[Shape], Form]] = {
    "folded": _folded,
    "grouped": _grouped,
    "attention": _attention,
    "attention, padded": _padded,
}
