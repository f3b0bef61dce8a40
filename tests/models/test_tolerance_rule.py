"""The tolerance rule itself: it passes what eager earns, and nothing else."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_float64, rounding_band

TRUTH = torch.tensor([1.0, -4.0, float("-inf")], dtype=torch.float64)
EAGER = TRUTH.float()


def test_twice_eagers_error_and_the_band_are_allowed() -> None:
    eager = EAGER + torch.tensor([0.25, 0, 0])
    assert_close_to_float64(EAGER + torch.tensor([0, 0.5, 0]), eager, TRUTH)
    assert_close_to_float64(EAGER, EAGER, TRUTH)
    assert_close_to_float64(EAGER[:0], EAGER[:0], TRUTH[:0])
    band = rounding_band(torch.float32, 16) * 4
    assert_close_to_float64(EAGER.double() + band / 2, EAGER, TRUTH, reduction=16)


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (EAGER + torch.tensor([0, 0.75, 0]), "exceeds 2 x eager's"),
        (EAGER.nan_to_num(neginf=float("nan")), "not finite where"),
        (-EAGER, "differ from an infinite entry"),
        (EAGER[:2], "shapes differ"),
    ],
)
def test_more_is_refused(actual: torch.Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close_to_float64(actual, EAGER + torch.tensor([0.25, 0, 0]), TRUTH)


def test_the_reference_must_be_float64() -> None:
    with pytest.raises(AssertionError, match="computed in float64"):
        assert_close_to_float64(EAGER, EAGER, EAGER)


def test_a_logarithm_near_zero_is_held_to_the_error_of_its_sum() -> None:
    truth = torch.tensor([1e-3], dtype=torch.float64)
    off = truth + torch.finfo(torch.float64).eps / 2
    assert_close_to_float64(off, truth, truth, logarithm=True)
    with pytest.raises(AssertionError, match="exceeds 2 x eager's"):
        assert_close_to_float64(off, truth, truth)
