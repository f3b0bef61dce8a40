"""`memcompile run --runtime onnxruntime`: the engine's own text, in place, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.compiler import package
from memcompile.compiler.export.onnx_session import open_session
from memcompile.compiler.pipeline import Compiled, build
from memcompile.models.networks.decoders.frame import PositionedDecoder
from memcompile.runtime.generate import stream

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SCOUT = {"page_size": 8, "budget": 32, "sinks": 8, "window": 8, "dense_layers": 0}
PROMPT = "3 1 4 1 5 9 2 6 5 3 5 8 9 7 9"
RUN = ("--ids", "--prompt", PROMPT, "--max-new-tokens", 60)
ONNX = ("--runtime", "onnxruntime")


class Longer(PositionedDecoder):
    context, key_dim, value_dim = 128, 8, 8


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return build(Longer(0), "scout", kernels="off", check=False, **SCOUT)


@pytest.fixture(scope="module")
def folder(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("written") / "engine"
    return package.write(place, compiled, emit=["onnx-ort"])


@pytest.fixture
def write(say: Any, folder: Path) -> Any:
    """What the JSON says after a run."""

    def run(*arguments: object) -> Any:
        said = say("run", folder, *RUN, "--json", *arguments)
        assert (said.code, said.err) == (0, ""), said.err
        return json.loads(said.out)

    return run


@pytest.mark.parametrize(
    "how",
    [(), ("--read", "dense"), ("--temperature", 1.2, "--top-k", 9, "--seed", 3), ("--eos", 7)],
    ids=["greedy", "dense", "drawn", "eos"],
)
def test_it_writes_what_the_engine_writes(write: Any, how: tuple[object, ...]) -> None:
    ours, theirs = write("--kernels", "off", *how), write(*ONNX, *how)
    assert theirs["ids"] == ours["ids"]
    assert theirs["ended"] == ours["ended"]
    assert theirs["bytes_read"] is theirs["pages_read"] is None, "nothing counts them"


def test_the_figures_say_what_is_known(say: Any, folder: Path) -> None:
    said = say("run", folder, *RUN, *ONNX)
    assert said.code == 0 and len(said.out.split()) == 60
    assert "15 tokens read" in said.err and "tokens/s" in said.err and "pages" not in said.err


def test_rows_of_a_batch_in_little_room(folder: Path, compiled: Compiled) -> None:
    """The caches grow while three rows of unlike lengths are read and written."""
    tokens, lengths = torch.randint(29, (3, 21)), [21, 4, 13]
    session, engine = open_session(folder), compiled.engine()
    made = [
        torch.stack([*stream(runner, tokens, 50, lengths=lengths)]) for runner in (session, engine)
    ]
    assert torch.equal(*made)
    assert session.position == engine.position == [70, 53, 62]


def test_what_a_session_refuses(folder: Path) -> None:
    session = open_session(folder)
    with pytest.raises(ValueError, match="token 29 is not in the vocabulary of 29"):
        session(torch.tensor([[29]]))
    with pytest.raises(ValueError, match="129 tokens exceed the context of 128"):
        session.prefill(torch.zeros(1, 129, dtype=torch.int64))
    session(torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match="remembers 1 rows, got 2"):
        session(torch.ones(2, 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*ONNX, "--kernels", "off"), "--kernels: are our engine's"),
        (("--runtime", "onnxruntim"), "Did you mean 'onnxruntime'?"),
        ((*ONNX, "--ids", "--prompt", "1", "--max-new-tokens", 200), "exceed the context of 128"),
    ],
)
def test_wrong_lines_are_told(
    say: Any, folder: Path, arguments: tuple[object, ...], told: str
) -> None:
    said = say("run", folder, "--ids", "--prompt", "1 2", *arguments)
    assert said.code == 2 and told in said.err and len(said.err.splitlines()) == 1


def test_a_folder_without_such_an_engine(say: Any, compiled: Compiled, tmp_path: Path) -> None:
    place = package.write(tmp_path / "plain", compiled)
    said = say("run", place, "--ids", "--prompt", "1", *ONNX)
    assert said.code == 2
    assert "no ONNX engine for the CPU in it (it holds no engine in any format)" in said.err
    assert "--emit onnx-ort" in said.err


def test_onnxruntime_is_named_where_it_is_not_installed(
    say: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    said = say("run", folder, "--ids", "--prompt", "1", *ONNX)
    assert said.code == 2 and "pip install 'memcompile[onnx]'" in said.err


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("onnx-ort/model.onnx", lambda data: data[:-9], "cut off or changed"),
        ("onnx-ort/state.json", lambda data: data[:-1] + b"!", "not the file that was written"),
        ("onnx-ort/prefill.onnx", None, "missing"),
    ],
)
def test_damaged_files_are_told(say: Any, folder: Path, file: str, change: Any, told: str) -> None:
    path = folder / file
    data = path.read_bytes()
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(data))
    try:
        said = say("run", folder, "--ids", "--prompt", "1", *ONNX)
    finally:
        path.write_bytes(data)
    assert said.code == 2 and told in said.err and len(said.err.splitlines()) == 1


def test_a_model_that_does_not_keep_to_its_contract(folder: Path, tmp_path: Path) -> None:
    from memcompile.compiler.export.onnx_session import session_of

    (tmp_path / "model.onnx").write_bytes(b"no model")
    state = json.loads((folder / "onnx-ort" / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="cannot load it"):
        session_of(tmp_path)
    for file in (folder / "onnx-ort").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state["logits"] = "other"
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"its outputs are not those of state\.json"):
        session_of(tmp_path)
