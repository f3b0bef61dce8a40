"""Portable ONNX: what is in the files, what runs them without us, and exports that must fail."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memcompile
from memcompile.compiler.export import onnx_portable
from memcompile.compiler.export.contract import Contract, StateTensor, read_contract
from memcompile.compiler.export.verify import Trace, trace
from memcompile.compiler.in_float32 import TYPICAL, error_over_eager
from memcompile.compiler.package import write
from memcompile.compiler.pipeline import Compiled, build

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")

import onnx_ir as ir  # noqa: E402

from memcompile.compiler.export import onnx_check, onnx_model, onnx_write  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
BYTES_SMALL = ROOT / "models/networks/checkpoints/bytes-small"
VOCABULARY = 61
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
}
SCOUT = {"page_size": 8, "sinks": 8, "window": 8, "budget": 40, "dense_layers": 0}

# Runs in an interpreter without site-packages, into which only two libraries are put.
DRIVER = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import numpy as np
from generate import Engine

given, made = np.load(sys.argv[4]), {}
for batch in (1, 3):
    engine = Engine(sys.argv[3], batch)
    for number in range(int(given[f"{batch}_calls"])):
        made[f"{batch}_{number}"] = engine(given[f"{batch}_{number}"])
np.savez(sys.argv[5], **made)
print(sorted({"torch", "memcompile", "onnx"} & set(sys.modules)))
"""


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, **changes})
    model: nn.Module = transformers.LlamaForCausalLM(config).eval().to(dtype)
    return model


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return build(llama(), "scout", kernels="off", check=False, **SCOUT)


