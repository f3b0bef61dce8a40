"""Intervals: what they hold, that they do not flatter, and that they cover."""

from __future__ import annotations

import numpy as np
import pytest

from memcompile.evaluation.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    mean_interval,
    paired_interval,
)


def test_an_interval_is_the_bootstrap_s() -> None:
    sample = np.random.default_rng(0).normal(0.5, 0.1, 60).clip(0, 1)
    found = mean_interval([*sample], 0, 1)
    drawn = np.random.default_rng(1).choice(sample, (RESAMPLES, 60)).mean(1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # Two bootstraps of a symmetric sample differ by their draws alone.
    noise = 4 * sample.std() / np.sqrt(60) / np.sqrt(RESAMPLES * 0.025 * 0.975) / 0.05
    assert found.mean == pytest.approx(sample.mean())
    assert abs(found.low - low) < noise and abs(found.high - high) < noise
    assert found.samples == 60 and found == mean_interval([*sample], 0, 1)


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(60):
        found = mean_interval([*(generator.random(40) < 0.7).astype(float)], 0, 1)
        missed += not found.low <= 0.7 <= found.high
    # 3 expected; a twentieth of that many runs would have more than 8 by chance if it were 5.
    assert missed <= 8


@pytest.mark.parametrize(("count", "unseen"), [(1, 0.95), (25, 0.1129), (100, 0.0295)])
def test_a_sample_without_spread_claims_no_certainty(count: int, unseen: float) -> None:
    sure = mean_interval([1.0] * count, 0, 1)
    assert (sure.mean, round(sure.low, 4), sure.high) == (1.0, round(1 - unseen, 4), 1.0)
    none = paired_interval([0.0] * count, [0.0] * count)
    assert round(none.low, 4) == -unseen and none.high == -none.low


def test_pairs_see_what_means_cannot() -> None:
    generator = np.random.default_rng(0)
    dense = generator.random(40)
    worse = [*(dense - generator.random(40) / 10)]
    apart = mean_interval([value - min(worse) for value in worse], 0, 2)
    paired = paired_interval(worse, [*dense])
    assert paired.high < 0
    assert paired.high - paired.low < (apart.high - apart.low) / 4


def test_few_values_still_have_an_interval() -> None:
    found = mean_interval([0.0, 1.0], 0, 1)
    assert isinstance(found, Interval) and 0 <= found.low < 0.5 < found.high <= 1
    assert found.to_json() == {"mean": 0.5, "low": found.low, "high": found.high, "samples": 2}


def test_samples_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="a mean of no values"):
        mean_interval([], 0, 1)
    with pytest.raises(ValueError, match=r"outside of 0 to 1"):
        mean_interval([0.5, 1.5], 0, 1)
    with pytest.raises(ValueError, match="2 values and 1 references"):
        paired_interval([1.0, 0.0], [1.0])
