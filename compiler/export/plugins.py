"""Memory nodes of an ONNX model as TensorRT plug-ins: which can be one, and what makes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...codegen.spec import KernelSpec, NotCovered
from ...codegen.triton.blocks import CLASSES
from ...codegen.triton.plugin import Operand, Plugin
from ...codegen.triton.record import fixed_size, tensor
from ...codegen.triton.sizes import Size

DOMAIN = "memcompile"
# What nodes call memory operations, and those of `models.portable` that they are.
OPERATIONS = {
    "MemcAttend": "attend",
    "MemcSummaries": "attend.summaries",
    "MemcScoreSelect": "score_select",
    "MemcScoreSelectLogits": "score_select.page_logits",
    "MemcScoreSelectAmong": "score_select.among",
    "MemcCombine": "combine",
}
_IN_PLACE = (
    "its kernel writes the state in place, and nothing says that TensorRT passes an ahead-of-time "
    "plug-in one address for an input and an output"
)
REFUSED = {
    "MemcAppendIndex": _IN_PLACE,
    "MemcFold": _IN_PLACE,
    "MemcState": _IN_PLACE,
    "MemcEntering": "it is a gather, and has no kernel",
}
# Where a size is read: a tensor of the node, and its axis.
_SIZES: dict[str, dict[str, tuple[str, int]]] = {
    "attend": {
        "batch": ("query", 0),
        "rows": ("query", 2),
        "kv_heads": ("keys", 1),
        "table_pages": ("keys", 2),
        "list_pages": ("pages", 3),
    },
    "score_select": {
        "batch": ("query", 0),
        "rows": ("query", 2),
        "kv_heads": ("index_0", 1),
        "table_pages": ("index_0", 2),
        "candidates": ("candidates", 3),
    },
    "combine": {"batch": ("outs_0", 0), "heads": ("outs_0", 1), "rows": ("outs_0", 2)},
}
# What the node calls an argument of the spec's operator.
_NAMES = {
    "attend": {"keys": "key_pages", "values": "value_pages"},
    "attend.summaries": {
        **{"keys": "key_pages", "values": "value_pages"},
        **{"value_mean": "page_values", "log_count": "page_bias"},
    },
}


@dataclass(frozen=True)
class Call:
    """A memory node, with what is fixed in it.

    Attributes:
        name: the node's operator, and its overload behind it.
        operator: the node's operator.
        tensors: dtype and shape of each input by its name, in order; extents that vary are text.
        static: the other arguments of the operation.
    """

    name: str
    operator: str
    tensors: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]]
    static: Mapping[str, Any]


@dataclass(frozen=True)
class SizeSource:
    """A size: an axis of an input, divided."""

    input: str
    axis: int
    divisor: int = 1


def plugin_of(call: Call, max_context: int | None = None) -> tuple[Plugin, dict[str, SizeSource]]:
    """What a node's plug-in is made from, and where its sizes that vary are read.

    Args:
        max_context: the longest context of its engine; more pages than it has are not ranked.

    Raises:
        NotCovered: it cannot be a plug-in; the text says why.
    """
    if call.operator not in OPERATIONS:
        raise NotCovered(REFUSED.get(call.operator, f"{call.operator} has no kernel"))
    operation = OPERATIONS[call.operator]
    if call.static.get("pinned", -1) != -1:
        raise NotCovered("its pages take turns, and no kernel knows where they lie")
    spec = _spec(operation, call)
    sources = _sources(operation, spec, call)
    known, varying = {}, {}
    for name, source in sources.items():
        extent = call.tensors[source.input][1][source.axis]
        if isinstance(extent, int):
            known[name] = extent // source.divisor
        else:
            varying[name] = source
    fixed = fixed_size(spec)
    if fixed and fixed not in known:
        raise NotCovered(f"the width of its lists, {fixed}, is not fixed")
    columns = _columns(spec, call, max_context)
    numbers = {name for kind, name in spec.arguments if kind in ("int", "float")}
    constants = {name: call.static[name] for name in numbers}
    plugin = Plugin(
        call.name,
        spec,
        tuple(_inputs(operation, spec, call)),
        tuple(_outputs(operation, spec)),
        constants,
        known,
        known.get(fixed),
        columns,
    )
    return plugin, varying


def _spec(operation: str, call: Call) -> KernelSpec:
    static = call.static
    if operation == "combine":
        dtype, shape = call.tensors["outs_0"]
        count = len(call.tensors) // 2
        return KernelSpec("combine", _dtype(dtype), value_dim=_fixed(shape[3]), count=count)
    dtype, query = call.tensors["query"]
    shared: dict[str, Any] = {"dtype": _dtype(dtype), "key_dim": _fixed(query[3])}
    if operation.startswith("attend"):
        heads, slots = _fixed(call.tensors["keys"][1][1]), static.get("slots", static["size"])
        pages = "all"
        if "pages" in call.tensors:
            pages = "unlisted" if static.get("exclude") else "listed"
        return KernelSpec(
            "attend",
            value_dim=_fixed(call.tensors["values"][1][3]),
            group=_fixed(query[1]) // heads,
            page_size=slots,
            span=static["size"] // slots,
            pages=pages,
            bias="bias" in call.tensors,
            softcap=bool(static["softcap"]),
            window=bool(static.get("window", 0)),
            summaries=operation == "attend.summaries",
            contiguous=True,
            **shared,
        )
    return KernelSpec(
        "score_select",
        group=_fixed(query[1]) // _fixed(call.tensors["index_0"][1][1]),
        page_size=static["size"],
        score=static["score"],
        page_logits=operation == "score_select.page_logits",
        among=operation == "score_select.among",
        contiguous=True,
        **shared,
    )


def _sources(operation: str, spec: KernelSpec, call: Call) -> dict[str, SizeSource]:
    found = {
        name: SizeSource(*place)
        for name, place in _SIZES[operation.partition(".")[0]].items()
        if place[0] in call.tensors
    }
    if spec.op == "attend":
        found["table_pages"] = replace(found["table_pages"], divisor=spec.page_size)
    return found


def _columns(spec: KernelSpec, call: Call, max_context: int | None) -> int | None:
    """Pages that a kernel must be able to rank."""
    if spec.op != "score_select":
        return None
    if spec.among:
        return _fixed(call.tensors["candidates"][1][3])
    most = max(CLASSES)
    wanted = most if max_context is None else -(-max_context // spec.page_size)
    if wanted > most:
        raise NotCovered(f"{wanted} pages take two launches to rank; one takes {most}")
    return wanted


def _inputs(operation: str, spec: KernelSpec, call: Call) -> list[Operand]:
    """The node's inputs, and what they stand for; those that the kernel does not read, too."""
    arguments = {name for kind, name in spec.arguments if kind.startswith("Tensor")}
    found = []
    for name, (dtype, shape) in call.tensors.items():
        argument = _NAMES.get(operation, {}).get(name, name)
        if listed := re.fullmatch(r"index_(\d+)", name):
            argument = f"index_{call.static['fields'][int(listed[1])]}"
        elif listed := re.fullmatch(r"(out|lse)s_(\d+)", name):
            argument = listed[1] + listed[2]
        stands_for = argument if argument in arguments else ""
        if stands_for:
            expected, _ = tensor(spec, argument)
            lists = argument in ("pages", "candidates") and dtype == torch.int64
            if dtype != expected and not lists:
                raise NotCovered(f"its {name} is {dtype}; the kernel reads {expected}")
            arguments.remove(argument)
        found.append(Operand(name, stands_for, dtype, tuple(map(_extent, shape))))
    if arguments:
        raise NotCovered(f"it lacks {', '.join(sorted(arguments))}, which the kernel reads")
    return found


