"""Rows, tables and pictures: what is claimed, what is not, and that it can be read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memcompile.evaluation.plots import plot
from memcompile.evaluation.protocol import Contender
from memcompile.evaluation.run import Plan, expected, skips
from memcompile.evaluation.summary import Row, summarise
from memcompile.evaluation.tables import FOOT, markdown, table
from memcompile.models.memory import preset
from memcompile.runtime.site_layout import SiteLayout

LONG = "scout:budget=64,dense_layers=1"
PLAN = Plan(("single", "mqar", "text-loss"), (256, 1024), (0.0, 1.0), 12, seed=0, stride=8)


def hollow(name: str, kind: str, **options: Any) -> Contender:
    """A contender that is never run: two sites with their memories."""
    import torch

    chosen = preset(kind, **options)
    layouts = tuple(
        SiteLayout(f"site{i}", 2, 16, 16, torch.float32, chosen.memory(i, 0)) for i in range(2)
    )
    return Contender(name, make=lambda: None, layouts=layouts)  # type: ignore[arg-type, return-value]


SCOUT = {"page_size": 8, "sinks": 8, "window": 16}
DENSE = hollow("dense", "dense", page_size=8)
CONTENDERS = [
    DENSE,
    hollow(LONG, "scout", budget=64, dense_layers=1, **SCOUT),
    hollow("scout:budget=256", "scout", budget=256, dense_layers=0, **SCOUT),
]
HYBRID = hollow("hybrid:window=32", "hybrid", window=32)


def records(
    score: dict[tuple[str, str], list[float]], contenders: Sequence[Contender] = CONTENDERS
) -> list[dict[str, Any]]:
    """Every record of the plan; scores by task and policy, in turn, 1 if none are given."""
    found = []
    for item, contender in expected(PLAN, contenders):
        values = score.get((item.task, contender.name), [1.0])
        record = {
            "task": item.task,
            "length": item.length,
            "depth": item.depth,
            "sample": item.sample,
            "policy": contender.name,
            "tokens": 10,
            "pages_read": 80 if contender is DENSE else 8,
            "pages_dense": 80,
            "bytes_read": 8000 if contender is DENSE else 800,
            "bytes_dense": 8000,
            "resident_bytes": 2048 + item.sample,
            "state_bytes": 512 if contender.stateful else 0,
        }
        place = item.sample + (12 if item.depth else 0)
        value = values[place % len(values)]
        if item.task == "text-loss":
            record |= {"nats": value, "text_bytes": 10}
        else:
            record |= {"score": value}
        found.append(record)
    return found


def row(rows: list[Row], task: str, length: int, policy: str) -> Row:
    (found,) = [r for r in rows if (r.task, r.length, r.policy) == (task, length, policy)]
    return found


def test_a_claim_needs_a_dense_success_and_a_small_budget() -> None:
    rows = summarise(PLAN, CONTENDERS, records({("mqar", "dense"): [1.0, 0.5]}))
    assert len(rows) == 3 * 2 * 3
    able = row(rows, "single", 1024, LONG)
    assert able.claim and able.verdict == "no difference shown"
    assert (able.prompts, able.paired, able.kept_dense, able.sites) == (24, 24, 1, 2)
    assert (able.bytes_per_token, able.bytes_read, able.bytes_dense) == (80.0, 19200, 192000)
    assert (able.resident_bytes, able.state_bytes, able.stateful) == (2048 + 11, 0, 0)
    fails = row(rows, "mqar", 1024, LONG)
    assert not fails.claim and fails.verdict == "no claim: dense 75% < 90%"
    assert row(rows, "mqar", 1024, "dense").verdict == "fails here"
    assert row(rows, "single", 256, LONG).verdict == "no claim: budget > 1/8"
    assert row(rows, "single", 1024, "scout:budget=256").verdict == "no claim: budget > 1/8"
    nothing = row(rows, "single", 256, "scout:budget=256")
    assert nothing.verdict == "nothing to skip ≤ 256" and nothing.value is None


def test_a_layer_with_a_state_is_neither_dense_nor_selecting() -> None:
    """It reads its window exactly, and nothing else: there is something to skip above that."""
    assert (HYBRID.kept_dense, HYBRID.selecting, len(HYBRID.stateful)) == (1, [], 1)
    assert (HYBRID.reads_all_below, HYBRID.budget) == (32, 32)
    assert skips(HYBRID, 33) and not skips(HYBRID, 32)
    both = hollow("hybrid", "hybrid", rest="scout:budget=512,dense_layers=0")
    assert (both.reads_all_below, both.budget) == (64, 512)
    rows = summarise(PLAN, [DENSE, HYBRID, both], records({}, [DENSE, HYBRID, both]))
    found = row(rows, "single", 1024, HYBRID.name)
    assert found.claim and (found.stateful, found.state_bytes) == (1, 512)
    assert row(rows, "single", 1024, "hybrid").verdict == "no claim: budget > 1/8"
    assert "| 1/2 | 1/2 | no difference shown |" in markdown(rows, "a model")
    out = io.StringIO()
    Console(file=out, width=120).print(table(rows, "a model"))
    assert "hybrid-1: hybrid:window=32; 1 of 2 layers dense; 1 of 2 with a state" in out.getvalue()
    assert "dense: 2 of 2 layers dense" in out.getvalue()


@pytest.mark.parametrize(
    ("task", "dense", "policy", "verdict"),
    [
        ("single", [1.0], [0.0, 1.0, 0.0], "worse than dense"),
        ("single", [1.0] * 5 + [0.5], [1.0] * 5 + [0.5], "no difference shown"),
        ("text-loss", [1.0, 1.1, 1.2], [1.1, 1.3, 1.2], "worse than dense"),
        ("text-loss", [1.2, 1.3, 1.4], [1.0, 1.2, 1.2], "better than dense"),
        ("text-loss", [1.2, 1.3, 1.4], [1.2, 1.4, 1.2], "no difference shown"),
    ],
)
def test_a_difference_is_claimed_when_its_interval_leaves_zero_out(
    task: str, dense: list[float], policy: list[float], verdict: str
) -> None:
    rows = summarise(PLAN, CONTENDERS, records({(task, "dense"): dense, (task, LONG): policy}))
    found = row(rows, task, 1024, LONG)
    assert found.verdict == verdict and found.claim
    assert found.difference is not None
    assert (found.difference.low <= 0 <= found.difference.high) is (verdict[:2] == "no")


def test_only_prompts_that_both_answered_are_compared() -> None:
    given = records({("single", LONG): [0.0]})
    kept = [r for r in given if r["policy"] != "dense" or r["depth"] == 0.0]
    found = row(summarise(PLAN, CONTENDERS, kept), "single", 1024, LONG)
    assert (found.prompts, found.paired) == (24, 12)
    assert found.difference is not None and found.difference.mean == -1.0
    assert not found.claim and found.verdict == "no claim: 12 prompts < 20"
    nothing = summarise(PLAN, CONTENDERS, [])
    assert {r.verdict for r in nothing} >= {"not run yet"} and not any(r.claim for r in nothing)


def test_the_table_and_the_document_show_every_row() -> None:
    rows = summarise(PLAN, CONTENDERS, records({("single", LONG): [0.0, 1.0]}))
    out = io.StringIO()
    Console(file=out, width=160).print(table(rows, "a model"))
    shown = out.getvalue()
    for part in ("single, 1024", "scout-1", f"scout-1: {LONG}", "worse than dense", "nats"):
        assert part in shown
    assert shown.count("no claim: budget > 1/8") == sum(
        r.verdict == "no claim: budget > 1/8" for r in rows
    )
    assert "Note: hybrid: not fitted.\n\n" in markdown(rows, "a model", ["hybrid: not fitted"])
    # On a narrow page verdicts are broken, and no column is lost.
    out = io.StringIO()
    Console(file=out, width=116).print(table(rows, "a model"), soft_wrap=True)
    grid = out.getvalue().partition("\ndense: ")[0]
    assert grid.count("verdict") == 2 and max(map(len, grid.splitlines())) <= 116
    document = markdown(rows, "a model")
    assert document.startswith("# a model\n") and document.rstrip().endswith(FOOT)
    lines = [line for line in document.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 4
    assert f"| single | 1024 | {LONG} | 50.0 [" in document
    assert "| 80 B | 2.0 KiB | 10.0% | 1/2 | 0/2 |" in document and "| 800 B |" in document


def test_pictures_are_drawn_and_written_whole(tmp_path: Path) -> None:
    given = records({("single", LONG): [0.0, 1.0]})
    rows = summarise(PLAN, CONTENDERS, given)
    files = plot(rows, given, tmp_path)
    assert {path.name for path in files} == {
        f"{name}.{kind}"
        for name in ("quality-against-bytes", "quality-against-memory", "needles-single")
        for kind in ("png", "svg")
    }
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in files}
    assert (tmp_path / "needles-single.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "quality-against-bytes.svg").read_text()
    assert drawn.count("<svg") == 1
    # An empty run has axes and nothing in them.
    plot(summarise(PLAN, CONTENDERS, []), [], tmp_path)
