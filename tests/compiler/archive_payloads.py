"""Export archives with a payload planted in each place that torch executes or could execute."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

Entries = dict[str, bytes]

PROGRAM = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Decoder(nn.Module):
    """One attention layer, tied embeddings, a position table that is no parameter."""

    def __init__(self, vocabulary: int = 11, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.scale = scale
        self.register_buffer("table", torch.randn(64, width), persistent=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + nn.functional.embedding(position_ids, self.table)
        q, k, v = (y.unsqueeze(1) for y in self.mix(x).chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.scale * out.squeeze(1))


def exported(model: nn.Module | None = None, batch: int = 3, tokens: int = 7) -> ExportedProgram:
    # Two tensors: export takes one that is passed twice for one input.
    inputs = tuple(torch.zeros(batch, tokens, dtype=torch.int64) for _ in range(2))
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    return torch.export.export(
        (model or Decoder()).eval(), inputs, dynamic_shapes=(free, free), strict=False
    )


def saved(program: ExportedProgram) -> Entries:
    """The entries of the archive that torch.export.save writes, without its root folder."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_entries(entries: Entries, path: Path, root: str = "model") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(f"{root}/{name}", data)
    return path


class Touch:
    """Unpickling this makes the file at `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def code(marker: Path) -> str:
    """A Python expression that makes `marker` and is worth 1."""
    os_module, path = "__import__('os')", repr(str(marker))
    return f"({os_module}.path.isdir({path}) or {os_module}.mkdir({path}) or 1)"


@dataclass(frozen=True)
class Plant:
    """One place.

    Attributes:
        name: what is planted where.
        plant: changes the entries of a clean archive in place, given the marker's path.
        names: words that the refusal must hold; empty when the entry is dropped instead of refused.
        fires: when torch itself executes it: on "load", on "run" (running `program.module()`), or
            "" where this version happens not to, or where it takes a library to show it.
    """

    name: str
    plant: Callable[[Entries, Path], None]
    names: tuple[str, ...]
    fires: str = "load"


def edit(entries: Entries, name: str, change: Callable[[Any], None]) -> None:
    data = json.loads(entries[name])
    change(data)
    entries[name] = json.dumps(data).encode()


def in_graph(change: Callable[[Any, Path], None]) -> Callable[[Entries, Path], None]:
    """Plants in the serialised graph module."""

    def plant(entries: Entries, marker: Path) -> None:
        edit(entries, PROGRAM, lambda data: change(data["graph_module"], marker))

    return plant


def rename(old: str, new: str, data: Any) -> Any:
    """`data` with every text `old` replaced, as value and as key."""
    if isinstance(data, dict):
        return {(new if k == old else k): rename(old, new, v) for k, v in data.items()}
    if isinstance(data, list):
        return [rename(old, new, x) for x in data]
    return new if data == old else data


def torch_pickle(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Touch(marker)}, buffer)
    return buffer.getvalue()


def sample_inputs(entries: Entries, marker: Path) -> None:
    entries[SAMPLES] = torch_pickle(marker)


def weight_pickle(entries: Entries, marker: Path) -> None:
    def change(data: Any) -> None:
        entry = data["config"]["mix.weight"]
        entry["use_pickle"] = True
        entries[f"data/weights/{entry['path_name']}"] = torch_pickle(marker)

    edit(entries, WEIGHTS, change)


def constant_pickle(entries: Entries, marker: Path) -> None:
    def change(data: Any) -> None:
        entry = data["config"]["table"]
        entry["use_pickle"] = True
        entries[f"data/constants/{entry['path_name']}"] = torch_pickle(marker)

    edit(entries, CONSTANTS, change)


def legacy(folder: str) -> Callable[[Entries, Path], None]:
    def plant(entries: Entries, marker: Path) -> None:
        entries[f"data/{folder}/model.pt"] = torch_pickle(marker)

    return plant


def constant_object(file: str, data: Callable[[Path], bytes]) -> Callable[[Entries, Path], None]:
    """An object in place of the constant `table`."""

    def plant(entries: Entries, marker: Path) -> None:
        def change(config: Any) -> None:
            config["config"]["table"] = {
                "path_name": file,
                "is_param": False,
                "use_pickle": True,
                "tensor_meta": None,
            }

        edit(entries, CONSTANTS, change)
        entries[f"data/constants/{file}"] = data(marker)

    return plant


def constant_without_flag(entries: Entries, marker: Path) -> None:
    """An object that poses as a tensor: torch goes by the name of the entry."""
    constant_object("opaque_obj_0", lambda m: pickle.dumps(Touch(m)))(entries, marker)
    size = len(entries["data/constants/opaque_obj_0"])
    meta = {
        "dtype": 1,
        "sizes": [{"as_int": size}],
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": 1}],
        "storage_offset": {"as_int": 0},
        "layout": 7,
    }
    flags = {"use_pickle": False, "tensor_meta": meta}
    edit(entries, CONSTANTS, lambda data: data["config"]["table"].update(flags))


def library(name: str) -> Callable[[Entries, Path], None]:
    def plant(entries: Entries, marker: Path) -> None:
        entries[name] = b"\x7fELF" + bytes(64)

    return plant


def second_program(entries: Entries, marker: Path) -> None:
    for name in (PROGRAM, WEIGHTS, CONSTANTS):
        entries[name.replace("/model", "/other")] = entries[name]
    entries["data/sample_inputs/other.pt"] = torch_pickle(marker)


def node(graph: Any, name: str = "aten.linear") -> Any:
    return next(n for n in graph["graph"]["nodes"] if name in n["target"])


def insert_call(target: str, *arguments: dict[str, Any]) -> Callable[[Any, Path], None]:
    """A node at the head of the graph that calls `target` with texts."""

    def change(graph: Any, marker: Path) -> None:
        inputs = [
            {"name": "", "arg": json.loads(json.dumps(a).replace("MARKER", str(marker))), "kind": 1}
            for a in arguments
        ]
        call = {"target": target, "inputs": inputs, "outputs": [{"as_none": True}], "name": "call"}
        graph["graph"]["nodes"].insert(0, call | {"metadata": {}})

    return change


def shape_expression(graph: Any, marker: Path) -> None:
    value = next(iter(graph["graph"]["tensor_values"].values()))
    value["sizes"][0] = {"as_expr": {"expr_str": code(marker), "hint": None}}


def shape_expression_by_attribute(graph: Any, marker: Path) -> None:
    module = "FloorDiv.eval.__func__.__globals__['functools'].__builtins__['__import__']('os')"
    text = f"{module}.mkdir({str(marker)!r}) or 1"
    value = next(iter(graph["graph"]["tensor_values"].values()))
    value["sizes"][0] = {"as_expr": {"expr_str": text, "hint": None}}


def range_symbol(entries: Entries, marker: Path) -> None:
    """Not evaluated today; a symbol's name is no place for code all the same."""
    edit(entries, PROGRAM, lambda d: d["range_constraints"].update({code(marker): {"min_val": 0}}))