@pytest.fixture(scope="module")
def folder(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("exported")
    onnx_portable.emit(place, compiled, None)
    return place


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with onnxruntime and numpy, and nothing else."""
    place = tmp_path_factory.mktemp("libraries")
    for name in ("numpy", "onnxruntime"):
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        source = Path(spec.origin).parent
        for folder in (source, source.with_name(f"{name}.libs")):
            if folder.exists():
                (place / folder.name).symlink_to(folder)
    return place


def driven(place: Path, traces: dict[int, Trace], libraries: Path, scratch: Path) -> dict[str, Any]:
    """What `examples/onnx/generate.py` makes of the tokens that eager was fed."""
    fed: dict[str, Any] = {}
    for batch, made in traces.items():
        fed[f"{batch}_calls"] = len(made.tokens)
        fed |= {f"{batch}_{number}": x.numpy() for number, x in enumerate(made.tokens)}
    np.savez(scratch / "fed.npz", **fed)
    arguments = [
        libraries,
        ROOT / "examples/onnx",
        place,
        scratch / "fed.npz",
        scratch / "made.npz",
    ]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", DRIVER, *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    return dict(np.load(scratch / "made.npz"))


def assert_eager(made: dict[str, Any], traces: dict[int, Trace]) -> None:
    for batch, eager in traces.items():
        if eager.exact is not None:  # near scores are ranked otherwise, and other pages read
            answers = [torch.from_numpy(made[f"{batch}_{i}"]) for i in range(len(eager.logits))]
            told = (torch.cat(x, 1) for x in (answers, eager.logits))
            assert error_over_eager(*told, eager.exact) <= TYPICAL
        for number, expected in enumerate(eager.logits):
            got = torch.from_numpy(made[f"{batch}_{number}"])
            assert got.shape == expected.shape and got.dtype == expected.dtype
            assert float((got.double() - expected.double()).abs().max()) <= eager.allowed
            best = expected.double().topk(2, -1)
            clear = best.values[..., 0] - best.values[..., 1] > 2 * eager.allowed
            assert bool(((got.argmax(-1) == best.indices[..., 0]) | ~clear).all())
            if expected.dtype == torch.float32 and number >= len(eager.logits) - 64:
                assert torch.equal(got[:, -1].argmax(-1), expected[:, -1].argmax(-1))


def traces_of(compiled: Compiled, prompt: int | None = None) -> dict[int, Trace]:
    assert compiled.program is not None
    return {batch: trace(compiled.program, batch, prompt, 64) for batch in (1, 3)}


def test_runs_on_onnxruntime_and_numpy_alone(
    compiled: Compiled, folder: Path, libraries: Path, tmp_path: Path
) -> None:
    traces = traces_of(compiled, 241)
    assert_eager(driven(folder, traces, libraries, tmp_path), traces)


def test_the_example_prints_tokens(folder: Path) -> None:
    script = ROOT / "examples/onnx/generate.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), "--tokens", "1,2,3", "--count", "5"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tokens = [int(word) for word in done.stdout.split()]
    assert len(tokens) == 5 and all(0 <= token < VOCABULARY for token in tokens)


def test_memory_operations_are_nodes_with_bodies(folder: Path) -> None:
    model = ir.load(folder / "model.onnx")
    nodes = [node for node in model.graph if node.domain == "memcompile"]
    assert [node.op_type for node in nodes] == [
        "MemcAppendIndex",
        "MemcScoreSelectLogits",
        "MemcSummaries",
    ]
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    for node in nodes:
        assert node.op_type not in standard
        assert node.attributes["plugin_namespace"].as_string() == "memcompile"
        assert node.attributes["plugin_version"].as_string() == "1"
        body = model.functions[node.op_identifier()]
        assert all(n.domain == "" and n.op_type in standard for n in body)
    assert nodes[1].attributes["budget_pages"].as_int() == 5
    # The same operator called in another way, if only once, is another function.
    assert len(model.functions) == 3


def test_names_of_nodes_are_none_of_onnx() -> None:
    for schema in onnx.defs.get_all_schemas():
        assert schema.name not in onnx_model.NODES.values()


def test_weights_lie_apart_and_once(folder: Path) -> None:
    data = folder / onnx_write.DATA
    model, prefill = (ir.load(folder / name) for name in ("model.onnx", "prefill.onnx"))
    held = []
    for read in (model, prefill):
        places = set()
        for value in read.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                assert Path(tensor.location) == Path(onnx_write.DATA)
                places.add((tensor.offset, tensor.length))
            else:
                assert tensor.nbytes < onnx_write.INLINE_BYTES
        held.append(places)
    assert held[0] and held[0] == held[1]
    assert data.stat().st_size == sum(length for _, length in held[0])


def test_sizes_have_names_that_people_read(folder: Path) -> None:
    model = ir.load(folder / "model.onnx")
    shapes = {value.name: str(value.shape) for value in model.graph.inputs}
    assert shapes["tokens"] == "[batch,n]"
    assert shapes["site0_keys"] == "[batch,2,capacity,8]"
    assert shapes["site0_index_mean"] == "[batch,2,capacity/8,8]"


def test_no_path_of_this_machine_is_written(folder: Path) -> None:
    for file in folder.glob("*.onnx"):
        assert str(ROOT).encode() not in file.read_bytes()
        assert b"site-packages" not in file.read_bytes()


def test_caches_that_are_bound_are_updated_in_place(folder: Path) -> None:
    contract = read_contract(folder)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    state = {
        t.input: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(t.shape, t.dtype))
        for t in contract.state
    }
    before = {name: value.data_ptr() for name, value in state.items()}
    for step in range(3):
        binding = session.io_binding()
        binding.bind_cpu_input("tokens", np.array([[step]]))
        binding.bind_cpu_input("position", np.array([step], np.int32))
        binding.bind_cpu_input("lengths", np.array([1], np.int32))
        binding.bind_output("logits")
        for tensor in contract.state:
            binding.bind_ortvalue_input(tensor.input, state[tensor.input])
            binding.bind_ortvalue_output(tensor.output, state[tensor.input])
        session.run_with_iobinding(binding)
    assert before == {name: value.data_ptr() for name, value in state.items()}
    filled = np.abs(state["site0_keys"].numpy()).sum((0, 1, 3)) > 0
    assert filled[:3].all() and not filled[3:].any()


# --- exports that must fail ---


class Counter(nn.Module):
    """A state of sums, and what an export may do to it."""

    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, 4, generator=generator))

    def forward(self, tokens: Tensor, position: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        at = position[:, None, None] if self.fault != "folded" else torch.tensor(3)
        new = self.table[tokens] * (at + 1)
        if self.fault == "in place":
            state.add_(new.sum(1, keepdim=True))
            return ((state + new) @ self.table.T,)
        total = state + new.sum(1, keepdim=True)
        if self.fault == "other":
            total = total * 1.5
        logits = (total + new) @ self.table.T
        if self.fault == "lost":
            total = state * 1.0
        if self.fault == "dropped":
            return (logits,)
        return logits, total


CONTRACT = Contract(
    "tokens",
    "position",
    None,
    "logits",
    (StateTensor("site0_state", "site0_state_out", "float32", (1, 1, 4), 0.0, 0, None),),
    None,
    None,
    None,
    None,
    VOCABULARY,
)
FAULTS = {
    "in place": "its outputs are not the contract's: it lacks site0_state_out",
    "dropped": "its outputs are not the contract's: it lacks site0_state_out",
    "lost": "site0_state_out does not follow from tokens, position: it was lost",
    "folded": "logits does not follow from position: it was lost, or taken for a constant",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_export_that_loses_something_fails(fault: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        onnx_portable.write_checked(tmp_path, CONTRACT, {"model.onnx": Counter(fault)})  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_an_export_that_answers_otherwise_fails(tmp_path: Path) -> None:
    graphs: Any = {"model.onnx": Counter()}
    worst = onnx_portable.write_checked(tmp_path, CONTRACT, graphs)
    assert worst is not None and worst < math.sqrt(torch.finfo(torch.float32).eps)
    with pytest.raises(RuntimeError, match=r"logits differs from eager by .* in call 1"):
        onnx_check.check_answers(tmp_path / "model.onnx", Counter("other"), CONTRACT)


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[1].name = "site0_keys_new"


def swap_inputs(model: ir.Model) -> None:
    first, second, *rest = list(model.graph.inputs)
    model.graph.inputs.clear()
    model.graph.inputs.extend([second, first, *rest])


def fix_a_size(model: ir.Model) -> None:
    model.graph.inputs[3].shape = ir.Shape([1, 2, 64, 8])


def other_type(model: ir.Model) -> None:
    model.graph.inputs[1].dtype = ir.DataType.INT64


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename_output, "its outputs are not the contract's: it lacks site0_keys_out"),
        (swap_inputs, "its inputs are not the contract's: it has them in another order"),
        (fix_a_size, r"site0_keys is FLOAT \[1,2,64,8\]; the contract says FLOAT"),
        (other_type, "position is INT64 .*; the contract says INT32"),
    ],
    ids=["output renamed", "inputs swapped", "size fixed", "other type"],
)
def test_an_interface_that_is_not_the_contracts(
    damage: Callable[[ir.Model], None], message: str, folder: Path
) -> None:
    contract = read_contract(folder)
    model = ir.load(folder / "model.onnx")
    onnx_check.check_interface(model, contract)
    damage(model)
    with pytest.raises(RuntimeError, match=message):
        onnx_check.check_interface(model, contract)


def test_a_model_that_onnx_refuses(folder: Path, tmp_path: Path) -> None:
    model = ir.load(folder / "model.onnx")
    next(iter(model.graph)).op_type = "NoSuchOperator"
    ir.save(model, tmp_path / "model.onnx", external_data="data")
    with pytest.raises(RuntimeError, match=r"model\.onnx: ONNX's checker refuses it"):
        onnx_check.check_model(tmp_path / "model.onnx")


def test_bfloat16_is_refused() -> None:
    message = "bfloat16, for which onnxruntime has no kernels on CPUs, where engines are checked"
    with pytest.raises(ValueError, match=message):
        onnx_portable.refuse_bfloat16(CONTRACT, Counter().to(torch.bfloat16))
    onnx_portable.refuse_bfloat16(CONTRACT, Counter().to(torch.float16))


@pytest.mark.long
def test_a_bfloat16_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model is bfloat16"):
        memcompile.export(
            llama(torch.bfloat16), tmp_path / "out", ["onnx"], "dense", kernels="off", check=False
        )
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name)
    )
    with pytest.raises(ImportError, match=r"needs onnx, .* pip install 'memcompile\[onnx\]'"):
        onnx_portable.write_checked(tmp_path, CONTRACT, {})


@pytest.mark.parametrize("opset", [19, 26])
def test_opsets_that_come_out_broken_are_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"opset {opset} cannot be written; known: 20 to 25"):
        onnx_portable.write_checked(tmp_path, CONTRACT, {}, opset=opset)


def test_an_export_that_is_killed_leaves_nothing(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, *rest: Any, **options: Any) -> None:
        (folder / "model.onnx").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_portable, "write_checked", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", compiled, emit=["onnx"])
    assert not list(tmp_path.iterdir())


# --- every policy, every kind of network ---

POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"page_size": 8},
    "window": {"page_size": 8, "sinks": 8, "window": 16},
    "scout": SCOUT,
    "quest": {"page_size": 8, "budget": 40, "dense_layers": 0},
    "hierarchical": {
        "levels": (8, 32, 64),
        "sinks": 8,
        "window": 16,
        "refine": 16,
        "dense_layers": 0,
    },
    "hybrid": {"page_size": 8, "window": 16},
    "heavy-hitter": {"page_size": 8, "budget": 48, "sinks": 8, "window": 8},
}


def network(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    ends = {"bos_token_id": None, "eos_token_id": None}
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=1024, **ends
        )
        return transformers.GPT2LMHeadModel(config).eval().to(dtype)
    if name == "qwen3":
        config = transformers.Qwen3Config(**{**LLAMA, "num_hidden_layers": 2, "head_dim": 12})
        return transformers.Qwen3ForCausalLM(config).eval().to(dtype)
    config = transformers.DeepseekV3Config(
        **{**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 4},
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=2, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval().to(dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["bytes-small", "gpt2", "qwen3", "latent"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_on_every_kind_of_network(
    policy: str, name: str, dtype: str, libraries: Path, tmp_path: Path
) -> None:
    given = {"kernels": "off", "check": False, **POLICIES[policy]}
    if name == "bytes-small":
        made = build(BYTES_SMALL, policy, dtype=dtype, **given)
    else:
        made = build(network(name, getattr(torch, dtype)), policy, **given)
    place = tmp_path / "onnx"
    place.mkdir()
    onnx_portable.emit(place, made, None)
    traces = traces_of(made, 301)
    assert_eager(driven(place, traces, libraries, tmp_path), traces)


@pytest.mark.long
@pytest.mark.parametrize("opset", range(20, 26))
def test_every_opset(opset: int, compiled: Compiled, tmp_path: Path) -> None:
    contract, graphs = onnx_portable.functional_graphs(compiled)
    worst = onnx_portable.write_checked(tmp_path, contract, graphs, opset=opset)
    assert worst is not None
    assert json.loads((tmp_path / "state.json").read_text())["logits"] == "logits"
