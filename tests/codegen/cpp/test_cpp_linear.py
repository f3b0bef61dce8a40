"""The linear layer for few rows against float64, and its way to at::linear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close_to_float64

from memcompile.codegen.cpp import linear

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (*range(1, 10), 16, 17, 40, 130)
few = settings(max_examples=60)


@pytest.fixture(scope="module")
def operator():
    return linear.load()


def between_nan(rows: int, width: int, dtype: torch.dtype, make: torch.Generator) -> torch.Tensor:
    """A random matrix in memory whose neighbours on both sides are NaN."""
    around = torch.full((rows + 2, width), torch.nan, dtype=dtype)
    around[1:-1] = torch.randn(rows, width, generator=make)
    return around[1:-1]


def check(operator, dtype: torch.dtype, rows: int, out: int, width: int, bias: bool, seed: int):
    make = torch.Generator().manual_seed(seed)
    input = between_nan(rows, width, dtype, make)
    weight = between_nan(out, width, dtype, make)
    added = torch.randn(out, generator=make).to(dtype) if bias else None
    result = operator(input, weight, added)
    assert result.dtype == dtype and result.is_contiguous()
    truth = F.linear(input.double(), weight.double(), None if added is None else added.double())
    assert_close_to_float64(result, F.linear(input, weight, added), truth, reduction=width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@few
@given(
    rows=st.sampled_from(ROWS), out=st.integers(1, 200), width=st.integers(1, 300),
    bias=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_equals_float64(dtype, rows, out, width, bias, seed, operator) -> None:
    check(operator, dtype, rows, out, width, bias, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 33, 300])
def test_wide_layers_on_all_threads(dtype, rows, operator) -> None:
    check(operator, dtype, rows, 700, 1500, False, seed=rows)


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_the_same_whatever_the_threads(rows, operator) -> None:
    weight, input = torch.randn(501, 384).bfloat16(), torch.randn(rows, 384).bfloat16()
    many = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(operator(input, weight, None))
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(many)


@pytest.mark.parametrize("shape", [(24,), (1, 1, 24), (2, 3, 24), (0, 24), (2, 0, 24)])
def test_leading_dimensions_are_kept(shape, operator) -> None:
    weight, input = torch.randn(5, 24).bfloat16(), torch.randn(shape).bfloat16()
    result = operator(input, weight, None)
    assert result.shape == (*shape[:-1], 5)
    assert torch.equal(result, operator(input.reshape(-1, 24), weight, None).view(result.shape))


def test_any_layout(operator) -> None:
    """Inputs with gaps are copied, weights with gaps are left to at::linear."""
    weight, input = torch.randn(6, 32).bfloat16(), torch.randn(4, 2, 32).bfloat16()
    expected = operator(input, weight, None)
    gaps = input.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(operator(gaps, weight, None), expected)
    transposed = weight.t().contiguous().t()
    assert_close_to_float64(
        operator(input, transposed, None), expected,
        F.linear(input.double(), weight.double()), reduction=32,
    )  # fmt: skip
    bias = torch.randn(12).bfloat16()[::2]
    assert torch.equal(operator(input, weight, bias), operator(input, weight, bias.contiguous()))


def test_other_dtypes_are_left_to_torch(operator) -> None:
    weight, input = torch.randn(6, 32, dtype=torch.float64), torch.randn(4, 32, dtype=torch.float64)
    assert torch.equal(operator(input, weight, None), F.linear(input, weight))


def test_nothing_spreads(operator) -> None:
    """What is not a number stays in its row and column."""
    for rows in (1, 2, 8, 11):
        input, weight = torch.randn(rows, 100).bfloat16(), torch.randn(30, 100).bfloat16()
        input[0, 99], weight[7, 0] = torch.nan, torch.inf
        result = operator(input, weight, None)
        assert result[0].isnan().all()
        finite = result[1:].isfinite()
        assert not finite[:, 7].any() and finite.sum() == (rows - 1) * 29


def test_what_is_wrong_is_said_by_torch(operator) -> None:
    weight = torch.randn(6, 32).bfloat16()
    with pytest.raises(RuntimeError, match=r"mat1 and mat2|shapes|size"):
        operator(torch.randn(4, 31).bfloat16(), weight, None)
    with pytest.raises(RuntimeError, match="type"):
        operator(torch.randn(4, 32), weight, None)
    with pytest.raises(RuntimeError):
        operator(torch.randn(4, 32).bfloat16(), weight, torch.randn(5).bfloat16())


def test_as_an_operator(operator) -> None:
    weight, bias = torch.randn(6, 32), torch.randn(6)
    for input in (torch.randn(2, 32), torch.randn(2, 1, 32), torch.randn(300, 32)):
        torch.library.opcheck(
            operator, (input, weight, bias), test_utils=("test_schema", "test_faketensor")
        )
