"""The flavour with onnxruntime's own operators: what they cover, and that they give the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from memcompile.compiler.export import onnx_ort
from memcompile.compiler.export.formats import Artefact
from memcompile.compiler.export.onnx_portable import functional_graphs
from memcompile.compiler.export.onnx_session import session_of
from memcompile.compiler.export.verify import trace
from memcompile.compiler.pipeline import Compiled, build
from memcompile.models.memory.spec import Memory, Pages
from memcompile.runtime.site_layout import SiteLayout

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
STATE = {"window": 16, "page_size": 8}
SCOUT = {"budget": 48, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 1}
CALLS = ((7, [7, 3, 5]), (1, None), (90, None), (1, [0, 1, 1]), (20, [20, 1, 5]), (1, None))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)).eval()


def gpt2(**options: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
    sizes |= options
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def emitted(
    folder: Path, model: torch.nn.Module, policy: str, **options: Any
) -> tuple[Compiled, Artefact]:
    folder.mkdir()
    compiled = build(model, policy, kernels="off", check=False, **options)
    return compiled, onnx_ort.emit(folder, compiled, None)


def nodes(folder: Path, model: str = "model.onnx") -> list[str]:
    import onnx

    return [n.op_type for n in onnx.load(folder / model, load_external_data=False).graph.node]


def follow(folder: Path, compiled: Compiled) -> None:
    """In place, by chunks of any size, one sequence and three, then ragged."""
    assert compiled.program is not None
    for batch in (1, 3):
        eager, session = trace(compiled.program, batch, None, 16), session_of(folder)
        for tokens, expected in zip(eager.tokens, eager.logits, strict=True):
            got = session(tokens)
            assert got.dtype == expected.dtype
            assert float((got.double() - expected.double()).abs().max()) <= eager.allowed
    session, engine = session_of(folder), compiled.engine()
    for n, lengths in CALLS if session.ragged else ():
        tokens = torch.randint(97, (3, n))
        got, expected = session(tokens, lengths).double(), engine(tokens, lengths).double()
        rows = torch.arange(n) < torch.tensor(lengths or [n] * 3)[:, None]
        assert float((got - expected)[rows].abs().max()) <= eager.allowed
    assert session.position == engine.position


@pytest.mark.long
def test_a_delta_rule_and_a_dense_layer(tmp_path: Path) -> None:
    options = {**STATE, "write": "delta", "decay": "gate"}
    compiled, artefact = emitted(tmp_path / "onnx-ort", llama(), "hybrid", **options)
    kinds = nodes(tmp_path / "onnx-ort")
    assert kinds.count("GroupQueryAttention") == kinds.count("LinearAttention") == 1
    assert not (tmp_path / "onnx-ort" / "prefill.onnx").exists(), "the one model does for both"
    told = " ".join(artefact.notes)
    assert "1 reads by GroupQueryAttention" in told
    assert "its log-sum-exp is needed" in told
    follow(tmp_path / "onnx-ort", compiled)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "policy", "options", "grouped", "linear"),
    [
        (llama, "dense", {}, 2, 0),
        (mistral, "dense", {"page_size": 8}, 2, 0),
        (gpt2, "dense", {}, 2, 0),
        (llama, "scout", SCOUT, 1, 0),
        (llama, "window", {"sinks": 8, "window": 16, "page_size": 8}, 0, 0),
        (llama, "hybrid", STATE, 1, 1),
        (llama, "hybrid", {**STATE, "decay": "gate"}, 1, 1),
        (llama, "hybrid", {**STATE, "decay": "constant", "feature_map": "identity"}, 1, 1),
        (llama, "hybrid", {**STATE, "write": "delta", "decay": "none"}, 1, 1),
    ],
    ids=lambda x: x.__name__ if callable(x) else str(x) if isinstance(x, str) else "",
)
def test_every_layer_is_the_engines(
    model: Callable[[], torch.nn.Module],
    policy: str,
    options: dict[str, Any],
    grouped: int,
    linear: int,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "onnx-ort"
    compiled, _ = emitted(folder, model(), policy, **options)
    kinds = nodes(folder)
    assert kinds.count("GroupQueryAttention") == grouped
    assert kinds.count("LinearAttention") == linear
    if policy == "scout":
        dense = nodes(folder, "prefill.onnx")
        assert dense.count("GroupQueryAttention") == 2 and dense.count("MemcPageRecords") == 1
    follow(folder, compiled)


@pytest.mark.long
def test_in_sixteen_bits(tmp_path: Path) -> None:
    half = llama().half()
    emitted(tmp_path / "onnx-ort", half, "dense")
    tokens = torch.randint(97, (3, 230))
    with torch.no_grad():
        eager = half(tokens, use_cache=False).logits
        exact = half.double()(tokens, use_cache=False).logits
    session = session_of(tmp_path / "onnx-ort")
    got = torch.cat([session(piece) for piece in tokens.split([90, 1, 37, 1, 1, 100], 1)], 1)
    assert got.dtype == torch.float16
    assert_close_to_float64(got, eager, exact, reduction=230)


def test_a_cache_in_an_order_of_its_own_is_so_in_both_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = build(llama(), "dense", kernels="off", check=False)
    _, graphs = functional_graphs(compiled)
    orders = iter([{"site0_keys"}, set()])
    monkeypatch.setattr(onnx_ort, "_own_order", lambda graph: next(orders))
    graphs["prefill.onnx"] = graphs["model.onnx"]
    assert compiled.program is not None
    with pytest.raises(RuntimeError, match="in its own order in one model alone"):
        onnx_ort.fuse(graphs, compiled.program.layouts)


def test_what_the_operator_cannot_take_is_said() -> None:
    layout = SiteLayout("site", 2, 8, 16, torch.float32, Memory("dense", Pages(8)))
    assert "keys of 8 and values of 16" in onnx_ort._why_not(layout)
    assert "no kernel for torch.bfloat16" in onnx_ort._why_not(
        replace(layout, value_dim=8, dtype=torch.bfloat16)
    )
    assert onnx_ort._why_not(replace(layout, value_dim=8)) == ""


def test_a_width_that_the_operator_cannot_take_is_said() -> None:
    compiled = build(gpt2(n_embd=24), "dense", kernels="off", check=False)
    _, graphs = functional_graphs(compiled)
    assert compiled.program is not None
    notes, _ = onnx_ort.fuse(graphs, compiled.program.layouts)
    assert notes == [
        "model.onnx: 0 reads by GroupQueryAttention",
        "model.onnx: a read stays a portable node: GroupQueryAttention takes widths that are "
        "multiples of 8, not 12",
    ]
