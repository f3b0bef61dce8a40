"""TensorRT: what engines are built for, recipes, and what is refused, mostly without TensorRT."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import fx

from memcompile.compiler.export import tensorrt, tensorrt_build, tensorrt_onnx, tensorrt_rtx
from memcompile.compiler.export.contract import (
    Capacity,
    Contract,
    Grows,
    StateTensor,
    read_contract,
)
from memcompile.compiler.export.formats import emit_all
from memcompile.compiler.export.plugin_folder import Plugins
from memcompile.compiler.export.tensorrt_build import (
    Range,
    Sizes,
    build,
    find,
    flags,
    input_shapes,
    sizes_for,
)
from memcompile.models.portable import operator

KEYS = StateTensor("site0_keys", "site0_keys_out", "float32", (1, 2, 4096, 8), 0.0, 0, Grows(2, 1))
MEAN = StateTensor("site0_mean", "site0_mean_out", "float32", (1, 2, 512, 8), 0.0, 0, Grows(2, 8))
RING = StateTensor("site1_keys", "site1_keys_out", "float16", (1, 2, 560, 8), 0.0, 0, None)
CONTRACT = Contract(
    "tokens",
    "position",
    "lengths",
    "logits",
    (KEYS, MEAN, RING),
    Capacity(4096, 8),
    512,
    None,
    9000,
    97,
)


# --- sizes ---


def test_sizes_come_from_the_contract() -> None:
    told = CONTRACT.to_json()
    assert sizes_for(told) == Sizes(Range(1, 1, 4), Range(1, 1, 512), Range(8, 4096, 4096))
    assert sizes_for(told, whole=True).call == Range(1, 512, 512)
    given = sizes_for(told, batch=2, call=64, capacity=8001)
    assert given == Sizes(Range(1, 1, 2), Range(1, 1, 64), Range(8, 4096, 8008))
    assert sizes_for({**told, "longest_call": 100}).call.max == 100
    assert sizes_for({**told, "longest_call": None}).call.max == 512
    assert sizes_for({**told, "longest_call": None, "context": 40}).call.max == 40
    assert sizes_for({**told, "longest_call": None, "context": None}).call.max == 512
    assert sizes_for({**told, "splits_at": 256}).call.max == 256
    assert sizes_for({**told, "capacity": None}).capacity is None
    assert sizes_for({**told, "capacity": {"tokens": 64, "multiple": 8}}).capacity == (8, 64, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"call": 513}, "513 tokens in one call; the model takes up to 512"),
        ({"batch": 0}, "batch is 0; give 1 or more"),
        ({"capacity": -8}, "capacity is -8; give 1 or more"),
    ],
)
def test_sizes_that_the_contract_excludes(options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sizes_for(CONTRACT.to_json(), **options)


def test_capacity_of_a_state_that_does_not_grow() -> None:
    with pytest.raises(ValueError, match="capacity 64: the state of this model does not grow"):
        sizes_for({**CONTRACT.to_json(), "capacity": None}, capacity=64)


def test_shapes_of_every_input() -> None:
    sizes = Sizes(Range(1, 2, 3), Range(1, 1, 64), Range(8, 64, 512))
    shapes = input_shapes(CONTRACT.to_json(), sizes)
    assert shapes == {
        "tokens": [[1, 1], [2, 1], [3, 64]],
        "position": [[1], [2], [3]],
        "lengths": [[1], [2], [3]],
        "site0_keys": [[1, 2, 8, 8], [2, 2, 64, 8], [3, 2, 512, 8]],
        "site0_mean": [[1, 2, 1, 8], [2, 2, 8, 8], [3, 2, 64, 8]],
        "site1_keys": [[1, 2, 560, 8], [2, 2, 560, 8], [3, 2, 560, 8]],
    }
    assert [*shapes] == CONTRACT.inputs
    assert flags({"a": shapes["tokens"], "b": shapes["position"]}) == [
        "--minShapes=a:1x1,b:1",
        "--optShapes=a:2x1,b:2",
        "--maxShapes=a:3x64,b:3",
    ]


# --- building, with a TensorRT that notes what it is given ---


class Recorded:
    """As much of TensorRT's module as `build` calls."""

    def __init__(self, inputs: list[str], *, refuses: bool = False, builds: bool = True) -> None:
        self.calls: list[Any] = []
        self.inputs, self.refuses, self.builds = inputs, refuses, builds
        self.ComputeCapability = SimpleNamespace(
            __members__={"NONE": 0, "SM80": 1, "SM120": 2}, SM80="sm80", SM120="sm120"
        )
        self.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
        self.BuilderFlag = SimpleNamespace(TF32="tf32")
        self.ILogger = type("ILogger", (), {"ERROR": 1, "__init__": lambda self: None})

    def Builder(self, log: Any) -> Any:
        def built(network: Any, config: Any) -> bytearray | None:
            log.log(0, "Error  Code 4:\n no kernel")
            log.log(0, "Error  Code 4:\n no kernel")
            log.log(2, "chatter")
            return bytearray(b"engine") if self.builds else None

        profile = SimpleNamespace(set_shape=lambda *given: self.calls.append(given))
        inputs = [SimpleNamespace(name=name) for name in self.inputs]
        return SimpleNamespace(
            create_network=lambda given: SimpleNamespace(
                num_inputs=len(inputs), get_input=lambda i: inputs[i], given=given
            ),
            create_builder_config=lambda: SimpleNamespace(
                clear_flag=lambda flag: self.calls.append(("clear", flag)),
                add_optimization_profile=lambda made: self.calls.append(made is profile),
                set_compute_capability=lambda *given: self.calls.append(given),
            ),
            create_optimization_profile=lambda: profile,
            build_serialized_network=built,
        )

    def OnnxParser(self, network: Any, log: Any) -> Any:
        assert network.given == 2, "not strongly typed"
        error = SimpleNamespace(
            node_name=lambda: "/n/7", node_operator=lambda: "NonZero", desc=lambda: "no  plugin"
        )
        return SimpleNamespace(
            parse_from_file=lambda path: self.calls.append(path) or not self.refuses,
            num_errors=2,
            get_error=lambda number: error,
        )