def guard_code(entries: Entries, marker: Path) -> None:
    edit(entries, PROGRAM, lambda d: d["guards_code"].append(f"{code(marker)} == 1"))


def tree(of: str, kind: str, context: Callable[[Path], Any]) -> Callable[[Any, Path], None]:
    """A tree context that imports a module and takes a function from it."""

    def change(graph: Any, marker: Path) -> None:
        (marker.parent / "planted_module.py").write_text(f"{code(marker)}\ndef f(): pass\n")
        signature = graph["module_call_graph"][0]["signature"]
        protocol, spec = json.loads(signature[of])
        spec = {"type": kind, "context": context(marker), "children_spec": spec["children_spec"]}
        signature[of] = json.dumps([protocol, spec])

    return change


def keyword_names(graph: Any, marker: Path) -> None:
    """The names of keyword inputs become a line of the generated forward."""
    signature = graph["module_call_graph"][0]["signature"]
    leaf = {"type": None, "context": None, "children_spec": []}
    key = f"x': {code(marker)}, 'y"
    spec = {
        "type": "builtins.tuple",
        "context": "null",
        "children_spec": [
            {"type": "builtins.tuple", "context": "null", "children_spec": [leaf]},
            {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]},
        ],
    }
    signature["in_spec"] = json.dumps([1, spec])


