"""Generated C++ merging of reads against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_float64

from memcompile.codegen import cpp
from memcompile.codegen.spec import KernelSpec
from memcompile.models.memory import paged

SPECS = [KernelSpec("combine", value_dim=dim, count=count) for dim, count in ((128, 2), (40, 3))]


@pytest.fixture(scope="module")
def operators():
    return cpp.load(SPECS)


def reads(spec: KernelSpec, shape: tuple[int, int, int], seed: int) -> list[torch.Tensor]:
    """Outs and lses by turns; some rows unseen by some reads, some by none."""
    make = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(spec.count):
        out = torch.randn(*shape, spec.value_dim, generator=make)
        lse = torch.randn(shape, generator=make) * 40
        unseen = torch.rand(shape, generator=make) < 0.4
        parts += [out.masked_fill_(unseen[..., None], 0), lse.masked_fill_(unseen, -math.inf)]
    return parts


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 70)),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(spec, shape, seed, operators) -> None:
    parts = reads(spec, shape, seed)
    results = operators[spec](*parts)
    wide = [part.double() for part in parts]
    truth = paged.combine(wide[::2], wide[1::2])
    eager = paged.combine(parts[::2], parts[1::2])
    for result, plain, right in zip(results, eager, truth, strict=True):
        assert_close_to_float64(result, plain, right, reduction=spec.count, logarithm=True)


def test_reads_with_gaps_are_copied(operators) -> None:
    parts = reads(SPECS[0], (2, 4, 5), 0)
    expected = operators[SPECS[0]](*parts)
    gaps = [part.transpose(0, 1).contiguous().transpose(0, 1) for part in parts]
    assert all(map(torch.equal, operators[SPECS[0]](*gaps), expected))


def test_wrong_tensors_are_refused(operators) -> None:
    out, lse, *rest = reads(SPECS[0], (1, 2, 3), 0)
    with pytest.raises(TypeError, match="out is Double; this kernel reads Float"):
        operators[SPECS[0]](out.double(), lse, *rest)
    with pytest.raises(ValueError, match=r"lse is \[1, 2, 2\]; this call needs \[1, 2, 3\]"):
        operators[SPECS[0]](out, lse[..., :2], *rest)
    with pytest.raises(ValueError, match=r"out0 must be \[B, H, n, 128\], got \[1, 2, 3, 64\]"):
        operators[SPECS[0]](out[..., :64], lse, *rest)


def test_golden_source(golden) -> None:
    golden(f"{SPECS[0].name}.cpp", cpp.source(SPECS[0]))
