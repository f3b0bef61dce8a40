"""Scripts of what was declined: each shows it by itself, and holds nothing but what it needs."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memcompile
from memcompile.compiler.capture import capture
from memcompile.compiler.pipeline import Compiled, build, normalise, vocabulary
from memcompile.compiler.region import Graph, cut, sinks
from memcompile.compiler.repro import script, write_repro
from memcompile.compiler.source_text import weights_of
from memcompile.models.memory import preset
from memcompile.models.networks.decoders import DECODERS
from memcompile.passes.classify_tokens import classify_tokens
from memcompile.passes.result import Declined

ENTRIES = {entry.name: entry for entry in DECODERS}


def decoder(name: str) -> nn.Module:
    return ENTRIES[name].decoder(1)


@cache
def graph_of(name: str) -> Graph:
    captured = capture(decoder(name))
    compiled: Compiled = build(captured.program, strict=False, check=False, kernels="off")
    module, _ = normalise(captured.program)
    classified = classify_tokens(module)
    rows = vocabulary(module, classified)
    return Graph(module, classified, compiled.sites, compiled.declined, rows)


def run(path: Path) -> tuple[int, dict[str, Any]]:
    held = runpy.run_path(str(path), run_name="script")
    return held["main"](), held


@pytest.mark.parametrize(
    ("name", "rule", "most"),
    [
        ("CentredPositions", "derive_step", 8),
        ("TableFromTheEnd", "derive_step", 8),
        ("ShiftByRoll", "derive_step", 16),
        ("TurnedTriangle", "find_sites", 40),
        ("TwoKindsOfScores", "fold_attention", 50),
        ("LogitsTransposed", "derive_step", 60),
    ],
)
def test_a_decline_is_reproduced_by_its_region(
    name: str, rule: str, most: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "repro.py"
    report = memcompile.explain(decoder(name), repro=path)
    assert report.declined[0].rule == rule
    (note,) = report.notes
    assert "not reproduced" not in note and int(note.split(" of ")[0].split()[-1]) <= most, note
    code, held = run(path)
    assert code == 0 and held["EXPECTED"] == (rule, report.declined[0].reason)
    said = capsys.readouterr().out
    assert report.declined[0].reason in said and said.endswith("reproduced\n")


def test_a_self_check_that_fails_is_among_the_declines_and_reproduced(tmp_path: Path) -> None:
    """A squeeze that one row of one token changes the graph of."""
    path = tmp_path / "repro.py"
    report = memcompile.explain(decoder("SqueezedQueries"), repro=path, check=True)
    assert [declined.rule for declined in report.declined] == ["self_check"]
    assert report.sites and run(path)[0] == 0


def test_an_attention_by_name_is_rewritten_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "repro.py"
    model = decoder("CrossLayerKeyValue")
    options = {"budget": 64, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 1}
    memcompile.explain(model, repro=path, site="model.2", **options)
    code, held = run(path)
    # Layer 1 reads through the policy; by itself it is layer 0, and must not be kept dense there.
    assert code == 0 and held["POLICY"] == "scout" and held["OPTIONS"]["dense_layers"] == 0
    assert held["EXPECTED"] is None


def test_a_decline_that_is_gone_is_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "repro.py"
    memcompile.explain(decoder("CentredPositions"), repro=path)
    path.write_text(path.read_text().replace("aten.mean.default(", "aten.neg.default("))
    assert run(path)[0] == 1


def test_a_script_runs_by_itself_and_names_no_place(tmp_path: Path) -> None:
    path = tmp_path / "repro.py"
    memcompile.explain(decoder("CentredPositions"), repro=path)
    text = path.read_text()
    assert str(Path.home()) not in text and "/" not in text.replace("//", "")
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"sys", "math", "torch", "memcompile"}
    done = subprocess.run([sys.executable, path.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "reproduced" in done.stdout, done.stderr


def test_no_weight_of_the_model_is_in_it(tmp_path: Path) -> None:
    """Masks and single numbers stay, as the rule that makes them."""
    path = tmp_path / "repro.py"
    model = decoder("TurnedTriangle")
    memcompile.explain(model, repro=path)
    _, held = run(path)
    made, own = held["Region"](), dict(model.named_parameters())
    assert all(p.abs().max() < 1 for p in made.parameters())
    assert not any(
        p.shape == q.shape and torch.equal(p, q) for p in made.parameters() for q in own.values()
    )
    assert "distance(64) < 0" in path.read_text()


HOSTILE = "x')\n        __import__('os').mkdir('planted')\n        ('"


def test_hostile_names_inject_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's names are vetted when it is read; the script does not rely on that."""
    monkeypatch.chdir(tmp_path)
    graph = graph_of.__wrapped__("TurnedTriangle")
    focus, _ = graph.focus(None)
    for i, node in enumerate(graph.module.graph.nodes):
        node.name = f"{HOSTILE}{i}"
        node.meta["nn_module_stack"] = {"k": (HOSTILE, nn.Module)}
        node.meta["stack_trace"] = f'File "{HOSTILE}", line 3'
    declined = Declined(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    region = cut(graph, [focus], 1 << 30)
    text = script(region, weights_of(region), {"preset": HOSTILE, HOSTILE: HOSTILE}, declined)
    tree = ast.parse(text)
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    words |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not words & {"mkdir", "__import__", "os"}
    assert any(n.value == HOSTILE for n in ast.walk(tree) if isinstance(n, ast.Constant))
    exec(compile(text, "script", "exec"), {"__name__": "script"})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda node: setattr(node, "target", print), "no operator of torch's own"),
        (lambda node: setattr(node, "args", (node.args[0], slice(1))), "a slice stands"),
        (lambda node: setattr(node, "kwargs", {"x=1, y": 2}), "where a plain word is expected"),
    ],
)
def test_what_no_script_can_hold_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    graph = graph_of.__wrapped__("CentredPositions")
    focus, declined = graph.focus(None)
    change(focus)
    with pytest.raises(ValueError, match=words):
        write_repro(tmp_path / "repro.py", graph, preset("dense"))
    assert declined is not None and not [*tmp_path.iterdir()]


def test_a_region_is_no_larger_than_it_need_be() -> None:
    graph = graph_of("TurnedTriangle")
    focus, declined = graph.focus(None)
    sizes = [len(cut(graph, sinks(focus, declined), depth).nodes) for depth in (1, 3, 6, 99)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("RotaryDecoder", {"repro": "r.py", "site": "nowhere"}, "no attention is called 'nowhere'"),
        ("EvenLengthBranch", {"repro": "r.py"}, "has no node of its own"),
        ("LoopedSinusoids", {"repro": "r.py"}, "was not captured"),
        ("SharedBufferWritten", {"dump_graph": "r.svg"}, "no normal form"),
        ("RotaryDecoder", {"site": "x"}, "give one of them"),
    ],
)
def test_where_there_is_nothing_to_cut(
    name: str, options: dict[str, str], words: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        memcompile.explain(decoder(name), **options)
    assert not [*tmp_path.iterdir()]


def test_explain_raises_nothing_for_a_model_with_a_state_of_its_own() -> None:
    report = memcompile.explain(decoder("SharedBufferWritten"))
    assert report.declined[0].rule == "unlift"
