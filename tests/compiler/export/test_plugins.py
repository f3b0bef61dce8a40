"""TensorRT's ahead-of-time plug-ins: which nodes can be one, the ABI of their PTX, the module."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_tensorrt import DTYPES, Registered, ShapeExpr, TensorDesc, installed, value_of

from memcompile.codegen.spec import KernelSpec, NotCovered
from memcompile.codegen.triton import ptx
from memcompile.codegen.triton.plugin import plugin_kernels
from memcompile.compiler.export.plugin_folder import write_plugins
from memcompile.compiler.export.plugins import REFUSED, Call, calls_of, plugin_of, spread_overloads

onnx = pytest.importorskip("onnx")
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
TARGETS = ("cuda:sm_80", "cuda:sm_90")
KV, GROUP, DIM, SIZE = 2, 4, 64, 16
BATCH, ROWS, COLUMNS = 3, 5, 7  # of the engine's call
ROW = ("batch", KV * GROUP, "n")
FLOAT, HALF, INT, LONG = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
)
TENSORS: dict[str, tuple[int, tuple[int | str, ...]]] = {
    "query": (HALF, (*ROW, DIM)),
    "keys": (HALF, ("batch", KV, "capacity", DIM)),
    "values": (HALF, ("batch", KV, "capacity", DIM)),
    "pages": (LONG, ("batch", KV, "n", 11)),
    "page_logits": (FLOAT, (*ROW, "capacity/16")),
    "value_mean": (HALF, ("batch", KV, "capacity/16", DIM)),
    "log_count": (FLOAT, ("batch", KV, "capacity/16", 1)),
    "index_0": (HALF, ("batch", KV, "capacity/16", DIM)),
    "index_1": (HALF, ("batch", KV, "capacity/16", DIM)),
    "index_2": (FLOAT, ("batch", KV, "capacity/16", 1)),
    "position": (INT, ("batch",)),
    "lengths": (INT, ("batch",)),
    "outs_0": (FLOAT, (*ROW, DIM)),
    "outs_1": (FLOAT, (*ROW, DIM)),
    "lses_0": (FLOAT, ROW),
    "lses_1": (FLOAT, ROW),
    "key": (HALF, ("batch", KV, "n", DIM)),
}
AT = ("position", "lengths")
READ = {"exclude": 0, "scale": 0.125, "softcap": 0.0, "window": 0, "size": SIZE, "slots": SIZE}
FIELDS = {"fields": ["mean", "std", "log_count"], "score": "mean-std", "size": SIZE}
CHOICE = {**FIELDS, "sink_pages": 1, "window_pages": 2, "capacity": 11, "budget_pages": 10}


@dataclass(frozen=True)
class Node:
    """A node as the exporter writes it: operator, overload, inputs by name, static arguments."""

    operator: str
    overload: str
    inputs: tuple[str, ...]
    outputs: int
    static: dict[str, Any]


NODES = (
    Node("MemcAttend", "", ("query", "keys", "values", *AT), 2, {**READ, "pinned": -1}),
    Node("MemcAttend", "2", ("query", "keys", "values", "pages", *AT), 2, {**READ, "pinned": -1}),
    Node("MemcAttend", "3", ("query", "keys", "values", *AT), 2, {**READ, "pinned": 1}),
    Node(
        "MemcSummaries",
        "",
        (*("query", "keys", "values", "pages", "page_logits", "value_mean", "log_count"), *AT),
        2,
        {"scale": 0.125, "softcap": 0.0, "size": SIZE},
    ),
    Node(
        "MemcScoreSelectLogits",
        "",
        ("query", "index_0", "index_1", "index_2", *AT),
        2,
        {**CHOICE, "dense_below": 0},
    ),
    Node("MemcCombine", "", ("outs_0", "outs_1", "lses_0", "lses_1"), 2, {}),
    Node("MemcAppendIndex", "", ("key", "keys", *AT), 1, {"size": SIZE, "pinned": -1}),
)
MADE = ["MemcAttend", "MemcAttend2", "MemcSummaries", "MemcScoreSelectLogits", "MemcCombine"]


def model() -> Any:
    """A model of these nodes, each with a body, as the exporter attaches it."""
    helper = onnx.helper
    given = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in TENSORS.items()]
    nodes, results, bodies = [], [], []
    for at, node in enumerate(NODES):
        static = {**node.static, "inputs": [*node.inputs], "plugin_namespace": "memcompile"}
        outputs = [f"r{at}_{i}" for i in range(node.outputs)]
        made = helper.make_node(node.operator, [*node.inputs], outputs, domain="memcompile")
        made.attribute.extend(helper.make_attribute(key, value) for key, value in static.items())
        made.overload = node.overload
        nodes.append(made)
        results += [helper.make_tensor_value_info(name, FLOAT, ROW) for name in outputs]
        body = [helper.make_node("Identity", [node.inputs[0]], [name]) for name in outputs]
        bodies.append(
            helper.make_function(
                *("memcompile", node.operator, [*node.inputs], outputs, body),
                opset_imports=[helper.make_opsetid("", 20)],
                attributes=[*static],
                overload=node.overload,
            )
        )
    graph = helper.make_graph(nodes, "step", given, results)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("memcompile", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path) -> Path:
    place = tmp_path_factory.mktemp("plugins")
    onnx.save(model(), place / "model.nodes.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMCOMPILE_CACHE", str(kernel_cache))
        done = write_plugins(place, [place / "model.nodes.onnx"], TARGETS, max_context=4000)
    assert done.made == MADE and sorted(done.left) == ["MemcAppendIndex", "MemcAttend3"]
    return place


def index(folder: Path) -> dict[str, Any]:
    told = json.loads((folder / "plugins.json").read_text())
    return {entry["name"]: entry for entry in told["made"]}


# --- the ABI ---


@pytest.mark.parametrize("name", MADE)
def test_the_ptx_takes_what_tensorrt_passes(folder: Path, name: str) -> None:
    """Pointers of the inputs, 32-bit numbers, pointers of the outputs; nothing else, and it is code
    that ptxas takes."""
    entry = index(folder)[name]
    node = next(n for n in NODES if n.operator + n.overload == name)
    assert [given for given, _ in entry["inputs"]] == [*node.inputs]
    kinds = ["pointer"] * len(node.inputs) + ["i32"] * len(entry["extras"])
    kinds += ["pointer"] * node.outputs
    for target in TARGETS:
        for kernel in entry["kernels"][target]:
            text = (folder / kernel["file"]).read_text()
            found = ptx.entry(text)
            assert found.name == name
            assert [parameter.kind for parameter in found.parameters] == kinds
            for hidden in (len(kinds), len(kinds) + 1):
                assert f"_param_{hidden}" not in text
            arch = target.removeprefix("cuda:")
            assert found.target in (arch, f"{arch}a") and found.version
            assert kernel["written_for"] == f"{found.target}, PTX {found.version}"
            assert kernel["shared"] <= 48 << 10
            assert ptx.assemble(text)[:4] == b"\x7fELF"


@pytest.mark.long
def test_every_family_of_gpus_has_them(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "model.nodes.onnx")
    families = ["cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "hip:gfx942"]
    assert write_plugins(tmp_path, [tmp_path / "model.nodes.onnx"], families).made == MADE
    for entry in index(tmp_path).values():
        assert [*entry["kernels"]] == families[:-1]
        for kernel in (kernel for made in entry["kernels"].values() for kernel in made):
            assert ptx.assemble((tmp_path / kernel["file"]).read_text())[:4] == b"\x7fELF"


def test_the_last_parameters_are_dropped_only_where_nothing_reads_them() -> None:
    text = (
        ".version 8.7\n.target sm_90a\n.visible .entry k(\n\t.param .u64 k_param_0,\n"
        "\t.param .u32 k_param_1,\n\t.param .u64 k_param_2,\n\t.param .u64 k_param_3\n)\n{\n%s\n}\n"
    )
    kept = ptx.drop_hidden(text % "ld.param.b64 %rd1, [k_param_0];\nld.b32 %r1, [k_param_21];")
    assert [p.kind for p in ptx.entry(kept).parameters] == ["pointer", "i32"]
    with pytest.raises(ValueError, match="k reads k_param_3, which would be left out"):
        ptx.drop_hidden(text % "ld.param.b64 %rd1, [k_param_3];")
    with pytest.raises(ValueError, match=r"ends with .*i32.*; expected Triton's global_scr"):
        ptx.drop_hidden(text.replace(".u64 k_param_2", ".u32 k_param_2") % "")
    with pytest.raises(ValueError, match="with 0 entries"):
        ptx.drop_hidden("int main() {}")
    with pytest.raises(ValueError, match="unknown kind"):
        ptx.entry(text.replace(".u32", ".b8") % "")
    with pytest.raises(ValueError, match="ptxas refuses the text"):
        ptx.assemble(text % "this is no instruction;")
    assert ptx.entry(text % "").forward_compatible is False


# --- the module ---


@pytest.fixture
def registered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Registered]]:
    monkeypatch.setenv("MEMCOMPILE_TARGET", "cuda:sm_90")
    with installed() as found:
        runpy.run_path(str(folder / "plugin.py"))
        yield found.plugins


def described(node: Node, most: int | None = None) -> list[TensorDesc]:
    sizes = {"batch": BATCH, "n": ROWS, "capacity": COLUMNS * SIZE, "capacity/16": COLUMNS}
    made = []
    for name in node.inputs:
        kind, shape = TENSORS[name]
        axes = [ShapeExpr(sizes[x]) if isinstance(x, str) else ShapeExpr(x) for x in shape]
        widest = tuple(most or 1 for _ in shape) if most is not None else None
        made.append(TensorDesc(tuple(axes), str(kind), widest))
    return made


@pytest.mark.parametrize("name", MADE)
def test_the_module_registers_what_it_launches(
    folder: Path, registered: dict[str, Registered], name: str
) -> None:
    assert sorted(registered) == sorted(f"memcompile::{made}" for made in MADE)
    plugin = registered[f"memcompile::{name}"]
    node = next(n for n in NODES if n.operator + n.overload == name)
    given = described(node)
    outputs = plugin.register(*given)
    shapes = [tuple(map(value_of, output.shape_expr)) for output in outputs]
    row = (BATCH, KV * GROUP, ROWS)
    if name == "MemcScoreSelectLogits":
        assert [output.dtype for output in outputs] == ["int64", "float32"]
        assert shapes == [(BATCH, KV, ROWS, 11), (*row, COLUMNS)]
    else:
        assert [output.dtype for output in outputs] == ["float32"] * 2
        assert shapes == [(*row, DIM), row]
    (combination,) = plugin.autotune(*given, outputs)
    types = combination.types.split(", ")
    assert [DTYPES[word] for word in types[len(given) :]] == [o.dtype for o in outputs]
    kinds = {HALF: "BF16", FLOAT: "FP32", INT: "INT32", LONG: "INT64"}
    assert types[: len(given)] == [kinds[TENSORS[n][0]] for n in node.inputs]
    kernels = index(folder)[name]["kernels"]["cuda:sm_90"]
    assert combination.formats == "LINEAR"
    assert combination.tactics == [*range(1, len(kernels) + 1)]
    for tactic, kernel in zip(combination.tactics, kernels, strict=True):
        entry, text, launch, extras = plugin.aot(*given, outputs, tactic)
        assert entry.decode() == name == ptx.entry(text.decode()).name
        assert len(extras.numbers) == [p.kind for p in ptx.entry(text.decode()).parameters].count(
            "i32"
        )
        told = dict(zip(index(folder)[name]["extras"], extras.numbers, strict=True))
        right = {"batch": BATCH, "rows": ROWS, "table_pages": COLUMNS, "heads": KV * GROUP}
        assert told and told.items() <= right.items()
        block = 64 if "prefill" in kernel["file"] else 16
        expected = {
            "MemcAttend": (-(-ROWS * GROUP // block), BATCH * KV),
            "MemcCombine": (-(-BATCH * KV * GROUP * ROWS // 16), 1),
        }.get(name, (ROWS, BATCH * KV))
        assert (value_of(launch.grid_x), value_of(launch.grid_y)) == expected
        assert launch.grid_z == 1
        assert (launch.block_x, launch.shared_mem) == (kernel["threads"], kernel["shared"])


def test_attention_can_be_run_in_two_ways(folder: Path) -> None:
    files = [kernel["file"] for kernel in index(folder)["MemcAttend"]["kernels"]["cuda:sm_80"]]
    assert files == [f"MemcAttend.{role}.cuda-sm_80.ptx" for role in ("decode", "prefill")]


def test_more_pages_than_a_kernel_ranks_are_refused(registered: dict[str, Registered]) -> None:
    node = next(n for n in NODES if n.operator == "MemcScoreSelectLogits")
    plugin = registered["memcompile::MemcScoreSelectLogits"]
    assert plugin.autotune(*described(node, most=250), ())
    with pytest.raises(ValueError, match="ranks 250 pages; the profile allows 251"):
        plugin.autotune(*described(node, most=251), ())


@pytest.mark.parametrize("given", ["", "cuda:sm_100"])
def test_the_target_is_to_be_chosen(
    folder: Path, registered: dict[str, Registered], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    node, plugin = NODES[0], registered["memcompile::MemcAttend"]
    monkeypatch.setenv("MEMCOMPILE_TARGET", given)
    with pytest.raises(ValueError, match=rf"is '{given}'; set it .* cuda:sm_80, cuda:sm_90"):
        plugin.aot(*described(node), (), 1)


def test_the_module_says_what_it_is(folder: Path) -> None:
    text = (folder / "plugin.py").read_text()
    compile(text, "plugin.py", "exec")
    assert "Unverified: neither a GPU nor TensorRT has seen it." in text
    assert all(not entry["verified_on_gpu"] for entry in index(folder).values())


# --- which nodes ---


def test_nodes_have_names_of_their_own_then(folder: Path) -> None:
    written = onnx.load(folder / "model.nodes.onnx")
    onnx.checker.check_model(written)
    kinds = [node.op_type for node in written.graph.node]
    assert kinds == [node.operator + node.overload for node in NODES]
    assert not any(node.overload for node in written.graph.node)
    assert [function.name for function in written.functions] == kinds
    ahead = [n.op_type for n in written.graph.node if "aot" in [a.name for a in n.attribute]]
    assert sorted(ahead) == sorted(MADE)


def test_what_cannot_be_a_plugin_is_left_with_a_reason(folder: Path) -> None:
    left = json.loads((folder / "plugins.json").read_text())["left"]
    assert "writes the state in place" in left["MemcAppendIndex"]
    assert "take turns" in left["MemcAttend3"]


def call(node: Node, **changes: Any) -> Call:
    made = model()
    spread_overloads(made)
    found = next(c for c in calls_of(made) if c.name == node.operator + node.overload)
    tensors = {**found.tensors, **changes.pop("tensors", {})}
    return Call(found.name, found.operator, tensors, {**found.static, **changes})


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind: str) -> None:
    with pytest.raises(NotCovered, match=r"in place|no kernel"):
        plugin_of(Call(kind, kind, {}, {}))
    with pytest.raises(NotCovered, match="MemcNew has no kernel"):
        plugin_of(Call("MemcNew", "MemcNew", {}, {}))


def test_refused_for_what_it_is() -> None:
    varying = (torch.int64, ("batch", KV, "n", "list"))
    with pytest.raises(NotCovered, match="width of its lists, list_pages, is not fixed"):
        plugin_of(call(NODES[3], tensors={"pages": varying}))
    with pytest.raises(NotCovered, match=r"its log_count is torch.bfloat16; the kernel reads"):
        plugin_of(call(NODES[3], tensors={"log_count": (torch.bfloat16, (1, KV, 3, 1))}))
    with pytest.raises(NotCovered, match="compiled for varies: d"):
        plugin_of(call(NODES[0], tensors={"query": (torch.bfloat16, (*ROW, "d"))}))
    with pytest.raises(NotCovered, match="8193 pages take two launches to rank"):
        plugin_of(call(NODES[4]), max_context=8193 * SIZE)
    assert plugin_of(call(NODES[4]))[0].columns == 8192
    plugin, _ = plugin_of(call(NODES[0]))
    with pytest.raises(ValueError, match="TensorRT runs on CUDA; the target is 'hip:gfx942'"):
        plugin_kernels(plugin, "hip:gfx942")
    with pytest.raises(ValueError, match="plug-ins are for CUDA; the targets are hip:gfx942"):
        write_plugins(Path(), [], ["hip:gfx942"])


def test_only_what_other_runtimes_read_has_no_page_table() -> None:
    for op in ("append_index", "combine", "state_step"):
        with pytest.raises(NotCovered, match="reads a page table"):
            KernelSpec(op, key_dim=16, value_dim=16, count=2, contiguous=True)
    spec = KernelSpec("attend", key_dim=16, value_dim=16, contiguous=True)
    assert spec.name.endswith("_contiguous")
    assert "page_table" not in [name for _, name in spec.arguments]
    from memcompile.codegen import cpp

    with pytest.raises(NotCovered, match="on the CPU kernels read page tables"):
        cpp.load([spec])