def test_what_tensorrt_is_told() -> None:
    trt = Recorded(["a", "b"])
    shapes = {"b": [[1], [1], [2]], "a": [[1, 1], [1, 2], [2, 3]]}
    engine = build(trt, Path("x.onnx"), shapes, ["SM80", "SM120"])
    assert engine == b"engine"
    assert trt.calls == [
        "x.onnx",
        ("clear", "tf32"),
        ("a", *shapes["a"]),
        ("b", *shapes["b"]),
        True,
        ("sm80", 0),
        ("sm120", 1),
    ]


@pytest.mark.parametrize(
    ("trt", "named", "words"),
    [
        (
            Recorded(["a"], refuses=True),
            [],
            r"TensorRT does not take x.onnx: node '/n/7' \(NonZero\): no plugin$",
        ),
        (Recorded(["a"], builds=False), [], "x.onnx cannot be built: Error Code 4: no kernel$"),
        (Recorded(["a"]), ["SM90"], "unknown compute capability 'SM90'; known: SM80, SM120"),
        (Recorded(["c"]), [], r"the model has the inputs \['c'\]; expected \['a'\]"),
    ],
    ids=["node", "engine", "capability", "inputs"],
)
def test_what_tensorrt_refuses(trt: Any, named: list[str], words: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=words):
        build(trt, "x.onnx", {"a": [[1], [1], [1]]}, named)


def test_the_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in tensorrt_build.MODULES.values():
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"tensorrt-rtx is not there .* the extra tensorrt-rtx"):
        find("tensorrt-rtx")
    with pytest.raises(ImportError, match="it comes with NVIDIA's TensorRT"):
        find("tensorrt")


def test_an_export_without_the_package_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in tensorrt_build.MODULES["tensorrt-rtx"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="tensorrt-rtx is not there"):
        emit_all(tmp_path, None, ["tensorrt-rtx"], None)  # type: ignore[arg-type]
    assert [*(tmp_path / "tensorrt-rtx").iterdir()] == []


