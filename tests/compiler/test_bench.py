"""bench: what is timed is what is said, and what it finds stays in a folder that still opens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_payloads import Decoder
from report_example import load, measured

from memcompile.compiler import bench, results
from memcompile.compiler.bench import Given, measure
from memcompile.compiler.bench_result import FILLS, OTHER, SAME, Bench, cells, milliseconds
from memcompile.compiler.manifest import facts, read_manifest
from memcompile.compiler.package import open_engine, write
from memcompile.compiler.pipeline import build
from memcompile.compiler.results import Quality, keep
from memcompile.runtime.filling import fill

QUICK = Given(contexts=(40,), rounds=3, prefill=8)


def written(folder: Path, policy: str, **options: Any) -> Path:
    torch.manual_seed(0)
    model = Decoder().eval()
    return write(folder, build(model, policy, page_size=8, **options))


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"budget": 32, "sinks": 8, "window": 8, "dense_layers": 0}
    return written(tmp_path_factory.mktemp("built") / "model.scout", "scout", **options)


@pytest.fixture(scope="module")
def found(scout: Path) -> Bench:
    return measure(scout, replace(QUICK, contexts=(60, 24)), "memcompile bench model.scout")


# --- what is measured ---


def test_both_reads_are_timed_at_each_context(found: Bench) -> None:
    assert [point.context for point in found.points] == [24, 60]
    for point in found.points:
        for taken in (point.policy, point.dense):
            assert 0 < taken.least <= taken.median <= taken.most
    near, far = found.points
    # Below the budget a policy reads what dense reads; above it, less.
    assert near.policy_bytes == near.dense_bytes
    assert far.policy_bytes < far.dense_bytes
    assert found.prefill_tokens == 8 and found.prefill_rate > 0
    assert found.baseline == SAME and found.fill == FILLS["random"]
    assert found.rounds == 3 and found.device == "cpu" and found.threads >= 1
    assert found.torch == torch.__version__ and found.policy == "scout"
    assert found.weight_bytes > 0 and "cores" in found.processor


def test_the_bytes_are_those_of_a_step(found: Bench, scout: Path) -> None:
    """The last of the timed steps stands at the end of the context."""
    engine = open_engine(scout)
    fill(engine, 57, policy=True)
    for token in torch.zeros(1, 3, dtype=torch.int64).split(1, 1):
        engine(token)
    assert engine.position == [60]
    assert engine.stats().bytes_read / 3 == found.points[-1].policy_bytes
    assert engine.stats().bytes_dense / 3 == found.points[-1].dense_bytes


def test_a_prefilled_context_reads_as_much(scout: Path, found: Bench) -> None:
    read = measure(scout, replace(QUICK, contexts=(60,), fill="prefill"), "bench")
    assert read.fill == FILLS["prefill"]
    assert read.points[0].policy_bytes == found.points[-1].policy_bytes
    assert read.points[0].dense_bytes == found.points[-1].dense_bytes


@pytest.mark.parametrize("policy", ["window", "heavy-hitter", "hierarchical"])
def test_memories_that_let_pages_go(policy: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dense_layers": 0, "sinks": 8}
    if policy == "hierarchical":
        torch.manual_seed(0)
        options |= {"refine": 0, "keep": False, "levels": (8, 16), "window": 8}
        compiled = build(Decoder().eval(), policy, check=False, **options)
        folder = write(tmp_path / "model", compiled)
    else:
        options |= {"window": 8} if policy == "window" else {"budget": 32, "window": 8}
        folder = written(tmp_path / "model", policy, check=False, **options)
    (point,) = measure(folder, replace(QUICK, contexts=(60,)), "bench").points
    assert point.policy_bytes < point.dense_bytes
    engine, token = open_engine(folder), torch.zeros(1, 1, dtype=torch.int64)
    fill(engine, 57, policy=True)
    engine(token)
    assert engine.stats().pages_evicted > 0
    fill(engine, 57, policy=False)
    engine.prefill(token)
    assert engine.stats().pages_evicted == 0


def test_dense_is_another_engine_where_a_state_cannot_be_read_densely(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", "hybrid", state_layers=(0,), window=8, check=False)
    measured = measure(folder, replace(QUICK, contexts=(60,)), "bench")
    assert measured.baseline == OTHER
    (point,) = measured.points
    engine = open_engine(folder)
    fill(engine, 57, policy=False)
    engine.prefill(torch.zeros(1, 3, dtype=torch.int64))
    assert engine.stats().bytes_dense / 3 == point.dense_bytes != point.policy_bytes


def test_a_filled_memory_answers_in_numbers(scout: Path) -> None:
    engine = open_engine(scout)
    fill(engine, 50, policy=True, seed=3)
    assert engine.position == [50] and engine.stats().tokens == {"dense": 0, "policy": 0}
    logits = engine(torch.zeros(1, 1, dtype=torch.int64))
    assert torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="200 tokens exceed the context of"):
        fill(engine, 200, policy=True)


# --- what is refused ---


def test_a_context_without_room_is_refused(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no room for 2 steps to warm up and 15 to time; give"):
        Given(contexts=(17,))
    with pytest.raises(ValueError, match=r"fill 'zeros'; known: random, prefill"):
        Given(fill="zeros")
    with pytest.raises(ValueError, match=r"--contexts 4096: the model's context is \d+ .*shorter"):
        measure(scout, replace(QUICK, contexts=(4096,)), "bench")
    with pytest.raises(ValueError, match="nothing to measure: 1K tokens were not measured"):
        measure(scout, replace(QUICK, contexts=None), "bench")
    monkeypatch.setattr(bench, "_free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"would take .*, more than half of the 1000 B that are"):
        measure(scout, QUICK, "bench")


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CONTEXTS", (24, 4096))
    folder = written(tmp_path / "model", "dense")
    found = measure(folder, replace(QUICK, contexts=None), "bench")
    assert [point.context for point in found.points] == [24]
    assert found.notes[0].startswith("4K tokens were not measured: the model's context is")


def test_figures_of_a_cache_are_called_that(scout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_last_cache", lambda: 2**30)
    found = measure(scout, QUICK, "bench")
    assert "under four times the last-level cache of 1 GiB" in found.notes[0]
    monkeypatch.setattr(bench, "_last_cache", lambda: 0)
    assert not measure(scout, QUICK, "bench").notes


# --- as data ---


def test_json_gives_it_back(found: Bench) -> None:
    assert Bench.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not what `memcompile bench` writes"),
        ({"version": 9}, "version 9, expected 1"),
        ({"threads": "<b>"}, "its 'threads' is '<b>'"),
        ({"policy": 3}, "its 'policy' is 3"),
        ({"notes": "x"}, "its 'notes' is 'x'"),
        ({"notes": [3]}, "its 'notes' is"),
        ({"prefill": {"median": 0, "least": 1, "most": 1}}, "its 'median' is 0"),
        ({"points": [{"context": 8}]}, "damaged"),
        ({"extra": 1}, "damaged"),
    ],
)
def test_other_data_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bench.from_json({**load("bench"), **change})


def test_a_point_that_is_no_number_is_refused() -> None:
    data = load("bench")
    for value in (float("nan"), float("inf"), -1, True, "1"):
        data["points"][0]["policy_bytes"] = value
        with pytest.raises(ValueError, match="its 'policy_bytes' is"):
            Bench.from_json(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not what `memcompile eval` leaves"),
        ({"version": 9}, "version 9, expected 1"),
        ({"samples": "8"}, "its 'samples' is '8'"),
        ({"folder": 8}, "its 'folder' is 8"),
        ({"rows": [{}]}, "not a row of an evaluation"),
        ({"extra": 1}, "damaged"),
    ],
)
def test_other_quality_is_refused(change: dict[str, Any], message: str) -> None:
    data = load("quality")
    assert Quality.from_json(data).to_json() == data
    with pytest.raises(ValueError, match=message):
        Quality.from_json({**data, **change})


@pytest.mark.parametrize(
    ("name", "value"), [("task", 3), ("prompts", True), ("value", {"mean": 1}), ("claim", 1)]
)
def test_a_damaged_row_is_refused(name: str, value: Any) -> None:
    data = load("quality")
    data["rows"][0][name] = value
    with pytest.raises(ValueError, match="not a row of an evaluation"):
        Quality.from_json(data)


def test_times_for_people() -> None:
    assert [milliseconds(t) for t in (0.0000123, 0.0123, 1.5)] == [
        "0.0123 ms",
        "12.3 ms",
        "1500 ms",
    ]
    point = Bench.from_json(load("bench")).points[0]
    assert cells(point)[0] == "1K" and cells(point)[5] == f"{point.speedup:.2f}"


# --- in the folder ---


@pytest.fixture
def folder(scout: Path, tmp_path: Path) -> Path:
    """A copy to write in."""
    copy = tmp_path / "model.scout"
    copy.mkdir()
    for file in scout.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_results_stay_and_the_folder_opens(folder: Path) -> None:
    shown = measured()
    assert shown.bench is not None and shown.quality is not None
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b'id="time"' not in before["report.html"]
    keep(folder, shown.bench)
    keep(folder, shown.quality)
    assert results.results(folder) == shown
    page = (folder / "report.html").read_text()
    assert 'id="time"' in page and 'id="quality"' in page
    manifest = read_manifest(folder)  # which holds every file against its sha256
    assert {"bench.json", "quality.json", "report.html"} < {*manifest["files"]}
    open_engine(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"bench.json", "quality.json", "report.html", "manifest.json"}


@pytest.mark.parametrize("writes", range(4))
def test_a_folder_opens_wherever_writing_stopped(
    writes: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured().bench
    assert found is not None
    keep(folder, found)
    left = [writes]

    def stop(path: Path, text: str) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        path.write_text(text)

    monkeypatch.setattr(results, "write_whole", stop)
    with pytest.raises(KeyboardInterrupt):
        keep(folder, replace(found, rounds=99))
    read_manifest(folder)
    monkeypatch.undo()
    keep(folder, replace(found, rounds=99))
    assert "report.html" in read_manifest(folder)["files"]


def test_results_that_cannot_be_read_are_said(folder: Path) -> None:
    (folder / "bench.json").write_text("{")
    assert results.results(folder).faults[0].startswith("bench.json cannot be shown: damaged JSON")
    quality = measured().quality
    assert quality is not None
    keep(folder, quality)
    assert "bench.json cannot be shown" in (folder / "report.html").read_text()


def test_a_changed_folder_keeps_no_result(folder: Path) -> None:
    found = measured().bench
    assert found is not None
    (folder / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"report\.json: 2 bytes where"):
        keep(folder, found)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["report.json"] = facts(folder / "report.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"report\.json: damaged"):
        keep(folder, found)
    assert not (folder / "bench.json").exists()


def test_an_older_folder_gets_its_page(folder: Path) -> None:
    """Those written before there was one."""
    (folder / "report.html").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["report.html"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = measured().bench
    assert found is not None
    keep(folder, found)
    assert "report.html" in read_manifest(folder)["files"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.check_writable(folder)
    monkeypatch.setattr(results.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="not allowed to write there; --dry-run measures"):
        results.check_writable(folder)
