"""Generated C++ choice among candidates: the reference's lists wherever scores are exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_cpp_fold as fold
import test_cpp_score_select as select
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import Shape, shapes
from level_case import candidates, draw, lay_out_fold
from torch import Tensor

from memcompile.codegen import cpp
from memcompile.codegen.spec import SCORE_TERMS, KernelSpec
from memcompile.models.memory.levels import score_select_among

BESIDE = select.SPECS[:2]
SPECS = [
    *(replace(spec, among=True) for spec in BESIDE),
    replace(select.SPECS[2], among=True, page_size=250_000),
]
BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.fixture(scope="module")
def operators():
    return cpp.load([*SPECS, *BESIDE])


def call(case: select.Case, lists: Tensor, numbers: tuple[int, ...], operators) -> Tensor:
    at = (case.table, lists, case.position, case.lengths)
    return operators[case.spec](case.query, *case.records, *at, *numbers)


def expected(case: select.Case, lists: Tensor, numbers: tuple[int, ...]) -> Tensor:
    s = case.spec
    given: tuple[Any, ...] = (case.query.float(), [record.float() for record in case.records])
    at = (list(s.score_fields), case.table, lists, case.position, case.lengths)
    return score_select_among(*given, *at, s.score, s.page_size, *numbers)


def check(case: select.Case, lists: Tensor, numbers: tuple[int, ...], operators) -> Tensor:
    got = call(case, lists, numbers, operators)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected(case, lists, numbers))
    return got


def check_scaled(s: KernelSpec, shape: Shape, odd: float, width: int, *rest: Any) -> None:
    """Positions of the shape count 32nds of a page, so that pages of any size have some."""
    shape = replace(shape, position=tuple(p * s.page_size // 32 for p in shape.position))
    case = select.lay_out(s, shape, select.whole, odd / s.key_dim)
    check(case, candidates(case.table, shape.rows, width, shape.seed), *rest)


limits = st.tuples(*map(st.integers, (0, 0, 0), (2, 2, 12)))  # sinks, window, budget


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=12)
@given(
    shape=shapes(longest=900), odd=st.sampled_from((0, 0.3)), width=st.integers(0, 40),
    numbers=limits,
)  # fmt: skip
def test_ties_included_when_scores_are_exact(name, shape, odd, width, numbers, operators) -> None:
    check_scaled(BY_NAME[name], shape, odd, width, numbers, operators)


@pytest.mark.parametrize("beside", BESIDE, ids=lambda spec: spec.name)
@pytest.mark.parametrize("threads", [1, 5])
def test_of_all_pages_it_chooses_what_score_select_does(beside, threads, operators) -> None:
    s, choice = replace(beside, among=True), select.Choice(more=20)
    many = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in (
            Shape((s.page_size * 700,), (1,), kv_heads=1, holes=3),
            Shape((s.page_size * 90, 40, 3), (19, 0, 2), rows=19, holes=3, seed=1),
        ):
            case = select.lay_out(s, shape)
            every = torch.arange(case.table.shape[2], dtype=torch.int32)
            lists = every.expand(*case.table.shape[:2], shape.rows, -1)
            numbers = (choice.sinks, choice.window, choice.budget)
            got = call(case, lists, numbers, operators)
            wanted = replace(case, spec=beside).kernel(operators[beside], choice)
            assert torch.equal(got, wanted[..., : choice.budget])
    finally:
        torch.set_num_threads(many)


def test_pages_of_a_quarter_million_tokens(operators) -> None:
    s = SPECS[2]
    shape = Shape((s.page_size * 60 + 5, 7), (2, 1), rows=2, holes=5)
    case = select.lay_out(s, shape, select.whole)
    got = check(case, candidates(case.table, 2, 50), (1, 1, 9), operators)
    assert (got[0] >= 0).sum() == 2 * 2 * 9


@pytest.mark.parametrize("numbers", [(0, 0, 30), (9, 4, 8), (0, 60, 8), (3, 3, 0)], ids=str)
def test_no_record_is_read_where_scores_do_not_choose(numbers, operators) -> None:
    """Everything fits, or the first and last pages fill the list, or there is no list."""
    case = select.lay_out(SPECS[0], Shape((64 * 40,), (2,), rows=2))
    lists = torch.arange(10, 42).int()[: 30 if numbers[2] == 30 else None]
    lists = torch.cat([torch.arange(9).int(), lists]) if numbers[0] else lists
    lists = lists.expand(1, 2, 2, -1).contiguous()
    case.table = torch.where(case.table >= 0, 10**8, -1).int()  # nowhere to read
    wanted = expected(replace(case, table=case.table.clamp_max(0)), lists, numbers)
    assert torch.equal(call(case, lists, numbers, operators), wanted)


def test_only_records_of_candidates_are_read(operators) -> None:
    case = select.lay_out(SPECS[0], Shape((64 * 40,), (3,), rows=3), select.whole)
    lists = candidates(case.table, 3, 25)
    wanted = expected(case, lists, (1, 1, 8))
    named = torch.zeros(case.table.shape, dtype=torch.bool)
    for b, h in torch.cartesian_prod(*map(torch.arange, case.table.shape[:2])).tolist():
        inside = lists[b, h][(lists[b, h] >= 1) & (lists[b, h] < 39)]
        named[b, h, inside.long()] = True
    case.table = torch.where(named, case.table, 10**8).int()
    assert torch.equal(call(case, lists, (1, 1, 8), operators), wanted)


def test_strided_candidates_and_empty_calls(operators) -> None:
    case = select.lay_out(SPECS[1], Shape((500, 80), (5, 2), rows=5), select.whole)
    lists, numbers = candidates(case.table, 5, 12), (1, 1, 6)
    plain = check(case, lists, numbers, operators)
    spread = lists.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(call(case, spread, numbers, operators), plain)
    by_row = lists.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(call(case, by_row, numbers, operators), plain)
    case.query, lists = case.query[:, :, :0], lists[:, :, :0]
    assert call(case, lists, numbers, operators).shape == (2, 2, 0, 6)


def test_wrong_candidates_are_refused(operators) -> None:
    case = select.lay_out(SPECS[1], Shape((500,), (5,), rows=5))
    lists = candidates(case.table, 5, 12)
    with pytest.raises(TypeError, match=r"candidates is Long; this kernel reads Int"):
        call(case, lists.long(), (1, 1, 6), operators)
    with pytest.raises(ValueError, match=r"candidates is \[1, 2, 4, 12\]; this call needs"):
        call(case, lists[:, :, :4], (1, 1, 6), operators)


@pytest.mark.long
@pytest.mark.parametrize("batch", range(5))
def test_specs_that_nobody_chose(batch: int) -> None:
    """Choices and folds drawn over the whole coverage, on random memories."""
    specs = [draw(seed) for seed in range(8 * batch, 8 * batch + 8)]
    loaded = cpp.load(specs)

    @settings(max_examples=10)
    @given(shape=shapes(longest=900), numbers=limits, ratio=st.integers(1, 9))
    def on_any_memory(shape: Shape, numbers: tuple[int, ...], ratio: int) -> None:
        for spec in specs:
            if spec.fold:
                laid = lay_out_fold(spec, shape.position, shape.lengths, 4, ratio)
                fold.run(laid, loaded).check()
            else:
                check_scaled(spec, shape, 0, 30, numbers, loaded)

    on_any_memory()


def test_golden_source(golden) -> None:
    golden(f"{SPECS[0].name}.cpp", cpp.source(SPECS[0]))


@pytest.mark.parametrize("score", SCORE_TERMS)
@pytest.mark.parametrize("group", [1, 5, 130])
def test_every_spec_prints_readable_source(score: str, group: int) -> None:
    made = KernelSpec("score_select", "float16", 40, group=group, score=score, among=True)
    assert "Plan" not in cpp.source(made)