def _outputs(operation: str, spec: KernelSpec) -> list[Operand]:
    batch, rows = Size("name", "batch"), Size("name", "rows")
    heads, kv = Size("name", "heads"), Size("name", "kv_heads")
    each = (batch, heads if spec.op == "combine" else kv * spec.group, rows)
    shapes: dict[str, tuple[Size | int, ...]] = {
        "out": (*each, spec.value_dim),
        "lse": each,
        "page_logits": (*each, Size("name", "table_pages")),
        "pages": (batch, kv, rows, Size("name", "budget_pages" if spec.among else "capacity")),
    }
    return [
        Operand(name, name, torch.int64 if name == "pages" else torch.float32, shapes[name])
        for name in spec.returns
    ]


def _extent(extent: int | str) -> Size | int:
    return extent if isinstance(extent, int) else Size("name", re.sub(r"\W+", "_", extent))


def _fixed(extent: int | str) -> int:
    if not isinstance(extent, int):
        raise NotCovered(f"a size that kernels are compiled for varies: {extent}")
    return extent


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def calls_of(model: Any) -> list[Call]:
    """The memory nodes of an ONNX model, calls alike once.

    Args:
        model: `onnx.ModelProto`; its weights need not be loaded.

    Raises:
        ValueError: the type or shape of a node's input is not known.
    """
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {
        value.name: (value.type.tensor_type.elem_type, _shape(value.type.tensor_type.shape))
        for value in (*graph.input, *graph.output, *graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }
    types |= {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}
    found: dict[str, Call] = {}
    for node in graph.node:
        if node.domain != DOMAIN:
            continue
        static = {a.name: _value(onnx.helper.get_attribute_value(a)) for a in node.attribute}
        tensors = {}
        for name, value in zip(static.pop("inputs"), node.input, strict=True):
            if value not in types:
                raise ValueError(f"{node.op_type}: the shape of its input {name} is not known")
            number, shape = types[value]
            numpy = onnx.helper.tensor_dtype_to_np_dtype(number)
            tensors[name] = (_TORCH.get(str(numpy), torch.float64), shape)
        name = node.op_type + getattr(node, "overload", "")
        found.setdefault(name, Call(name, node.op_type, tensors, static))
    return [*found.values()]


_TORCH = {
    **{"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16},
    **{"int32": torch.int32, "int64": torch.int64, "bool": torch.bool},
}


def _shape(shape: Any) -> tuple[int | str, ...]:
    return tuple(
        d.dim_value if d.HasField("dim_value") else (d.dim_param or f"d{at}")
        for at, d in enumerate(shape.dim)
    )


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_value(part) for part in value]
    return value


def spread_overloads(model: Any) -> None:
    """Gives each overload of a memory node a name of its own, in place: TensorRT's parser finds
    plug-ins and functions by the name alone."""
    for node in model.graph.node:
        if node.domain == DOMAIN and node.overload:
            node.op_type, node.overload = node.op_type + node.overload, ""
    for function in model.functions:
        if function.domain == DOMAIN and function.overload:
            function.name, function.overload = function.name + function.overload, ""