def listing(count: int) -> fx.GraphModule:
    """A graph that lists pages: `capacity` of them where all are scored, `budget_pages` later."""
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in ("query", "mean", "position", "lengths")]
    query, mean, position, lengths = given
    rest = (position, lengths, "mean", 8, 1, 1)
    first = graph.call_function(
        operator("score_select"), (query, [mean], ["mean"], *rest, count - 1, 4, 0)
    )
    second = graph.call_function(
        operator("score_select.among"), (query, [mean], ["mean"], first, *rest, count, -1)
    )
    graph.output((second,))
    return fx.GraphModule({}, graph)


def test_lists_longer_than_topk_are_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensorrt_onnx.check_lists([listing(3840)])
    monkeypatch.setattr(
        tensorrt_onnx, "functional_graphs", lambda c: (CONTRACT, {"model.onnx": listing(3841)})
    )
    monkeypatch.setattr(tensorrt_onnx, "require_onnx", lambda: None)
    with pytest.raises(ValueError, match="reads up to 3841 pages, and TensorRT chooses 3840"):
        tensorrt_onnx.write_inlined(tmp_path, None)  # type: ignore[arg-type]
    assert [*tmp_path.iterdir()] == []


# --- recipes ---


def test_build_sh_says_to_trtexec_what_build_py_says(tmp_path: Path) -> None:
    """A trtexec of the test's writes down its options."""
    program, folder = tmp_path / "bin" / "trtexec", tmp_path / "a folder"
    program.parent.mkdir()
    folder.mkdir()
    program.write_text('#!/bin/sh\nfor x in "$@"; do echo "$x"; done\necho --end\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    script = folder / "build.sh"
    script.write_text(tensorrt.build_script(CONTRACT, ["model.onnx", "prefill.onnx"]))
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    ran = subprocess.run(
        ["sh", str(script), "--verbose"],
        env={**os.environ, "PATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    told = CONTRACT.to_json()
    expected = []
    for name, whole in (("model", False), ("prefill", True)):
        expected += [
            f"--onnx={name}.onnx",
            f"--saveEngine={name}.plan",
            *("--stronglyTyped", "--noTF32", "--skipInference"),
            *flags(input_shapes(told, sizes_for(told, whole=whole))),
            *("--verbose", "--end"),
        ]
    assert ran.stdout.split() == expected


def test_build_py_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tensorrt_build.main(["--folder", str(tmp_path)]) == 1
    assert "error: " in capsys.readouterr().err
    CONTRACT.write(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert tensorrt_build.main(["--folder", str(tmp_path)]) == 1
    assert "error: tensorrt is not there" in capsys.readouterr().err
    (tmp_path / "model.onnx").touch()
    monkeypatch.setitem(sys.modules, "tensorrt", Recorded([], refuses=True))
    assert tensorrt_build.main(["--folder", str(tmp_path)]) == 1
    assert "error: TensorRT does not take model.onnx" in capsys.readouterr().err
    assert not [*tmp_path.glob("*.plan*")]


def test_build_py_builds_each_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONTRACT.write(tmp_path)
    for name in ("model.onnx", "prefill.onnx", "model.nodes.onnx"):
        (tmp_path / name).touch()
    trt = Recorded(CONTRACT.inputs)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    given = ["--rtx", "--capabilities", "SM80", "--batch", "2", "--call", "9", "--capacity", "64"]
    assert tensorrt_build.main(["--folder", str(tmp_path), *given]) == 0
    assert {p.name for p in tmp_path.glob("*.plan")} == {"model.plan", "prefill.plan"}
    assert (tmp_path / "model.plan").read_bytes() == b"engine"
    tokens = [call for call in trt.calls if isinstance(call, tuple) and call[0] == "tokens"]
    assert tokens == [("tokens", [1, 1], [1, 1], [2, 9]), ("tokens", [1, 1], [1, 9], [2, 9])]
    assert trt.calls.count(("sm80", 0)) == 2


def test_build_py_with_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    CONTRACT.write(tmp_path)
    for name in ("model.onnx", "model.nodes.onnx", "prefill.nodes.onnx"):
        (tmp_path / name).touch()
    trt = Recorded(CONTRACT.inputs)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    given = ["--folder", str(tmp_path), "--plugins"]
    assert tensorrt_build.main(given) == 1
    assert "plugin.py: not there; this recipe has no plug-ins" in capsys.readouterr().err
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "plugin.py").write_text(
        "import tensorrt\ntensorrt.calls.append('registered')\n"
    )
    assert tensorrt_build.main(given) == 0
    assert {p.name for p in tmp_path.glob("*.plan")} == {"model.plan", "prefill.plan"}
    texts = [call for call in trt.calls if isinstance(call, str)]
    names = [f"{tmp_path}/{name}.nodes.onnx" for name in ("model", "prefill")]
    assert texts == ["registered", *names]


# --- torch-tensorrt ---


def fake_torch_tensorrt(calls: list[Any]) -> ModuleType:
    module: Any = ModuleType("torch_tensorrt")

    def convert(program: Any, **given: Any) -> bytes:
        calls.append((program, given))
        return b"engine"

    module.Input = lambda **given: SimpleNamespace(**given)
    module.dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
    module.__version__ = "2.13.0"
    module.__spec__ = ModuleSpec("torch_tensorrt", None)
    return module


def fake_runtime(names: list[str] | None) -> Any:
    """A `tensorrt` whose engines have these inputs and outputs."""
    engine = names and SimpleNamespace(
        num_io_tensors=len(names), get_tensor_name=lambda number: names[number]
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda given: engine)

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None: ...

    return SimpleNamespace(Logger=Logger, Runtime=lambda log: runtime)


class Step(torch.nn.Module):
    """A step that chooses and writes, in our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(97, 8)

    def forward(
        self, tokens: torch.Tensor, position: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.embedding(tokens)[:, None].expand(-1, 2, -1, -1)
        at = position[:, None] + torch.arange(tokens.shape[1])
        kept = operator("put_rows")(keys, at, rows)
        best, _ = operator("largest")(rows @ kept.transpose(-1, -2), 3)
        return best.sum((1, 3))[..., None] + rows[:, 0], kept


def test_what_torch_tensorrt_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    contract = dataclasses.replace(CONTRACT, lengths=None, state=(KEYS,))
    graph = Step()
    monkeypatch.setattr(tensorrt, "functional_graphs", lambda c: (contract, {"model.onnx": graph}))
    monkeypatch.setattr(tensorrt, "check_lists", lambda graphs: None)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake_torch_tensorrt(calls))
    names = [*contract.inputs, "output0", "output1"]
    monkeypatch.setattr(tensorrt_build, "find", lambda name: fake_runtime(names))
    monkeypatch.setattr(tensorrt, "can_build", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    artefact = tensorrt.emit(tmp_path, None, None)  # type: ignore[arg-type]
    assert artefact.main == "model.plan" and "for a GPU and no other" in artefact.notes[1]
    assert artefact.notes[0] == "built, not run" and artefact.run is artefact.verified is None
    assert (tmp_path / "model.plan").read_bytes() == b"engine"
    assert read_contract(tmp_path).outputs == ["output0", "output1"]
    ((program, given),) = calls
    assert given["require_full_compilation"] and given["disable_tf32"]
    inputs = given["arg_inputs"]
    assert [x.name for x in inputs] == contract.inputs
    assert [x.dtype for x in inputs] == [torch.int64, torch.int32, torch.float32]
    assert inputs[0].max_shape == [4, 512] and inputs[2].min_shape == [1, 2, 8, 8]
    operators = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not {name for name in operators if name.startswith("memcompile")}, "not decomposed"
    assert {"aten.index_put.default", "aten.topk.default"} <= operators
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    example = (tokens, torch.tensor([2, 0], dtype=torch.int32), torch.rand(2, 2, 16, 8))
    with torch.no_grad():
        results = zip(program.module()(*example), graph(*example), strict=True)
    for made, expected in results:
        assert_close_to_float64(made, expected, expected.double())


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (None, "the engine that was just built cannot be loaded"),
        (["tokens", "output0"], r"lacks \['lengths', 'logits', .* and has \['output0'\] too"),
    ],
)
def test_an_engine_that_lost_a_part(
    monkeypatch: pytest.MonkeyPatch, names: list[str] | None, words: str
) -> None:
    monkeypatch.setattr(tensorrt_build, "find", lambda name: fake_runtime(names))
    with pytest.raises(RuntimeError, match=words):
        tensorrt.check_names(b"engine", CONTRACT)


def test_what_torch_tensorrt_does_not_convert(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TensorRT's own parser builds it, and the notes say why."""

    def converted(folder: Path, compiled: Any) -> Any:
        (folder / "model.plan").write_bytes(b"half")
        (folder / "prefill.plan").write_bytes(b"half")
        raise RuntimeError("Conversion of aten::odd\nis not supported")

    def inlined(folder: Path, compiled: Any) -> Contract:
        (folder / "model.onnx").touch()
        return CONTRACT

    trt = Recorded(CONTRACT.inputs)
    trt.__version__ = "11"  # type: ignore[attr-defined]
    monkeypatch.setattr(tensorrt_build, "find", lambda name: trt)
    monkeypatch.setattr(tensorrt, "_converted", converted)
    monkeypatch.setattr(tensorrt, "write_inlined", inlined)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    artefact = tensorrt.write_engines(tmp_path, None)  # type: ignore[arg-type]
    assert {p.name for p in tmp_path.iterdir()} == {"model.plan", "state.json"}
    assert (tmp_path / "model.plan").read_bytes() == b"engine"
    assert read_contract(tmp_path) == CONTRACT
    assert any("torch-tensorrt did not convert" in x and "aten::odd" in x for x in artefact.notes)
    assert artefact.built["tensorrt"] == "11" and artefact.notes[0] == "built, not run"


def test_engines_take_a_gpu_and_torch_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake_torch_tensorrt([]))
    assert tensorrt.can_build()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not tensorrt.can_build()


def test_without_a_gpu_there_is_a_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake_torch_tensorrt([]))

    def inlined(folder: Path, compiled: Any, suffix: str) -> Contract:
        written.append(suffix)
        for name in ("model.onnx", "model.nodes.onnx"):
            (folder / name).touch()
        CONTRACT.write(folder)
        return CONTRACT

    def plugins(folder: Path, models: list[Path], targets: Any, most: int) -> Any:
        assert [path.name for path in models] == ["model.nodes.onnx"]
        assert most == 9000 and "cuda:sm_90" in targets
        return Plugins(made=["MemcAttend"])

    monkeypatch.setattr(tensorrt, "write_inlined", inlined)
    monkeypatch.setattr(tensorrt, "write_plugins", plugins)
    artefact = tensorrt.emit(tmp_path, None, None)  # type: ignore[arg-type]
    assert written == [".nodes.onnx"] and artefact.main == "model.onnx"
    assert "a recipe, not built" in artefact.notes[0]
    assert any("MemcAttend as plug-ins (PTX, never run)" in note for note in artefact.notes)
    names = {path.name for path in tmp_path.iterdir()}
    models = {"model.onnx", "model.nodes.onnx", "state.json"}
    assert names == {*models, "build.py", "build.sh", "plugins"}
    assert os.access(tmp_path / "build.sh", os.X_OK)


def test_recipes_without_plugins_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt, "write_plugins", lambda *given: Plugins())
    assert "none of them can be a plug-in" in tensorrt.plugins_of(tmp_path, CONTRACT)
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    assert "triton is not installed here" in tensorrt.plugins_of(tmp_path, CONTRACT)


def test_notes_say_what_was_not_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", Recorded(CONTRACT.inputs))
    sys.modules["tensorrt_rtx"].__version__ = "1.7"  # type: ignore[attr-defined]
    monkeypatch.setattr(tensorrt_rtx, "CAPABILITIES", ("SM80", "SM120"))

    def inlined(folder: Path, compiled: Any) -> Contract:
        for name in ("model.onnx", "prefill.onnx"):
            (folder / name).touch()
        return CONTRACT

    monkeypatch.setattr(tensorrt_rtx, "write_inlined", inlined)
    artefact = tensorrt_rtx.emit(tmp_path, None, None)  # type: ignore[arg-type]
    assert {p.name for p in tmp_path.iterdir()} == {"model.plan", "prefill.plan", "state.json"}
    assert artefact.notes[0].startswith("built, not run") and artefact.run is None
    assert "SM80, SM120" in artefact.notes[1] and "4096 tokens" in artefact.notes[2]
    assert artefact.built["capabilities"] == ["SM80", "SM120"]
    assert "prefill.plan" in artefact.notes[-1] and artefact.main == "model.plan"
