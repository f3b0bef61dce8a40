"""`--emit triton-server`: what config.pbtxt says is done, and gives the engine's logits."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from google.protobuf import text_format
from tolerance import assert_close_to_float64
from torch import Tensor
from triton_case import Model, own_schema, read_config, serve

import memcompile
from memcompile.compiler.export import triton_server
from memcompile.compiler.export.contract import Contract, read_contract
from memcompile.compiler.export.onnx_served import DECODE_TOKENS
from memcompile.compiler.export.triton_config import config, new_name
from memcompile.compiler.export.verify import verify
from memcompile.models.networks.decoders.styles import NanoGpt
from memcompile.runtime.engine import Engine

VOCABULARY, CONTEXT, PROMPT = 61, 256, 70
SCOUT = {"policy": "scout", "budget": 32, "page_size": 8, "sinks": 8, "window": 8}


class Nano(NanoGpt):
    """A forward without positions."""

    vocabulary = VOCABULARY
    context = CONTEXT


MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2},
            **{"n_positions": CONTEXT, "initializer_range": 0.3},
        )
    ),
}
MODELS["nano"] = lambda: Nano(3)
PATH = Path("triton-server/model_repository/model")


def exported(folder: Path, name: str, policy: str, **options: Any) -> tuple[Path, Any]:
    """A folder with a served model, and what engines of it are made of."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    given: dict[str, Any] = {"kernels": "off", "max_context": CONTEXT, **options}
    out = memcompile.export(model, folder / "out", ["triton-server"], policy, **given)
    return out, (model, policy, given)


def engine_of(made: Any, dtype: torch.dtype = torch.float32) -> Engine:
    model, policy, given = made
    return memcompile.compile(model.to(dtype), policy, check=False, **given)


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    options = {key: value for key, value in SCOUT.items() if key != "policy"}
    folder = tmp_path_factory.mktemp("scout")
    return exported(folder, "llama", "scout", dense_layers=0, **options)


@pytest.fixture
def served(scout: tuple[Path, Any]) -> Iterator[tuple[str, dict[str, Model]]]:
    server, models = serve(scout[0] / PATH.parent)
    yield f"http://127.0.0.1:{server.server_port}", models
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def engine(scout: tuple[Path, Any]) -> Engine:
    return engine_of(scout[1])


def client() -> dict[str, Any]:
    return runpy.run_path(str(Path(memcompile.__file__).parent / "examples/serving/client.py"))


def tokens_of(length: int = 90) -> Tensor:
    drawn = torch.Generator().manual_seed(3)
    return torch.randint(VOCABULARY, (1, length), generator=drawn)


def read_by_engine(engine: Engine, tokens: Tensor, dense: bool = True) -> Tensor:
    """Logits [T - PROMPT, V] behind a prompt, one token a call."""
    prompt = tokens[:, :PROMPT]
    logits = [engine.prefill(prompt) if dense else engine(prompt)[:, -1:]]
    logits += [engine(tokens[:, at : at + 1]) for at in range(PROMPT, tokens.shape[1])]
    return torch.cat(logits, 1)[0]


def test_a_client_is_given_the_engines_logits(
    scout: tuple[Path, Any], engine: Engine, served: tuple[str, dict[str, Model]]
) -> None:
    url, models = served
    sequence = client()["Sequence"](url, "model", 7)
    tokens = tokens_of()
    (ids,) = tokens.tolist()
    made = [sequence.feed(ids[:PROMPT])]
    made += [sequence.feed([token]) for token in ids[PROMPT:]]
    assert list(models["model"].held) == [7]
    sequence.feed([1], end=True)
    assert not models["model"].held
    engine.reset()
    plain = read_by_engine(engine, tokens)
    model, *how = scout[1]
    exact = read_by_engine(engine_of((copy.deepcopy(model), *how), torch.float64), tokens)
    ours = torch.from_numpy(np.stack(made))
    assert_close_to_float64(ours, plain, exact, reduction=90 * 4)


