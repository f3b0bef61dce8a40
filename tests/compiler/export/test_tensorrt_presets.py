"""Every preset under TensorRT-RTX, which parses and builds without a GPU; and what builds recipes.

Nothing here runs an engine: that takes a GPU.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.compiler.cli import main
from memcompile.compiler.exit_codes import OK
from memcompile.compiler.export import tensorrt, tensorrt_build, tensorrt_onnx, tensorrt_rtx
from memcompile.compiler.export.contract import read_contract
from memcompile.compiler.export.onnx_portable import functional_graphs
from memcompile.compiler.pipeline import Compiled, build

pytest.importorskip("onnxscript")
RTX = pytest.importorskip(
    "tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed: make test-long"
)
pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[3]
TORCH_TENSORRT = ROOT / ".venv-tensorrt"
CASES = Path(__file__).parent / "torch_tensorrt_case.py"

# Each reads through its policy in every layer, and has levels, rings and states of several pages.
SELECTS = {"page_size": 8, "dense_layers": 0}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"page_size": 8}),
    "window": ("window", {**SELECTS, "sinks": 8, "window": 16}),
    "scout": ("scout", {**SELECTS, "budget": 48, "sinks": 8, "window": 8}),
    "scout-alone": (
        "scout",
        {**SELECTS, "budget": 48, "sinks": 8, "window": 8, "compensate": False},
    ),
    "quest": ("quest", {**SELECTS, "budget": 48}),
    "hierarchical": (
        "hierarchical",
        {"levels": (8, 32, 64), "sinks": 8, "window": 16, "refine": 16, "dense_layers": 0},
    ),
    "hierarchical-forgets": (
        "hierarchical",
        {
            **{"levels": (8, 32, 64), "sinks": 8, "window": 16, "refine": 0, "keep": False},
            "dense_layers": 0,
        },
    ),
    "heavy-hitter": ("heavy-hitter", {**SELECTS, "budget": 88, "sinks": 8, "window": 16}),
    "hybrid": ("hybrid", {"window": 16, "page_size": 8, "state_layers": (0,)}),
    "hybrid-gate": (
        "hybrid",
        {"window": 16, "page_size": 8, "state_layers": (0,), "decay": "gate"},
    ),
}


def llama(dtype: torch.dtype) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def compiled_llama(name: str, dtype: torch.dtype = torch.float32) -> Compiled:
    policy, options = POLICIES[name]
    return build(llama(dtype), policy, kernels="off", check=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_preset_builds(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    compiled = compiled_llama(name, dtype)
    artefact = tensorrt_rtx.emit(tmp_path, compiled, None)
    contract, graphs = functional_graphs(compiled)
    plans = {Path(model).with_suffix(".plan").name for model in graphs}
    assert {p.name for p in tmp_path.iterdir()} == {*plans, "state.json"}
    assert all((tmp_path / plan).stat().st_size > 100_000 for plan in plans)
    assert read_contract(tmp_path) == contract
    assert artefact.built["tensorrt_rtx"] == RTX.__version__
    assert artefact.run is artefact.verified is None and "not run" in artefact.notes[0]


def test_bfloat16_builds(tmp_path: Path) -> None:
    tensorrt_rtx.emit(tmp_path, compiled_llama("scout", torch.bfloat16), None)
    assert {t.dtype for t in read_contract(tmp_path).state} >= {"bfloat16"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tensorrt.write_recipe(folder, compiled_llama("scout"))
    return folder


# What a machine without memcompile runs; TensorRT-RTX's module stands in for TensorRT's.
STANDS_IN = """
import runpy, sys
import tensorrt_rtx_bindings
sys.modules["tensorrt"] = tensorrt_rtx_bindings
program = sys.argv.pop(1)
try:
    runpy.run_path(program, run_name="__main__")
finally:
    assert not {"torch", "memcompile", "numpy", "onnx"} & {*sys.modules}, "needs more than TensorRT"