def argument_names(graph: Any, marker: Path) -> None:
    signature = graph["module_call_graph"][0]["signature"]
    signature["forward_arg_names"][1] = f"x={code(marker)}"
    empty = {"type": "builtins.tuple", "context": "null", "children_spec": []}
    nothing = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    spec = {"type": "builtins.tuple", "context": "null", "children_spec": [empty, nothing]}
    signature["in_spec"] = json.dumps([1, spec])


def node_name(graph: Any, marker: Path) -> None:
    name = node(graph)["outputs"][0]["as_tensor"]["name"]
    new = f"x = {code(marker)}; y"
    node(graph)["name"] = None
    for part in ("graph", "signature"):
        graph[part] = rename(name, new, graph[part])


def placeholder_name(graph: Any, marker: Path) -> None:
    name = graph["graph"]["inputs"][-1]["as_tensor"]["name"]
    for part in ("graph", "signature"):
        graph[part] = rename(name, f"{name}={code(marker)}", graph[part])


def weight_name(entries: Entries, marker: Path) -> None:
    call = f"getattr(__import__('os'), 'mkdir')({str(marker)!r})"  # a dot would split the path
    new = f'mix"), {call}, getattr(self, "mix.weight'
    for name in (PROGRAM, WEIGHTS):
        entries[name] = json.dumps(rename("mix.weight", new, json.loads(entries[name]))).encode()


def keyword_argument(graph: Any, marker: Path) -> None:
    """Keyword names of a call become source text as well."""
    graph["graph"]["nodes"].insert(
        0,
        {
            "target": "torch.ops.higher_order.cond",
            "inputs": [{"name": f"x={code(marker)}, y", "arg": {"as_int": 1}, "kind": 2}],
            "outputs": [{"as_none": True}],
            "metadata": {},
            "name": "call",
        },
    )


def script_input(graph: Any, marker: Path) -> None:
    graph["graph"]["custom_obj_values"] = {"obj": {"name": "obj", "class_fqn": "a.B"}}


def unknown_field(graph: Any, marker: Path) -> None:
    node(graph)["on_load"] = code(marker)


TEXT = {"as_string": "MARKER"}

