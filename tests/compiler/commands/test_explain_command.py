"""`memcompile explain`: the report, a script and a drawing, or why there is none."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_payloads import Decoder, exported

from memcompile.compiler.load import load


class Shifted(Decoder):
    """Every token looks at the one before it."""

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids.roll(1, 1), position_ids)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.export.save(exported(), folder / "good.pt2")
    torch.export.save(exported(Shifted().eval()), folder / "shifted.pt2")
    return folder


def test_what_was_declined_is_told_written_and_drawn(say: Any, models: Path) -> None:
    said = say("explain", models / "shifted.pt2", "--repro", "r.py", "--dump-graph", "g.svg")
    assert said.code == 3 and said.err == ""
    assert "derive_step" in said.out and "r.py: " in said.out and "g.svg: " in said.out
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["g.svg", "r.py"]
    assert runpy.run_path("r.py")["main"]() == 0
    assert Path("g.svg").read_text().startswith("<svg")


def test_a_model_without_declines_is_told_of(say: Any, models: Path) -> None:
    said = say("explain", models / "good.pt2", "--check", "--json", "--policy", "scout:budget=512")
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert report["policy"] == "scout" and report["self_check"] and not report["declined"]
    assert say("explain", models / "good.pt2", "--quiet").out == ""
    assert not [*Path.cwd().iterdir()]


def test_the_first_attention_is_cut_where_nothing_was_declined(say: Any, models: Path) -> None:
    assert say("explain", models / "good.pt2", "--repro", "r.py", "--quiet").code == 0
    assert "torch.ops.memcompile.attention" in Path("r.py").read_text()


def test_files_are_kept_unless_told(say: Any, models: Path) -> None:
    Path("r.py").write_text("mine")
    said = say("explain", models / "good.pt2", "--repro", "r.py")
    assert said.code == 2 and "--force" in said.err and Path("r.py").read_text() == "mine"
    assert say("explain", models / "good.pt2", "--repro", "r.py", "--force", "--quiet").code == 0
    assert Path("r.py").read_text() != "mine"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--site", "x"], "give one of them"),
        (["--site", "x", "--repro", "r.py"], "no attention is called 'x'"),
        (["--repro", "x", "--dump-graph", "x"], "both name x"),
        (["--repro", "nowhere/x"], "its folder does not exist"),
        (["--dump-graph", "."], "a folder; give the name of a file"),
    ],
)
def test_wrong_words_are_one_line_and_write_nothing(
    say: Any, models: Path, words: list[str], found: str
) -> None:
    said = say("explain", models / "good.pt2", *words)
    assert said.code == 2 and found in said.err and len(said.err.splitlines()) == 1
    assert not [*Path.cwd().iterdir()]


def test_what_a_file_says_of_itself_is_vetted_before_it_is_written_down(models: Path) -> None:
    program = load(models / "shifted.pt2").program
    assert program is not None
    assert all(node.name.isidentifier() for node in program.graph.nodes)
