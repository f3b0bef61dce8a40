"""The algebra of exact values against the tensors they stand for."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.passes.exact import Affine, Steps, add, align, compact, compare, mask_rule, scale
from memcompile.passes.result import MaskRule

SIZE = 9
numbers = st.integers(-6, 6)
RELATIONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


def dense(value: Affine | Steps) -> torch.Tensor:
    """The [SIZE, SIZE] tensor that an exact value over two token axes describes."""
    i, j = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    index = (i, j)
    if isinstance(value, Affine):
        return (
            sum((c * index[a] for a, c in value.coefficients), torch.tensor(value.offset)) + 0 * i
        )
    if value.is_uniform:
        return torch.full((SIZE, SIZE), value.value)
    distance = index[value.row] - index[value.col]
    return torch.tensor([[value.at(int(d)) for d in row] for row in distance])


affine = st.builds(lambda offset, a, b: Affine.of(offset, {0: a, 1: b}), numbers, numbers, numbers)
steps = st.builds(
    lambda breaks, values, turned: compact(
        Steps(
            tuple(sorted(breaks)),
            tuple(values[: len(breaks) + 1]),
            *((1, 0) if turned else (0, 1)),
        )
    ),
    st.sets(numbers, max_size=4),
    st.lists(numbers, min_size=5, max_size=5),
    st.booleans(),
)


@given(affine, affine, numbers)
def test_add_and_scale(a, b, factor):
    total = add(a, b, factor)
    assert total is not None
    assert torch.equal(dense(total), dense(a) + factor * dense(b))
    if isinstance(a, Affine):
        assert torch.equal(dense(scale(a, factor)), factor * dense(a))


@given(affine, affine, st.sampled_from(RELATIONS))
def test_compare_is_right_or_unknown(a, b, relation):
    known = compare(relation, a, b)
    if known is not None:
        assert torch.equal(dense(known), relation(dense(a), dense(b)))


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("offset", [-2, 0, 3])
@pytest.mark.parametrize("slope", [1, -1, 2])
def test_compare_knows_every_distance(relation, offset, slope):
    known = compare(relation, Affine.of(offset, {0: slope}), Affine.of(0, {1: slope}))
    assert known is not None
    expected = relation(dense(Affine.of(offset, {0: slope})), dense(Affine.of(0, {1: slope})))
    assert torch.equal(dense(known), expected)


@given(steps)
def test_flipped_is_the_same_tensor(value):
    if not value.is_uniform:
        assert torch.equal(dense(value.flipped()), dense(value))


@given(steps, steps)
def test_align_keeps_both(a, b):
    aligned = align([a, b])
    assert aligned is not None
    breaks, pieces, row, col = aligned
    for value, part in zip((a, b), pieces, strict=True):
        assert torch.equal(dense(Steps(breaks, tuple(part), row, col)), dense(value))


def test_align_refuses_other_axes():
    one, other = Steps((0,), (0, 1), 0, 1), Steps((0,), (0, 1), 1, 2)
    assert align([one, other]) is None


INF = float("inf")


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (Steps((0,), (False, True), 0, 1), MaskRule("causal")),
        (Steps((1,), (True, False), 1, 0), MaskRule("causal")),
        (Steps((0,), (-INF, 0.0), 0, 1), MaskRule("causal")),
        (Steps((0,), (-10000.0, 0.0), 0, 1), MaskRule("causal")),
        (Steps((0, 7), (False, True, False), 0, 1), MaskRule("window", 7)),
        (Steps.uniform(True), MaskRule("full")),
        (Steps.uniform(0.0), MaskRule("full")),
    ],
)
def test_mask_rule(mask, rule):
    assert mask_rule(mask, 2) == rule


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Steps((1,), (False, True), 0, 1), "visible at distances [1, inf)"),
        (Steps((-3,), (False, True), 0, 1), "visible at distances [-3, inf)"),
        (Steps((0, 2, 4), (False, True, False, True), 0, 1), "[0, 2) or [4, inf)"),
        (Steps((0,), (-5.0, 0.0), 0, 1), "adds -5"),
        (Steps((0, 3), (-INF, 0.0, 1.5), 0, 1), "adds 1.5"),
        (Steps.uniform(False), "distances none"),
        (Steps((0,), (False, True), 1, 2), "query and the key axis"),
    ],
)
def test_mask_rule_says_why_not(mask, reason):
    told = mask_rule(mask, 2)
    assert isinstance(told, str)
    assert reason in told


def test_mask_rule_is_validated():
    with pytest.raises(ValueError, match="known rules are causal, window, full"):
        MaskRule("prefix")
    with pytest.raises(ValueError, match="window=0"):
        MaskRule("window")