PLANTS = (
    Plant("sample inputs", sample_inputs, ()),
    Plant("weight with use_pickle", weight_pickle, ("mix.weight", "pickle")),
    Plant("constant with use_pickle", constant_pickle, ("table", "pickle")),
    Plant("legacy pickled weights", legacy("weights"), ("data/weights/model.pt", "pickle")),
    Plant("legacy pickled constants", legacy("constants"), ("data/constants/model.pt", "pickle")),
    Plant(
        "opaque object",
        constant_object("opaque_obj_0", lambda m: pickle.dumps(Touch(m))),
        ("opaque_obj_0", "opaque object"),
    ),
    Plant(
        "script object",
        constant_object("custom_obj_0", lambda m: b"PK"),
        ("custom_obj_0", "script object"),
        fires="",
    ),
    Plant("object without the pickle flag", constant_without_flag, ("opaque_obj_0",)),
    Plant("script object as input", in_graph(script_input), ("custom_obj",), fires=""),
    Plant(
        "shared library",
        library("data/aotinductor/model/planted.so"),
        ("planted.so", "compiled code"),
        fires="",
    ),
    Plant(
        "AOTInductor source",
        library("data/aotinductor/model/planted.wrapper.cpp"),
        ("planted.wrapper.cpp", "compiled code"),
        fires="",
    ),
    Plant("GPU binary", library("data/extra/k.cubin"), ("k.cubin", "compiled code"), fires=""),
    Plant("library elsewhere", library("data/extra/x.so.1"), ("x.so.1", "compiled code"), fires=""),
    Plant("second program", second_program, ("models/other.json",)),
    Plant(
        "node that calls os.mkdir",
        in_graph(insert_call("torch.os.mkdir", TEXT)),
        ("torch.os.mkdir", "Python function"),
        fires="",
    ),
    Plant(
        "node that calls os.system",
        in_graph(insert_call("torch.os.system", {"as_string": "mkdir 'MARKER'"})),
        ("torch.os.system",),
        fires="",
    ),
    Plant(
        "node that calls builtins.eval",
        in_graph(insert_call("torch.os.__builtins__.get", {"as_string": "eval"})),
        ("torch.os.__builtins__.get",),
        fires="",
    ),
    Plant(
        "node that calls operator.methodcaller",
        in_graph(insert_call("_operator.methodcaller", TEXT)),
        ("_operator.methodcaller",),
        fires="",
    ),
    Plant(
        "node that calls torch.load",
        in_graph(insert_call("torch.load", TEXT)),
        ("torch.load",),
        fires="",
    ),
    Plant(
        "operator that maps a file",
        in_graph(insert_call("torch.ops.aten.from_file.default", TEXT)),
        ("aten.from_file",),
        fires="",
    ),
    Plant(
        "operator of a foreign library",
        in_graph(insert_call("torch.ops.planted.run.default", TEXT)),
        ("torch.ops.planted.run", "aten"),
        fires="",
    ),
    Plant(
        "registered extension operator",
        in_graph(insert_call("#planted:run", TEXT)),
        ("#planted:run",),
        fires="",
    ),
    Plant(
        "higher-order operator that calls an object",
        in_graph(insert_call("torch.ops.higher_order.call_torchbind", TEXT)),
        ("call_torchbind",),
        fires="",
    ),
    Plant(
        "function as an argument",
        in_graph(insert_call("torch.ops.higher_order.cond", {"as_operator": "torch.os.mkdir"})),
        ("torch.os.mkdir",),
        fires="",
    ),
    Plant("shape expression", in_graph(shape_expression), ("shape expression", "sympy")),
    Plant(
        "shape expression by attribute",
        in_graph(shape_expression_by_attribute),
        ("shape expression", "sympy"),
    ),
    Plant("name of a ranged symbol", range_symbol, ("range_constraints",), fires=""),
    Plant("guard", guard_code, ("guard", "executed"), fires="run"),
    Plant(
        "factory of a default dict",
        in_graph(
            tree(
                "in_spec",
                "collections.defaultdict",
                lambda m: {
                    "default_factory_module": "planted_module",
                    "default_factory_name": "f",
                    "dict_context": [],
                },
            )
        ),
        ("collections.defaultdict",),
    ),
    Plant(
        "enum in a tree context",
        in_graph(
            tree(
                "out_spec",
                "builtins.dict",
                lambda m: json.dumps([{"__enum__": True, "fqn": "planted_module:f", "name": "x"}]),
            )
        ),
        ("not an identifier",),
    ),
    Plant(
        "registered class in a tree",
        in_graph(tree("out_spec", "planted.Class", lambda m: "null")),
        ("planted.Class",),
        fires="",
    ),
    Plant("keyword names", in_graph(keyword_names), ("not an identifier",), fires="run"),
    Plant("argument names", in_graph(argument_names), ("not an identifier",), fires="run"),
    Plant("node name", in_graph(node_name), ("not an identifier",), fires=""),
    Plant("placeholder name", in_graph(placeholder_name), ("not an identifier",)),
    Plant("weight name", weight_name, ("not dotted names",), fires="run"),
    Plant("keyword of a call", in_graph(keyword_argument), ("not an identifier",), fires="run"),
    Plant("unknown field", in_graph(unknown_field), ("on_load",), fires=""),
)
