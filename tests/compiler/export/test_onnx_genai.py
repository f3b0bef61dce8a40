"""Models for onnxruntime-genai: it generates what the engine does, or the policy is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memcompile.compiler.export import onnx_genai
from memcompile.compiler.export.formats import Artefact
from memcompile.compiler.pipeline import Compiled, build
from memcompile.passes.result import NotRewritten

pytest.importorskip("onnxscript")

CONFIG = {"eos_token_id": 3, "bos_token_id": None, "max_position_embeddings": 100}
ENDS = [71, 33]  # what this model does not come to write
WINDOW = {"sinks": 8, "window": 16, "page_size": 8}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def emitted(folder: Path, source: Path | None, policy: str, **options: Any) -> Any:
    folder.mkdir()
    compiled = build(llama(), policy, kernels="off", check=False, **options)
    return compiled, onnx_genai.emit(folder, compiled, source)


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compiled, Artefact]:
    source = tmp_path_factory.mktemp("source")
    (source / "tokenizer.json").write_text("{}")
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    folder = tmp_path_factory.mktemp("genai") / "onnx-genai"
    compiled, artefact = emitted(folder, source, "window", **WINDOW)
    return folder, compiled, artefact


def generated(folder: Path, tokens: torch.Tensor, **search: Any) -> torch.Tensor:
    """What genai makes of tokens [B, n]."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(tokens), **search)
    generator = og.Generator(model, parameters)
    generator.append_tokens(tokens.to(torch.int32).numpy())
    while not generator.is_done():
        generator.generate_next_token()
    rows = [[*generator.get_sequence(row)] for row in range(len(tokens))]
    return torch.tensor(rows, dtype=torch.int64)


def assert_engines(
    folder: Path, compiled: Compiled, batch: int, eos: list[int] | None, **search: Any
) -> None:
    tokens = torch.randint(95, (batch, 37), generator=torch.Generator().manual_seed(batch))
    expected = compiled.engine().generate(tokens, 59, eos=eos, read_prompt="policy")
    got = generated(folder, tokens, max_length=96, **search)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_genai_generates_what_the_engine_does(
    window: tuple[Path, Compiled, Artefact], batch: int
) -> None:
    assert_engines(window[0], window[1], batch, ENDS)


def test_what_genai_is_told(window: tuple[Path, Compiled, Artefact]) -> None:
    folder, _, artefact = window
    config = json.loads((folder / "genai_config.json").read_text())
    model, decoder = config["model"], config["model"]["decoder"]
    assert (model["vocab_size"], model["context_length"]) == (97, 100)
    assert (model["eos_token_id"], model["pad_token_id"]) == (ENDS, ENDS[0])
    assert "bos_token_id" not in model
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (4, 2)
    assert (decoder["num_hidden_layers"], decoder["head_size"], decoder["hidden_size"]) == (
        2,
        8,
        32,
    )
    assert config["search"] == {
        "max_length": 96,  # whole pages
        "do_sample": False,
        "past_present_share_buffer": True,
    }
    assert (folder / "tokenizer.json").is_file()
    told = " ".join(artefact.notes)
    assert "max_length has to be a multiple of 8" in told and "no tokenizer" not in told


def test_the_names_are_genais(window: tuple[Path, Compiled, Artefact]) -> None:
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(window[0] / "model.onnx", load_external_data=False).graph
    names = [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask", *names]
    made = [name.replace("past_key_values", "present") for name in names]
    assert [value.name for value in graph.output] == ["logits", *made]


@pytest.mark.long
def test_dense_layers_with_and_without_one_buffer(tmp_path: Path) -> None:
    folder = tmp_path / "onnx-genai"
    compiled, artefact = emitted(folder, None, "dense")
    assert "no tokenizer lay beside the model" in " ".join(artefact.notes)
    for shared in (True, False):
        assert_engines(folder, compiled, 1, None, past_present_share_buffer=shared)


@pytest.mark.parametrize(
    ("policy", "options", "told"),
    [
        ("scout", {"dense_layers": 0}, "'scout' keeps an index of its pages"),
        ("quest", {"dense_layers": 0}, "'quest' keeps an index of its pages"),
        ("hierarchical", {"dense_layers": 0}, "'hierarchical' keeps an index of its pages"),
        ("heavy-hitter", {"dense_layers": 0}, "'heavy-hitter' keeps an account of its pages"),
        ("hybrid", {}, "keeps a state beside a window of keys and values"),
    ],
)
def test_what_genai_has_no_place_for_is_refused(
    policy: str, options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(NotRewritten, match="keeps keys and values alone") as refused:
        emitted(tmp_path / "onnx-genai", None, policy, **options)
    assert told in str(refused.value) and "memcompile run --runtime onnxruntime" in str(
        refused.value
    )
    assert not any((tmp_path / "onnx-genai").iterdir())