"""


@pytest.mark.parametrize("rtx", [False, True], ids=["tensorrt", "tensorrt-rtx"])
def test_a_recipe_builds_by_itself(recipe: Path, tmp_path: Path, rtx: bool) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for path in filter(Path.is_file, recipe.iterdir()):
        (folder / path.name).write_bytes(path.read_bytes())
    sizes = ["--batch", "2", "--call", "16", "--capacity", "256"]
    named = ["--rtx", "--capabilities", "SM80,SM120"] if rtx else []
    program = [sys.executable, "-c", STANDS_IN, str(folder / "build.py"), *sizes, *named]
    ran = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "max=16" in ran.stdout and "max=256" in ran.stdout
    assert {p.name for p in folder.glob("*.plan*")} == {"model.plan", "prefill.plan"}


def test_a_recipe_holds_both_kinds_of_model(recipe: Path) -> None:
    import onnx

    for name in ("model", "prefill"):
        inlined, nodes = (
            onnx.load(recipe / f"{name}{suffix}", load_external_data=False)
            for suffix in (".onnx", ".nodes.onnx")
        )
        assert not inlined.functions and {node.domain for node in inlined.graph.node} == {""}
        assert nodes.functions and "memcompile" in {node.domain for node in nodes.graph.node}
        assert not {"NonZero", "If"} & {node.op_type for node in inlined.graph.node}
    assert "--onnx=prefill.onnx" in (recipe / "build.sh").read_text()


@pytest.mark.parametrize("name", ["model", "prefill"])
def test_nodes_without_a_plugin_are_built_from_their_bodies(recipe: Path, name: str) -> None:
    told = json.loads((recipe / "state.json").read_text())
    shapes = tensorrt_build.input_shapes(told, tensorrt_build.sizes_for(told))
    assert tensorrt_build.build(RTX, recipe / f"{name}.nodes.onnx", shapes, ["SM80"])


def test_a_recipe_has_plugins_for_the_nodes_that_can_be_one(recipe: Path) -> None:
    pytest.importorskip("triton")
    index = json.loads((recipe / "plugins" / "plugins.json").read_text())
    made = {entry["name"] for entry in index["made"]}
    assert made == {"MemcAttend", "MemcScoreSelectLogits", "MemcSummaries"}
    assert [*index["left"]] == ["MemcAppendIndex"]
    module = (recipe / "plugins" / "plugin.py").read_text()
    compile(module, "plugin.py", "exec")
    for target in tensorrt.TARGETS:
        files = [*(recipe / "plugins").glob(f"*.{target.replace(':', '-')}.ptx")]
        assert files and all(path.name in module for path in files)


def test_a_node_that_tensorrt_does_not_take_is_named(recipe: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(recipe / "model.onnx")
    model.graph.node.append(onnx.helper.make_node("NonZero", ["tokens"], ["where"], name="odd"))
    kind = onnx.helper.make_tensor_value_info("where", onnx.TensorProto.INT64, [2, "found"])
    model.graph.output.append(kind)
    onnx.save(model, tmp_path / "model.onnx")
    told = json.loads((recipe / "state.json").read_text())
    shapes = tensorrt_build.input_shapes(told, tensorrt_build.sizes_for(told))
    with pytest.raises(RuntimeError, match=r"does not take model.onnx: node 'odd' \(NonZero\)"):
        tensorrt_build.build(RTX, tmp_path / "model.onnx", shapes, ["SM80"])


def test_a_capability_that_it_does_not_know(recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown compute capability 'SM90'; known: .*SM80"):
        told = json.loads((recipe / "state.json").read_text())
        shapes = tensorrt_build.input_shapes(told, tensorrt_build.sizes_for(told))
        tensorrt_build.build(RTX, recipe / "model.onnx", shapes, ["SM90"])


def test_the_longest_list_is_tensorrts(tmp_path: Path) -> None:
    """One place more than LONGEST_LIST, and it refuses."""
    import onnx
    from onnx import TensorProto, helper

    for count in (tensorrt_onnx.LONGEST_LIST, tensorrt_onnx.LONGEST_LIST + 1):
        graph = helper.make_graph(
            [helper.make_node("TopK", ["x", "k"], ["values", "order"])],
            "lists",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "pages"])],
            [helper.make_tensor_value_info("order", TensorProto.INT64, ["rows", count])],
            [helper.make_tensor("k", TensorProto.INT64, [1], [count])],
        )
        opset = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "m.onnx")
        shapes = {"x": [[1, 4000], [1, 4000], [2, 8000]]}
        if count == tensorrt_onnx.LONGEST_LIST:
            assert tensorrt_build.build(RTX, tmp_path / "m.onnx", shapes, ["SM80"])
        else:
            with pytest.raises(RuntimeError, match="K exceeds the maximum value allowed"):
                tensorrt_build.build(RTX, tmp_path / "m.onnx", shapes, ["SM80"])


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a machine without a GPU runs."""
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "docs/shipping/tensorrt.md").read_text().splitlines()
    told = {}
    for line in lines:
        if line.startswith("memcompile "):
            words = shlex.split(line.replace("models/networks", str(ROOT / "models/networks")))
            assert main([*words[1:], "--quiet", "--kernels", "off"]) == OK
            out = Path(words[words.index("--out") + 1])
            (artefact,) = json.loads((out / "manifest.json").read_text())["artefacts"]
            assert artefact["run"] is None and artefact["verified"] is None
            assert (out / artefact["folder"] / artefact["main"]).is_file()
            told[artefact["format"]] = artefact
    assert told["tensorrt-rtx"]["main"] == "model.plan"
    assert "not run" in told["tensorrt-rtx"]["notes"][0]
    assert told["tensorrt"]["main"] == "model.onnx"
    assert "not built" in told["tensorrt"]["notes"][0]
    (line,) = (line for line in lines if line.startswith("python ") and "--rtx" in line)
    subprocess.run([sys.executable, *shlex.split(line)[1:]], check=True)
    plans = {p.name for p in Path("shipped-trt/tensorrt").glob("*.plan")}
    assert plans == {"model.plan", "prefill.plan"}


@pytest.mark.skipif(
    not TORCH_TENSORRT.is_dir(),
    reason="torch-tensorrt-rtx is not in .venv-tensorrt: make test-long",
)
def test_torch_tensorrt_converts_every_operator_of_dense(tmp_path: Path) -> None:
    """The first way of `tensorrt.write_engines`, by the torch-tensorrt of TensorRT-RTX.

    In a process of its own: it takes a machine with a GPU to import, so the test pretends one.
    """
    told = json.dumps(POLICIES["dense"])
    ran = subprocess.run(
        [sys.executable, str(CASES), str(TORCH_TENSORRT), str(tmp_path), told],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert (tmp_path / "model.plan").stat().st_size > 100_000
    assert read_contract(tmp_path).logits == "output0"
