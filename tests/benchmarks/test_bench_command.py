"""The command: what it lists, runs, writes, refuses, and answers with `--check`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.benchmarks import __main__ as command
from memcompile.benchmarks import (
    attention_step,
    bandwidth,
    buffers,
    compile_time,
    decode,
    linear,
    registry,
    results,
)
from memcompile.benchmarks.registry import Benchmark, Column, Outcome, Settings
from memcompile.benchmarks.rules import Bar, measure

QUICK = ["--quick", "--rounds", "1", "--kernels", "reference"]


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_the_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    known = "attention-step memories state linear decode backend aoti onnx compile-time"
    assert names == known.split()
    assert all(registry.find(name).name == name for name in names)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["attention"], "unknown benchmark 'attention'; known: attention-step, memories, state"),
        (["linear", "--contexts", "0"], "--contexts [0]: give lengths of at least 1"),
        (["linear", "--rounds", "0"], "--rounds 0: give at least 1"),
        (["linear", "--threads", "0"], "--threads 0: give at least 1"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "more"), [("attention-step", ["--contexts", "128"]), ("linear", [])]
)
def test_a_quick_run_writes_a_whole_result(
    name: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([name, *QUICK, *more, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"{name}-2")
    assert path.suffix == ".json"
    told = capsys.readouterr().out
    assert str(path) in told
    assert "(quick)" in told
    result = json.loads(path.read_text())
    assert set(results.REQUIRED) <= set(result)
    assert result["benchmark"] == name
    assert result["setting"]["quick"] is True
    assert result["setting"]["kernels"] == "reference"
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert set(result["machine"]) >= {"processor", "cores", "caches", "huge_pages"}
    assert set(result["versions"]) >= {"torch", "triton", "compiler", "memcompile"}
    assert set(result["commit"]) == {"revision", "dirty"}
    assert all(math.isfinite(number) for number in numbers(result["rows"]))
    for bar in result["bars"]:
        assert bar["met"] in (None, True, False)


@pytest.mark.parametrize("out", [["--out", "/home/me/x"], ["--out=/home/me/x"]])
def test_a_recorded_command_names_no_folder(out: list[str]) -> None:
    assert results.portable(["linear", *out, "--rounds", "3"]) == ["linear", "--rounds", "3"]


def test_published_results_name_no_machines_paths() -> None:
    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            value = [*value.values()]
        if isinstance(value, list):
            for item in value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value

    published = sorted(results.FOLDER.glob("*.json"))
    assert published
    for path in published:
        paths = [text for text in texts(json.loads(path.read_text())) if text.startswith("/")]
        assert not paths, path.name


@pytest.mark.parametrize(("value", "code"), [(1.0, 1), (3.0, 0), (None, 0)])
def test_check_fails_on_a_missed_bar_alone(
    value: float | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(settings: Settings) -> Outcome:
        return Outcome([{"x": 1}], (Column("x", lambda row: str(row["x"])),), [Bar("x", value, 2)])

    monkeypatch.setitem(registry.BENCHMARKS, "fake", Benchmark("fake", "nothing", run))
    assert command.main(["fake", "--out", str(tmp_path)]) == 0
    assert command.main(["fake", "--check", "--out", str(tmp_path)]) == code


def test_results_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = results.record("x", [{"a": 1}], {}, [])
    path = results.write(result, tmp_path, "Some CPU (R) 9.5 GHz")
    assert path.name.endswith("-some-cpu-r-9-5-ghz.json")
    with pytest.raises(ValueError, match="Out of range"):
        results.write({**result, "rows": [{"a": math.nan}]}, tmp_path, "x")
    assert [*tmp_path.iterdir()] == [path]

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no room"):
        results.write(result, tmp_path, "other")
    assert not [
        found for found in tmp_path.iterdir() if found.name.startswith("x-") and found != path
    ]


def test_outside_a_checkout_there_is_no_revision(tmp_path: Path) -> None:
    assert results.commit(tmp_path) == {"revision": None, "dirty": None}


# --- memory pages and their bandwidth ---


def test_memory_of_both_kinds_holds_what_is_put_there() -> None:
    drawn = torch.randn(3, 1 << 20)
    for kind in buffers.KINDS:
        held = buffers.copy(drawn, kind)
        assert torch.equal(held, drawn)
        share = buffers.huge_share(held)
        assert share is None or 0 <= share <= 1
    with pytest.raises(ValueError, match="unknown kind of memory pages 'big'; known: ordinary"):
        buffers.empty((1,), torch.float32, "big")


def test_the_share_of_huge_pages_is_that_of_the_mappings_touched() -> None:
    smaps = (
        "1000-3000 rw-p 0\nRss: 8 kB\nAnonHugePages: 0 kB\n"
        "3000-7000 rw-p 0\nRss: 16 kB\nAnonHugePages: 12 kB\n"
        "8000-9000 rw-p 0\nRss: 4 kB\nAnonHugePages: 4 kB\n"
    )
    assert buffers.share_of_mapping(smaps, 0x3000, 0x4000) == 0.75
    assert buffers.share_of_mapping(smaps, 0x2000, 0x4000) == 0.5
    assert buffers.share_of_mapping(smaps, 0x8000, 0x9000) == 1.0
    assert buffers.share_of_mapping(smaps, 0x9000, 0xA000) is None
    assert [bandwidth.kind_of(share) for share in (None, 0.2, 0.9)] == [
        "ordinary",
        "ordinary",
        "huge",
    ]


def test_the_bandwidth_is_the_fastest_probe_of_its_kind(tmp_path: Path) -> None:
    probes = bandwidth.probes(64 << 10)
    assert all(probe.states * probe.floor > 4 * (64 << 10) for probe in probes)
    speed = bandwidth.bandwidths(measure(probes, 1), {p.name: p.floor for p in probes})
    assert set(speed) == {"ordinary", "huge"}
    assert all(value > 0 for value in speed.values())
    reader = bandwidth.load_reader(tmp_path)
    if reader is None:
        pytest.skip("no C++ compiler")
    # Every byte is read: the sums of its words say so.
    data = torch.ones(3 * 64 * 128, dtype=torch.int64)
    for threads in (1, 3):
        for streams in bandwidth.STREAMS:
            assert reader(data.data_ptr(), data.nbytes, threads, streams) == len(data)


def test_without_a_compiler_torch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "compiler", lambda: None)
    names = [probe.name for probe in bandwidth.probes(64 << 10)]
    assert names == ["read bandwidth ordinary torch sum", "read bandwidth huge torch sum"]


def test_a_context_that_does_not_fit_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(quick=True, rounds=1, kernels="reference", contexts=(128, 1 << 14))
    monkeypatch.setattr(buffers, "free_memory", lambda: 64 << 20)
    outcome = attention_step.run(settings)
    assert [row["context"] for row in outcome.rows] == [128]
    (reason,) = outcome.left_out
    assert reason.startswith("16384: ")
    assert reason.endswith(" MiB are needed, 64 are free")


# --- bars and parts of the other benchmarks ---


def test_linear_bars_leave_out_what_was_not_asked_for() -> None:
    share = {"bandwidth_share": 0.7}
    rows = [{"case": "a", "held": True, "ordinary": share, "huge": {"bandwidth_share": 0.5}}]
    rows.append({"case": "b", "held": False, "ordinary": share, "huge": share})
    assert [bar.met for bar in linear.bars(rows)] == [True, False]


def test_decode_bars() -> None:
    row = {"context": 32768, "dense": {"times_baseline": 1.6}, "scout": {"times_baseline": 2.4}}
    assert [bar.met for bar in decode.bars([row])] == [None, True, False]


def test_compile_time_bars_and_stages() -> None:
    rows = [{"policy": "dense", "caches": name, "seconds": 31.0} for name in ("cold", "warm")]
    assert [bar.met for bar in compile_time.bars(rows)] == [True, False]
    assert [bar.met for bar in compile_time.bars(rows, proven=False)] == [None, None]
    report = "a table\nseconds: normalise 0.5, find 1.0, self-check 2.5\nmore"
    assert compile_time.stages_of(report) == {"normalise": 0.5, "find": 1.0, "self-check": 2.5}
    assert compile_time.stages_of("nothing") == {}


def test_a_static_cache_step_can_be_taken_again_and_reads_the_whole_cache() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = decode.llama(decode.SMALL)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    tokens = torch.randint(0, 128, (1, 20))
    with torch.no_grad():
        cache = decode.static_cache(model, 20)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.float(), layer.values.float()
            layer.cumulative_length.fill_(0)
        asked = torch.full((1, 1), decode.TOKEN)
        model(input_ids=tokens[:, :19], past_key_values=cache, use_cache=True)
        static = decode.Static(model.forward, cache, 20)
        first = static.step()
        static.rewind()
        assert torch.equal(static.step(), first)
        whole = model(input_ids=torch.cat([tokens[:, :19], asked], 1), use_cache=False).logits
    torch.testing.assert_close(first[:, 0], whole[:, -1])


def test_decode_runs_quick() -> None:
    pytest.importorskip("transformers")
    settings = Settings(quick=True, rounds=1, kernels="reference", contexts=(160,))
    with torch.no_grad():
        outcome = decode.run(settings)
    (row,) = outcome.rows
    assert row["scout"]["floor_bytes"] < row["dense"]["floor_bytes"]
    assert row["baseline"].startswith("transformers eager")
    assert all(column.text(row) for column in outcome.columns)


def test_compile_time_runs_quick_and_tells_why_a_child_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    settings = Settings(quick=True, kernels="reference")
    row = compile_time.timed("scout", tmp_path, settings)
    assert row["seconds"] >= row["parts"]["compile"] > 0
    assert {"normalise", "self-check", "capture and the rest"} <= set(row["stages"])
    monkeypatch.setattr(compile_time, "POLICIES", ("nonsense",))
    with pytest.raises(
        RuntimeError, match=r"(?s)compiling the nonsense engine failed.*unknown policy"
    ):
        compile_time.run(settings)
