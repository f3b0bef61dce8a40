"""`verify` in 16 bit: an engine that rounds otherwise is eager's equal, a wrong one is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_steps import FAULTS, compiled, with_fault
from torch import Tensor

from memcompile.compiler.export import runners
from memcompile.compiler.export.contract import contract_of, places_of
from memcompile.compiler.export.formats import Artefact
from memcompile.compiler.export.verify import Trace, Verdict, compare, trace
from memcompile.passes.make_functional import make_functional

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
LONG = pytest.mark.long
DEPTHS = pytest.mark.parametrize(
    "layers", [2, pytest.param(8, marks=LONG), pytest.param(24, marks=LONG)]
)
Outputs = Mapping[str, Tensor]


@cache
def traces(dtype: torch.dtype, layers: int) -> list[Trace]:
    model, made = compiled(dtype, layers)
    model.draw(0)
    assert made.program is not None
    return [trace(made.program, batch, 60, 8) for batch in (1, 3)]


def verdict(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    layers: int,
    *,
    fault: str = "",
    wrong: Callable[[dict[str, Tensor]], None] = lambda made: None,
) -> Verdict:
    """Of the step itself as an engine: with a fault in its graph, or its outputs made `wrong`."""
    told = traces(dtype, layers)
    _, made = compiled(dtype, layers)
    assert made.program is not None and made.step is not None
    step: Any = with_fault(made.step.policy, fault) if fault else made.step.policy
    graph = make_functional(step, places_of(made.program), made.program.ragged)
    contract = contract_of(made.program, places_of(made.program))
    contract.write(folder)

    def call(given: Outputs) -> Outputs:
        with torch.no_grad():
            outputs = graph(*(given[name] for name in contract.inputs))
        answers = {**given, **dict(zip(contract.outputs, outputs, strict=True))}
        wrong(answers)
        return answers

    monkeypatch.setattr(runners, "RUNNERS", {"onnx": lambda path, contract: call})
    return compare(folder, Artefact("onnx", "onnx", "engine", {}), told, {})


def noisy(made: dict[str, Tensor]) -> None:
    """Half a unit in the last place of every logit: another order of rounding."""
    logits = made["logits"]
    unit = torch.finfo(logits.dtype).eps / 2
    made["logits"] = (logits.float() * (1 + unit * torch.randn(logits.shape))).to(logits.dtype)


def lose_keys(made: dict[str, Tensor]) -> None:
    made["site1_keys_out"] = made["site1_keys"]


@HALVES
@DEPTHS
def test_rounding_is_no_difference(
    layers: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in (lambda made: None, noisy):
        told = verdict(tmp_path, monkeypatch, dtype, layers, wrong=wrong)
        assert told.outcome == "equal", told
        assert told.largest <= told.allowed and 0.8 < told.error_over_eager < 1.8


@HALVES
@DEPTHS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one(
    fault: str, layers: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = verdict(tmp_path, monkeypatch, dtype, layers, fault=fault)
    assert told.outcome == "differs", told
    assert "logits differ" in told.reason or "times as far from float32" in told.reason


@HALVES
@DEPTHS
def test_a_state_output_that_is_not_updated_is_one(
    layers: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = verdict(tmp_path, monkeypatch, dtype, layers, wrong=lose_keys)
    assert told.outcome == "differs", told