def test_the_example_streams_what_the_engine_generates(
    engine: Engine,
    served: tuple[str, dict[str, Model]],
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    prompt = tokens_of(40)
    engine.reset()
    expected = engine.generate(prompt, 12)[0, 40:].tolist()
    ids = ",".join(map(str, prompt[0].tolist()))
    asked = ["--url", served[0], "--model", "model", "--max-new-tokens", "12"]
    main = client()["main"]
    main([*asked, "--ids", ids])
    said = [int(token) for token in capfdbinary.readouterr().out.split()]
    assert said == expected
    main([*asked, "--ids", ids, "--temperature", "2", "--seed", "3"])
    drawn = capfdbinary.readouterr().out
    main([*asked, "--ids", ids, "--temperature", "2", "--seed", "3"])
    assert capfdbinary.readouterr().out == drawn
    main([*asked, "--prompt", "\x01\x02"])
    assert len(capfdbinary.readouterr().out) == 13  # bytes, and the end of the line
    assert not served[1]["model"].held


def test_sequences_take_turns_and_are_read_together(served: tuple[str, Any]) -> None:
    """Each by itself, and two at once at positions of their own: the same logits."""
    model: Model = served[1]["model"]
    tokens = tokens_of(40).numpy()
    parts = {1: [tokens[:, :20], tokens[:, 20:21]], 2: [tokens[:, 5:36], tokens[:, 36:37]]}
    alone = {}
    for sequence, (prompt, last) in parts.items():
        model.start(sequence)
        model.run([(sequence, prompt)])
        alone[sequence] = model.run([(sequence, last)])[0]["logits"]
    for sequence, (prompt, _) in parts.items():
        model.start(sequence)
        model.run([(sequence, prompt)])
    both = model.run([(sequence, last) for sequence, (_, last) in parts.items()])
    for got, expected in zip(both, alone.values(), strict=True):
        eager = torch.from_numpy(expected)
        assert_close_to_float64(torch.from_numpy(got["logits"]), eager, eager.double())
    assert model.most == triton_server.BATCH
    assert [int(model.held[s]["position"][0, 0]) for s in parts] == [21, 32]


def test_more_than_there_is_room_for_is_an_error_and_changes_nothing(
    served: tuple[str, Any],
) -> None:
    model: Model = served[1]["model"]
    model.start(1)
    model.run([(1, np.ones((1, CONTEXT - 1), np.int64))])
    before = {name: value.copy() for name, value in model.held[1].items()}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        model.run([(1, np.ones((1, 2), np.int64))])
    assert all(np.array_equal(model.held[1][name], value) for name, value in before.items())
    model.run([(1, np.ones((1, 1), np.int64))])
    assert int(model.held[1]["position"][0, 0]) == CONTEXT


def test_what_the_server_says_reaches_the_reader(served: tuple[str, Any]) -> None:
    made = client()
    with pytest.raises(RuntimeError, match=r"404.*unknown model"):
        made["Sequence"](served[0], "other", 1)
    sequence = made["Sequence"](served[0], "model", 1)
    with pytest.raises(ValueError, match="no tokens to feed"):
        sequence.feed([])
    with pytest.raises(ValueError, match=f"300 tokens; this model holds {CONTEXT}"):
        sequence.feed([1] * 300)
    sequence.held = 5  # it was let go meanwhile
    with pytest.raises(RuntimeError, match=r"400: .*sequence 1 is not known"):
        sequence.feed([1])


def test_the_client_splits_what_a_call_may_not_hold(served: tuple[str, Any]) -> None:
    sequence = client()["Sequence"](served[0], "model", 1)
    calls: list[tuple[int, bool]] = []

    def call(tokens: list[int], end: bool) -> np.ndarray:
        calls.append((len(tokens), end))
        return np.zeros(1)

    sequence._call, sequence.longest, sequence.piece, sequence.held = call, 20, 16, 10
    sequence.feed([1] * 60, end=True)
    assert calls == [(6, False), (16, False), (16, False), (16, False), (6, True)]
    sequence.piece = None
    calls.clear()
    sequence.feed([1] * 45)
    assert calls == [(20, False), (20, False), (5, False)]


def test_the_repository_is_what_the_server_looks_for(scout: tuple[Path, Any]) -> None:
    folder = scout[0] / PATH
    assert sorted(path.name for path in folder.rglob("*")) == [
        *("1", "config.pbtxt", "model.onnx", "model.onnx.data")
    ]
    # One file of weights, for both branches.
    weights = sum(p.numel() * 4 for p in scout[1][0].parameters())
    assert (folder / "1/model.onnx.data").stat().st_size < 1.5 * weights
    read = read_config(folder / "config.pbtxt")
    assert read["sequence_batching"]["oldest"]["max_candidate_sequences"] == 64
    contract = read_contract(scout[0] / "triton-server")
    assert contract.longest_call == DECODE_TOKENS and contract.lengths is None
    states = read["sequence_batching"]["state"]
    assert [s["input_name"] for s in states] == ["position", *(t.input for t in contract.state)]
    given = {key: int(v["string_value"]) for key, v in read["parameters"].items()}
    assert given == {
        "memcompile_context": CONTEXT,
        "memcompile_capacity": CONTEXT,
        "memcompile_vocabulary": VOCABULARY,
    }


def test_verify_runs_the_served_model(scout: tuple[Path, Any]) -> None:
    (verdict,) = verify(scout[0], prompt=50, steps=4)
    assert (verdict.format, verdict.outcome) == ("triton-server", "equal"), verdict.reason


def test_states_keep_their_pairs_whatever_their_names(scout: tuple[Path, Any]) -> None:
    """The server pairs them by the order of their names, where a suffix would not do."""
    names = ["site0_mean_8", "site0_mean_80", "site0_mean_800", "site1_mean_8", "site10_mean_8"]
    assert [new_name(n) for n in sorted(names)] == sorted(map(new_name, names))
    assert [f"{n}_out" for n in sorted(names)] != sorted(f"{n}_out" for n in names)


def test_a_config_is_parsed_strictly(scout: tuple[Path, Any], tmp_path: Path) -> None:
    text = (scout[0] / PATH / "config.pbtxt").read_text()
    place = tmp_path / "config.pbtxt"
    for old, new in (("max_batch_size", "max_batches"), ("TYPE_INT64", "INT64")):
        place.write_text(text.replace(old, new))
        with pytest.raises(text_format.ParseError):
            read_config(place, own_schema())
    place.write_text(text)
    read_config(place, own_schema())


def with_state(contract: Contract, **values: Any) -> Contract:
    first, *rest = contract.state
    return replace(contract, state=(replace(first, **values), *rest))


@pytest.mark.parametrize("values", [{"init": 1.0}, {"batch_axis": 1}])
def test_a_state_the_server_cannot_make_is_refused(
    scout: tuple[Path, Any], values: dict[str, Any]
) -> None:
    contract = with_state(read_contract(scout[0] / "triton-server"), **values)
    with pytest.raises(ValueError, match=r"site0_keys begins at .* state is made of zeros"):
        config("model", contract, "float32", [None, VOCABULARY], 1)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (None, "model"),
        (Path("some/folder.of.it"), "folder.of"),
        (Path("a model's (2)"), "a-model-s-2"),
        (Path("..."), "model"),
    ],
)
def test_names_of_models_fit_a_url(source: Path | None, name: str) -> None:
    assert triton_server.model_name(source) == name


