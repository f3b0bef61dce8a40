"""`memcompile bench`: the figures of a folder, and what it says where there are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from memcompile.compiler.bench_result import Bench
from memcompile.compiler.manifest import read_manifest

QUICK = ["--contexts", "256,40", "--rounds", "3", "--prefill", "16"]


@pytest.fixture
def folder(engine_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine_folder, tmp_path / "model.scout"))


def test_figures_go_to_the_folder_and_to_its_page(say: Any, folder: Path) -> None:
    said = say("bench", folder, *QUICK, "--kernels", "off")
    assert said.code == 0, said.err
    for part in ("256", "dense / policy", "GB/s", "tokens/s", "the same engine", "random keys"):
        assert part in said.out
    assert f"wrote bench.json and report.html in {folder}/" in said.out
    assert {"bench.json", "report.html"} < {*read_manifest(folder)["files"]}
    found = Bench.from_json(json.loads((folder / "bench.json").read_text()))
    assert [point.context for point in found.points] == [40, 256]
    assert found.command == (
        "memcompile bench model.scout --contexts 256,40 --rounds 3 --prefill 16 --kernels off"
    )
    assert found.command in (folder / "report.html").read_text()
    assert say("run", folder, "--ids", "--prompt", "1 2 3", "--max-new-tokens", "2").code == 0


def test_json_and_dry_run_write_nothing(say: Any, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    said = say("bench", folder, *QUICK, "--dry-run", "--json", "--quiet")
    assert said.code == 0
    assert len(Bench.from_json(json.loads(said.out)).points) == 2
    assert "nothing written: --dry-run" in say("bench", folder, *QUICK, "--dry-run").out
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "10"], "--contexts: a context of 10 tokens has no room for 2 steps"),
        (["--contexts", "1k"], "--contexts: expected whole numbers with commas between, got '1k'"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
        (["--fill", "zeros"], "'zeros' is not one of 'random', 'prefill'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, say: Any, folder: Path
) -> None:
    said = say("bench", folder, *arguments)
    assert said.code == 2 and message in said.err
    assert not (folder / "bench.json").exists()


def test_other_folders_are_refused(say: Any, network: Path, tmp_path: Path) -> None:
    said = say("bench", network)
    assert said.code == 2 and "expected a folder that memcompile wrote" in said.err
    said = say("bench", tmp_path / "nothing")
    assert said.code == 2 and "nothing" in said.err


def test_a_build_leaves_its_page(engine_folder: Path) -> None:
    page = (engine_folder / "report.html").read_text()
    assert "induction.v1" in page and "memcompile bench DIR" in page
    assert "report.html" in read_manifest(engine_folder)["files"]
