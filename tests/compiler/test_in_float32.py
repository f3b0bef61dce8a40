"""16 bit: the self-check lets rounding pass at any depth, and no mistake that is larger."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_steps import FAULTS, compiled, with_fault
from stepping import forward
from torch import Tensor

from memcompile.compiler.in_float32 import InFloat32, error_over_eager, farthest
from memcompile.compiler.pipeline import build
from memcompile.compiler.self_check import check_splits, self_check
from memcompile.passes.result import NotRewritten

ROOT = Path(__file__).resolve().parents[2]
BYTES_SMALL = ROOT / "models/networks/checkpoints/bytes-small"
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
LONG = pytest.mark.long
DEPTHS = pytest.mark.parametrize(
    "layers", [2, pytest.param(8, marks=LONG), pytest.param(24, marks=LONG)]
)


@HALVES
@DEPTHS
def test_rounding_passes(layers: int, dtype: torch.dtype) -> None:
    model, made = compiled(dtype, layers)
    assert made.program is not None and made.captured.forward is not None
    for seed in range(4):
        model.draw(seed)
        figures = self_check(made.program, made.captured.forward, False)
        assert 0.8 < figures["error_over_eager"] < 1.5, "close to neither limit"
        assert 0 < figures["largest_difference"] < figures["allowed"] / 2


@HALVES
@DEPTHS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_does_not(fault: str, layers: int, dtype: torch.dtype) -> None:
    model, made = compiled(dtype, layers)
    assert made.program is not None and made.captured.forward is not None
    graphs = {read: with_fault(getattr(made.program, read), fault) for read in ("dense", "policy")}
    for seed in range(2):
        model.draw(seed)
        with pytest.raises(NotRewritten, match="does not reproduce the forward") as refused:
            self_check(replace(made.program, **graphs), made.captured.forward, False)
        reason = refused.value.declined[0].reason
        assert "differ by" in reason or "times as far from float32" in reason


@HALVES
def test_a_mistake_in_one_layer_of_a_shallow_network_does_not(dtype: torch.dtype) -> None:
    model, made = compiled(dtype, 2)
    assert made.program is not None and made.captured.forward is not None
    for fault in FAULTS:
        for site in (0, 1):
            wrong = replace(made.program, dense=with_fault(made.program.dense, fault, site))
            model.draw(0)
            with pytest.raises(NotRewritten, match="does not reproduce the forward"):
                self_check(wrong, made.captured.forward, False)


@HALVES
def test_a_state_that_forgets_does_not(dtype: torch.dtype) -> None:
    _, made = compiled(dtype, 2, "hybrid")
    assert made.program is not None
    check_splits(made.program, made.program)
    forgetful = with_fault(made.program.policy, "state not updated")
    with pytest.raises(NotRewritten, match="depends on how the tokens are split"):
        check_splits(replace(made.program, policy=forgetful), made.program)


def test_a_trained_network_passes_where_one_token_is_far_off() -> None:
    """Over 512 tokens rounding moves a logit of this one by 5 % of the largest."""
    made = build(BYTES_SMALL, "dense", dtype="float16", max_context=512, kernels="off")
    figures = made.report.self_check
    assert figures["tokens"] > 512 and figures["error_over_eager"] < 1.5


def test_what_runs_in_16_bit_alone_is_held_to_the_band(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = compiled(torch.bfloat16, 2)
    assert made.program is not None
    model.draw(0)

    def strict(tokens: Tensor) -> Tensor:
        logits = forward(model, tokens)
        if logits.dtype != torch.bfloat16:
            raise TypeError("bfloat16 alone")
        return logits

    figures = self_check(made.program, strict, False)
    assert "bfloat16 alone" in figures["not_run_in_float32"] and "error_over_eager" not in figures
    wrong = replace(made.program, dense=with_fault(made.program.dense, "no scale"))
    with pytest.raises(NotRewritten, match="does not reproduce the forward"):
        self_check(wrong, strict, False)


def test_float32_is_what_the_same_weights_give_in_float32() -> None:
    model, _ = compiled(torch.bfloat16, 2)
    tokens = torch.arange(20)[None] % 29
    with InFloat32():
        exact = forward(model, tokens)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    wide = type(model)(0).to(torch.bfloat16).float()
    wide.load_state_dict(model.state_dict())
    assert exact.dtype == torch.float32 and torch.equal(exact, forward(wide, tokens))
    table: Any = torch.zeros(3, dtype=torch.float16)
    with InFloat32(), pytest.raises(TypeError, match=r"writes to a torch\.float16 tensor"):
        table.add_(1)


def test_what_is_not_a_number_is_no_rounding() -> None:
    exact = torch.randn(2, 5, 7)
    eager = exact.to(torch.float16)
    assert error_over_eager(eager, eager, exact) == 1.0
    broken = eager.clone()
    broken[1, 2, 3] = float("nan")
    assert not error_over_eager(broken, eager, exact) <= 1e9
    assert farthest(exact.to(torch.float16), exact) < 0.02 < farthest(exact.bfloat16(), exact)
