"""The state benchmark: its baselines compute the same, and its bytes are counted right."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from tolerance import assert_close_to_float64

from memcompile.benchmarks import state, state_baselines
from memcompile.benchmarks.registry import Settings
from memcompile.benchmarks.state import QUICK, Layer, Shape

SHAPE = replace(QUICK, rule="additive", dtype=torch.float32)
ROWS = 48


@pytest.mark.parametrize("decay", ["", "gate"])
@pytest.mark.parametrize("name", ["broadcast", "folded", "onnxruntime"])
def test_baselines_compute_a_state_from_zeros(name: str, decay: str) -> None:
    kind = torch.bfloat16 if name == "onnxruntime" else torch.float32  # it widens by itself
    given = replace(SHAPE, decay=decay, dtype=kind).inputs(ROWS)
    given["state"].zero_()
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in given.values()]
    truth = torch.ops.memcompile.state_step(*exact)[0]
    eager = torch.ops.memcompile.state_step(*given.values())[0]
    if name == "onnxruntime":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
        out, after = state_baselines.onnxruntime(given)()
        found = torch.from_numpy(out.numpy()).unflatten(2, (4, 16)).transpose(1, 2)
        after = torch.from_numpy(after.numpy())
        assert_close_to_float64(after, given["state"], exact[6], reduction=ROWS)
    else:
        inputs = (given[n] for n in ("query", "key", "value", "decay"))
        found = state_baselines.chunked(*inputs, 16, name == "folded")
    assert_close_to_float64(found, eager, truth, reduction=ROWS * 16)


def test_a_steps_bytes_are_those_of_its_tensors() -> None:
    shape = Shape(4, 2, 16, 8, torch.bfloat16, decay="gate", rule="normalised")
    kept = 4 * (2 * 16 * 8 + 2 * 16)
    rows = 2 * (4 * 16 + 2 * 16 + 2 * 8) + 4 * 2
    assert shape.floor_bytes() == 2 * kept + rows + 4 * (4 * 8 + 4)
    assert (
        replace(shape, rule="delta").floor_bytes() == 2 * (kept - 4 * 2 * 16) + rows + 4 * 2 + 144
    )


def test_a_layer_reads_its_window_and_its_state_alone() -> None:
    layer = Layer(SHAPE, 128, None, seed=0)
    table, keys = (layer.near.args[i] for i in (4, 1))  # type: ignore[attr-defined]
    assert (table >= 0).sum() == len(keys) == 2 * 2
    out, lse = layer()
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_bars() -> None:
    rows = [{"what": "step x", "times_floor": 1.5}, {"what": "step y", "times_floor": 2.5}]
    rows += [
        {"what": "layer", "context": n, "ms": ms, "times_floor": 2.1}
        for n, ms in ((8192, 1.0), (131072, 1.2))
    ]
    rows += [{"what": "prefill", "times_baseline": 3.0}]
    met = [bar.met for bar in state.bars(rows)]
    assert met == [True, False, False, False, False, True]
    assert state.bars(rows[:3])[-1].met is None


def test_a_quick_run_measures_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    settings = Settings(quick=True, rounds=1, kernels="reference")
    with torch.no_grad():
        outcome = state.run(settings)
    kinds = [row["what"].split()[0] for row in outcome.rows]
    assert kinds == ["step", "layer", "layer", "layer", "prefill"]
    assert outcome.rows[3]["what"].endswith("2 sequences")
    assert all(column.text(row) for column in outcome.columns for row in outcome.rows)
    assert outcome.rows[-1]["baseline"].startswith("torch, chunks of 16")
    (reason,) = outcome.left_out
    assert reason.startswith("onnxruntime, additive, 4/2 heads, bfloat16: ")
