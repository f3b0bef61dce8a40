"""The flavour for onnxruntime's CUDA provider, whose operator is stood in for by its schema."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from memcompile.compiler.export import onnx_check, onnx_ort, onnx_ort_cuda, onnx_session
from memcompile.compiler.export.contract import read_contract
from memcompile.compiler.export.driver import Driver
from memcompile.compiler.export.formats import Artefact
from memcompile.compiler.export.onnx_portable import functional_graphs
from memcompile.compiler.export.runners import CannotRun, prefill_runner, runner
from memcompile.compiler.export.verify import trace
from memcompile.compiler.pipeline import Compiled, build
from memcompile.passes.fuse_listed import fuse_listed
from memcompile.passes.result import NotRewritten

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SCOUT: dict[str, Any] = {
    "budget": 48, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 1, "compensate": False,
}  # fmt: skip


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, **options}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()


def emitted(folder: Path, model: torch.nn.Module, **options: Any) -> tuple[Compiled, Artefact]:
    folder.mkdir()
    compiled = build(model, "scout", kernels="off", check=False, **{**SCOUT, **options})
    return compiled, onnx_ort_cuda.emit(folder, compiled, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compiled, Artefact]:
    folder = tmp_path_factory.mktemp("onnx") / "onnx-ort-cuda"
    return folder, *emitted(folder, llama())


def nodes(path: Path) -> list[str]:
    import onnx

    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def driver(folder: Path, batch: int) -> Driver:
    from sparse_case import stand_in

    contract, model = read_contract(folder), stand_in(folder / "model.onnx")

    def call(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = model.run(contract.outputs, {name: x.numpy() for name, x in given.items()})
        return {n: torch.from_numpy(x) for n, x in zip(contract.outputs, values, strict=True)}

    return Driver(contract, call, batch)


def test_what_is_written(made: tuple[Path, Compiled, Artefact]) -> None:
    folder, _, artefact = made
    kinds = nodes(folder / "model.onnx")
    assert kinds.count("DynamicSparseAttention") == kinds.count("GroupQueryAttention") == 1
    assert "MemcAttend" not in kinds
    assert nodes(folder / "prefill.onnx").count("GroupQueryAttention") == 2
    told = " ".join(artefact.notes)
    assert "model.onnx: 1 reads by DynamicSparseAttention" in told
    assert "needs the CUDA provider" in told and "model.onnx was not run" in told
    assert "stays a portable node" not in told


def test_reads_are_the_engines(made: tuple[Path, Compiled, Artefact]) -> None:
    """In chunks of any size, one sequence and three, then ragged; by pages left out."""
    folder, compiled, _ = made
    assert compiled.program is not None
    for batch in (1, 3):
        eager, ours = trace(compiled.program, batch, 160, 8), driver(folder, batch)
        for tokens, expected in zip(eager.tokens, eager.logits, strict=True):
            assert float((ours(tokens) - expected).abs().max()) <= eager.allowed
    ours, engine = driver(folder, 3), compiled.engine()
    for n, lengths in ((90, [90, 70, 1]), (20, [20, 1, 5]), (1, [0, 1, 1])):
        tokens = torch.randint(97, (3, n))
        got, expected = ours(tokens, lengths), engine(tokens, lengths)
        rows = torch.arange(n) < torch.tensor(lengths)[:, None]
        assert float((got - expected)[rows].abs().max()) <= eager.allowed


@pytest.mark.long
@pytest.mark.parametrize(("kv_heads", "dtype"), [(1, torch.float32), (4, torch.float16)])
def test_other_groups(kv_heads: int, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tmp_path / "onnx-ort-cuda"
    model = llama(num_key_value_heads=kv_heads, num_hidden_layers=1).to(dtype)
    compiled, _ = emitted(folder, model, dense_layers=0)
    assert compiled.program is not None
    eager, ours = trace(compiled.program, 2, 100, 4), driver(folder, 2)
    for tokens, expected in zip(eager.tokens, eager.logits, strict=True):
        assert float((ours(tokens) - expected).abs().max()) <= eager.allowed


@pytest.mark.parametrize(
    ("policy", "options", "told"),
    [
        (
            "scout",
            {**SCOUT, "compensate": True, "dense_layers": 0},
            r"by their summaries \(compensate=False does not",
        ),
        ("dense", {}, "no read for DynamicSparseAttention; export onnx-ort"),
    ],
    ids=["compensating", "dense"],
)
def test_a_policy_without_such_a_read_is_refused(
    policy: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    compiled = build(llama(num_hidden_layers=1), policy, kernels="off", check=False, **options)
    with pytest.raises(NotRewritten, match=told):
        onnx_ort_cuda.emit(tmp_path, compiled, None)
    assert not list(tmp_path.iterdir())


def test_a_model_that_onnxruntime_does_not_know_is_refused(
    made: tuple[Path, Compiled, Artefact], tmp_path: Path
) -> None:
    """Only the missing kernel is forgiven; an attribute that its schema lacks is not."""
    import onnx

    onnx_check.check_resolves(made[0] / "model.onnx", "DynamicSparseAttention")
    model = onnx.load(made[0] / "model.onnx")
    node = next(n for n in model.graph.node if n.op_type == "DynamicSparseAttention")
    node.attribute.append(onnx.helper.make_attribute("budget", 3))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(RuntimeError, match="INVALID_GRAPH"):
        onnx_check.check_resolves(tmp_path / "model.onnx", "DynamicSparseAttention")
    with pytest.raises(RuntimeError, match="NOT_IMPLEMENTED"):
        onnx_check.check_resolves(made[0] / "model.onnx", "Another")


def test_without_a_gpu_it_does_not_run(
    made: tuple[Path, Compiled, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel may have the provider where no GPU is: sessions then fall back without a word."""
    import onnxruntime

    folder, _, artefact = made
    real = onnxruntime.InferenceSession

    def falls_back(model: Any, options: Any, providers: Any) -> Any:
        return real(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    for listed in ([], ["CUDAExecutionProvider"]):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda listed=listed: listed)
        with pytest.raises(CannotRun, match="it needs a GPU and onnxruntime with its CUDA"):
            runner(folder, artefact, read_contract(folder))


def test_where_a_gpu_is_both_models_run_on_it(
    made: tuple[Path, Compiled, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, artefact = made
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(onnx_session, "has_cuda", lambda: True)
    monkeypatch.setattr(
        onnx_session, "load_model", lambda path, cuda=False: asked.append((path.name, cuda))
    )
    runner(folder, artefact, read_contract(folder))
    prefill_runner(folder, artefact, read_contract(folder), {})
    assert asked == [("model.onnx", True), ("prefill.onnx", True)]


def test_what_is_declined_keeps_its_reason() -> None:
    """Not the other fusion's, which has nothing to do with pages that are chosen."""
    compiled = build(llama(), "scout", kernels="off", check=False, **{**SCOUT, "dense_layers": 0})
    _, graphs = functional_graphs(compiled)
    assert compiled.program is not None
    chosen = fuse_listed(graphs["model.onnx"], {"site1_keys": "its keys are wider"})
    notes, _ = onnx_ort.fuse(graphs, compiled.program.layouts, chosen.declined)
    assert "model.onnx: a read stays a portable node: its keys are wider" in notes
    assert not [note for note in notes if "pages that it chooses" in note]