def test_a_lost_state_fails_the_export(
    scout: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = read_contract(scout[0] / "triton-server")
    call = triton_server.served_call(scout[0] / PATH / "1/model.onnx", contract)
    given = {
        contract.tokens: torch.ones(1, 2, dtype=torch.int64),
        contract.position: torch.zeros(1, dtype=torch.int32),
        **{t.input: torch.zeros(t.shape, dtype=t.torch_dtype) for t in contract.state},
    }
    assert call(given)[contract.logits].shape == (1, 2, VOCABULARY)
    moved = {**given, contract.position: torch.full((1,), 3, dtype=torch.int32)}
    monkeypatch.setattr(triton_server.torch, "equal", lambda a, b: False)
    with pytest.raises(RuntimeError, match="position does not go on by the tokens it is fed"):
        call(moved)
    answers = iter([True, False])
    monkeypatch.setattr(triton_server.torch, "equal", lambda a, b: next(answers))
    with pytest.raises(RuntimeError, match="last_logits are not those of the last token"):
        call(moved)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "policy", "options"),
    [
        ("gpt2", "dense", {"page_size": 8}),
        ("nano", "scout", {key: SCOUT[key] for key in ("budget", "page_size", "sinks", "window")}),
        ("llama", "window", {"sinks": 8, "window": 16, "page_size": 8}),
        ("llama", "hierarchical", {"levels": (8, 16), "refine": 16, "sinks": 8, "window": 8}),
        ("llama", "hybrid", {"window": 16, "page_size": 8}),
        ("llama", "quest", {"budget": 32, "page_size": 8}),
        ("llama", "heavy-hitter", {"page_size": 8}),
    ],
)
def test_every_memory_is_served(
    name: str, policy: str, options: dict[str, Any], tmp_path: Path
) -> None:
    out, made = exported(tmp_path, name, policy, **options)
    server, models = serve(out / PATH.parent)
    url = f"http://127.0.0.1:{server.server_port}"
    sequence = client()["Sequence"](url, "model", 1)
    tokens = tokens_of()
    (ids,) = tokens.tolist()
    got = [sequence.feed(ids[:PROMPT])]
    got += [sequence.feed([token]) for token in ids[PROMPT:]]
    server.shutdown()
    server.server_close()
    # What lets go of pages has no dense branch: its prompt is read as all else.
    dense = policy not in ("window", "heavy-hitter")
    plain, exact = (
        read_by_engine(engine_of(made, dtype), tokens, dense)
        for dtype in (torch.float32, torch.float64)
    )
    assert_close_to_float64(torch.from_numpy(np.stack(got)), plain, exact, reduction=90 * 8)
    # Hand-written forwards take no positions: their rows share one.
    assert models["model"].most == (1 if name == "nano" else triton_server.BATCH)
    (verdict,) = verify(out, prompt=60, steps=4)
    assert verdict.outcome == "equal", verdict.reason
