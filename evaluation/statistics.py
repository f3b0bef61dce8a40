"""Means and paired differences with bootstrap intervals; the prompt is what is drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
_SEED = 20240607


@dataclass(frozen=True)
class Interval:
    """A mean and the interval around it.

    Attributes:
        mean: of the sample.
        low, high: the interval at `CONFIDENCE`.
        samples: prompts in it.
    """

    mean: float
    low: float
    high: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(values: Sequence[float], low: float, high: float) -> Interval:
    """The mean of `values` and its bootstrap interval, clipped to the scale `low` .. `high`.

    The interval is the bias-corrected and accelerated bootstrap (Efron 1987). Where all values are
    alike the bootstrap knows no spread and would claim certainty; there the interval reaches as
    far as a share p of values at the other end of the scale that n draws miss with probability
    1 - CONFIDENCE: p = 1 - (1 - CONFIDENCE)^(1/n), about 3/n.

    Raises:
        ValueError: no values, or values outside of the scale.
    """
    if not len(values):
        raise ValueError("a mean of no values; give at least one")
    sample = np.asarray(values, np.float64)
    if not (low <= sample.min() and sample.max() <= high):
        raise ValueError(f"values from {sample.min()} to {sample.max()} outside of {low} to {high}")
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        unseen = 1 - (1 - CONFIDENCE) ** (1 / len(sample))
        bounds = mean - unseen * (mean - low), mean + unseen * (high - mean)
    else:
        bounds = _bootstrap(sample)
    return Interval(mean, max(low, bounds[0]), min(high, bounds[1]), len(sample))


def paired_interval(
    values: Sequence[float], reference: Sequence[float], low: float = -1.0, high: float = 1.0
) -> Interval:
    """The mean of values - reference, prompt by prompt, and its interval: see `mean_interval`.

    Args:
        low, high: the smallest and the largest difference that the scale allows.

    Raises:
        ValueError: not as many values as references.
    """
    if len(values) != len(reference):
        raise ValueError(f"{len(values)} values and {len(reference)} references make no pairs")
    return mean_interval(
        [a - b for a, b in zip(values, reference, strict=True)], low=low, high=high
    )


def _bootstrap(sample: np.ndarray) -> tuple[float, float]:
    from scipy import stats

    found = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(_SEED),
    ).confidence_interval
    if np.isnan(found.low) or np.isnan(found.high):
        # The acceleration is undefined for samples such as two values.
        found = stats.bootstrap(
            (sample,),
            np.mean,
            confidence_level=CONFIDENCE,
            n_resamples=RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(_SEED),
        ).confidence_interval
    return float(found.low), float(found.high)
