"""Tolerance that is measured: how far plain eager stands from float64 decides what is close."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def assert_close_to_float64(
    actual: Tensor,
    eager: Tensor,
    float64_reference: Tensor,
    *,
    reduction: int = 1,
    logarithm: bool = False,
) -> None:
    """Asserts error(actual) <= 2 * error(eager) + eps * sqrt(reduction) * max|reference|.

    Args:
        actual: what is tested.
        eager: plain eager's result in the precision under test; its dtype sets eps.
        float64_reference: the truth. Infinite entries must be met exactly; NaN is never right.
        reduction: terms summed into one entry (keys times their width, say).
        logarithm: the entries are logarithms of sums, where a relative error of the sum is an
            absolute one: max|reference| counts as at least 1.
    """
    assert float64_reference.dtype == torch.float64, "the reference must be computed in float64"
    assert actual.shape == eager.shape == float64_reference.shape, (
        f"shapes differ: actual {tuple(actual.shape)}, eager {tuple(eager.shape)}, "
        f"reference {tuple(float64_reference.shape)}"
    )
    if not actual.numel():
        return
    finite = float64_reference.isfinite()
    for name, tensor in (("actual", actual), ("eager", eager)):
        same = torch.where(finite, tensor.isfinite(), tensor.double() == float64_reference)
        assert bool(same.all()), (
            f"{name} has {int((~same).sum())} of {same.numel()} entries that are not finite where "
            "the reference is, or differ from an infinite entry of the reference"
        )
    truth = torch.where(finite, float64_reference, 0)
    error, allowed = (
        float((torch.where(finite, tensor.double(), 0) - truth).abs().max())
        for tensor in (actual, eager)
    )
    size = max(float(truth.abs().max()), float(logarithm))
    band = rounding_band(eager.dtype, reduction) * size
    assert error <= 2 * allowed + band, (
        f"error {error:.3e} against float64 exceeds 2 x eager's {allowed:.3e} + the rounding band "
        f"{band:.3e} of {eager.dtype}"
    )


def rounding_band(dtype: torch.dtype, reduction: int = 1) -> float:
    """Relative error that rounding alone leaves in a sum of `reduction` terms."""
    return torch.finfo(dtype).eps * math.sqrt(reduction)
