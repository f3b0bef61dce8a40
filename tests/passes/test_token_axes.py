"""Views and broadcasts: an axis that is said to hold the tokens does."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from memcompile.passes.token_axes import BATCH, TOKEN, Extents, Refused, broadcast, reshape

B, T = sympy.symbols("B T", integer=True, positive=True)
EXTENTS = Extents(B, T)
SIZES = {BATCH: 3, TOKEN: 5}


def size(axis) -> int:
    product = 1
    for atom in axis:
        product *= SIZES.get(atom, atom)
    return product


def coordinate(tensor: torch.Tensor, axes, wanted: str) -> torch.Tensor:
    """For every element, the index along `wanted` that its place claims."""
    claimed = torch.zeros(tensor.shape, dtype=torch.int64)
    for i, axis in enumerate(axes):
        if wanted not in axis:
            continue
        after = size(axis[axis.index(wanted) + 1 :])
        index = (torch.arange(tensor.shape[i]) // after) % SIZES[wanted]
        claimed += index.reshape([-1 if k == i else 1 for k in range(tensor.dim())])
    return claimed


atoms = st.permutations([BATCH, TOKEN, 2, 4])


@st.composite
def grouping(draw, order):
    """`order` cut into axes; numbers may be split or joined."""
    axes, current = [], []
    for atom in order:
        parts = [2, 2] if atom == 4 and draw(st.booleans()) else [atom]
        for part in parts:
            current.append(part)
            if draw(st.booleans()):
                axes.append(tuple(current))
                current = []
    return (*axes, tuple(current)) if current else tuple(axes)


@given(st.data())
def test_reshape_is_right_or_refused(data):
    before = data.draw(grouping(data.draw(atoms)))
    after = data.draw(grouping(data.draw(atoms)))
    sizes = [sympy.Mul(*[{BATCH: B, TOKEN: T}.get(a, a) for a in axis]) for axis in after]
    try:
        axes = reshape(before, sizes, EXTENTS)
    except Refused:
        return
    source = torch.empty([size(axis) for axis in before])
    for wanted in (BATCH, TOKEN):
        truth = coordinate(source, before, wanted).reshape([size(axis) for axis in after])
        assert torch.equal(coordinate(truth, axes, wanted), truth)


@given(st.data())
def test_reshape_accepts_the_same_order(data):
    order = data.draw(atoms)
    before, after = data.draw(grouping(order)), data.draw(grouping(order))
    sizes = [sympy.Mul(*[{BATCH: B, TOKEN: T}.get(a, a) for a in axis]) for axis in after]
    assert [size(axis) for axis in reshape(before, sizes, EXTENTS)] == [size(a) for a in after]


@pytest.mark.parametrize("sizes", [(T, B, 8), (B, 8, T), (T, 8 * B), (B, T, 4), (2 * B, T, 4)])
def test_reshape_refuses_mixing(sizes):
    with pytest.raises(Refused):
        reshape(((BATCH,), (TOKEN,), (8,)), [sympy.sympify(s) for s in sizes], EXTENTS)


@pytest.mark.parametrize("bad", [T + 1, T - 1, T**2, sympy.floor(T / 2), T / 2])
def test_other_sizes_are_refused(bad):
    with pytest.raises(Refused, match="no multiple of the number of tokens"):
        EXTENTS.axis(bad)


def test_broadcast():
    token, batch = (TOKEN,), (BATCH,)
    assert broadcast([(batch, token, (4,)), ((4,),)]) == (batch, token, (4,))
    assert broadcast([(batch, (), token), (token, ())]) == (batch, token, token)
    for a, b in itertools.permutations([token, batch, (4,)], 2):
        with pytest.raises(Refused, match="two different axes"):
            broadcast([(a,), (b,)])
