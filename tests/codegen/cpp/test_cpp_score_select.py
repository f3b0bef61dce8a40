"""Generated C++ selection: lists equal to the reference's wherever rounding leaves no choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import Shape, shapes
from tolerance import assert_close_to_float64, rounding_band
from torch import Tensor

from memcompile.codegen import cpp
from memcompile.codegen.spec import SCORE_TERMS, KernelSpec
from memcompile.models.memory.paged import rows_by_kv_head, token_of_row
from memcompile.models.memory.parts import field_width
from memcompile.models.memory.records import (
    page_scores,
    score_select,
    score_select_page_logits,
)


def spec(
    dtype: str, dim: int, group: int, page_size: int, score: str, page_logits: bool = False
) -> KernelSpec:
    return KernelSpec(
        "score_select", dtype, key_dim=dim, group=group, page_size=page_size, score=score,
        page_logits=page_logits,
    )  # fmt: skip


SPECS = [
    spec("bfloat16", 128, 4, 64, "mean-std"),
    spec("float32", 40, 3, 16, "ball"),
    spec("float16", 80, 7, 32, "box"),
    spec("bfloat16", 8, 1, 16, "mean"),
    spec("float32", 256, 8, 128, "mean-std"),
    spec("bfloat16", 64, 33, 16, "box"),
    spec("bfloat16", 128, 4, 64, "mean-std", page_logits=True),
    spec("float32", 40, 3, 16, "ball", page_logits=True),
    spec("float16", 80, 7, 32, "box", page_logits=True),
    spec("bfloat16", 8, 1, 16, "mean", page_logits=True),
]
BY_NAME = {spec.name: spec for spec in SPECS}


@pytest.fixture(scope="module")
def operators():
    return cpp.load(SPECS)


@dataclass(frozen=True)
class Choice:
    """What a call asks for, in pages; `dense_below` in pages too, less some tokens."""

    sinks: int = 1
    window: int = 1
    more: int = 3
    dense_below: int = 0

    @property
    def budget(self) -> int:
        return self.sinks + self.window + 1 + self.more

    def numbers(self, page_size: int) -> tuple[int, ...]:
        """sink_pages, window_pages, capacity, budget_pages, dense_below."""
        dense = max(0, self.dense_below * page_size - 5)
        capacity = max(self.budget, self.dense_below) + 1
        return self.sinks, self.window, capacity, self.budget, dense


choices = st.builds(
    Choice, st.integers(0, 2), st.integers(0, 2), st.integers(0, 9), st.sampled_from((0, 0, 4))
)


@dataclass
class Case:
    spec: KernelSpec
    query: Tensor  # NaN in padding rows
    records: list[Tensor]  # NaN for pages that are not full
    table: Tensor
    position: Tensor
    lengths: Tensor

    def kernel(self, operator, choice: Choice) -> Tensor:
        """The lists; logits, if the spec has them, are compared with the reference's here."""
        at = (self.table, self.position, self.lengths)
        given = operator(self.query, *self.records, *at, *choice.numbers(self.spec.page_size))
        if not self.spec.page_logits:
            return given
        lists, logits = given
        eager, truth = (
            score_select_page_logits(*self.arguments(choice, dtype))[1]
            for dtype in (torch.float32, torch.float64)
        )
        assert logits.dtype == torch.float32 and logits.shape == truth.shape
        finite = truth.isfinite()
        assert torch.equal(logits.isfinite(), finite)
        assert logits[truth.isneginf() & eager.isneginf()].isneginf().all()
        parts = (torch.where(finite, each, 0) for each in (logits, eager, truth))
        assert_close_to_float64(*parts, reduction=self.spec.key_dim)
        return lists

    def reference(self, choice: Choice, dtype: torch.dtype = torch.float32) -> Tensor:
        return score_select(*self.arguments(choice, dtype))

    def arguments(self, choice: Choice, dtype: torch.dtype) -> tuple[Any, ...]:
        """What the references take."""
        s = self.spec
        return (
            self.query.to(dtype), [record.to(dtype) for record in self.records],
            list(s.score_fields), self.table, self.position, self.lengths, s.score, s.page_size,
            *choice.numbers(s.page_size),
        )  # fmt: skip

    def scores(self, dtype: torch.dtype) -> Tensor:
        """[B, Hkv, n, pages] of every page, whether it can be selected or not."""
        table = self.table.clamp_min(0).long()
        names = zip(self.spec.score_fields, self.records, strict=True)
        rows = rows_by_kv_head(self.query.to(dtype), table.shape[1])
        return page_scores(rows, {f: r[table].to(dtype) for f, r in names}, self.spec.score)


def normal(*size: int, make: torch.Generator) -> Tensor:
    return torch.randn(*size, generator=make)


def whole(*size: int, make: torch.Generator) -> Tensor:
    """Few whole numbers: their scores are exact in every precision, and often equal."""
    return torch.randint(-2, 3, size, generator=make).float()


def lay_out(
    spec: KernelSpec, shape: Shape, kind: Callable[..., Tensor] = normal, odd: float = 0
) -> Case:
    """Sequences `shape.holes` per cent of whose pages are missing.

    Args:
        kind: makes queries and records; whole() makes queries of norm 5.
        odd: the part of the records' numbers, and of the queries, that are not finite.
    """
    make = torch.Generator().manual_seed(shape.seed)
    batch, heads, size = len(shape.position), shape.kv_heads, spec.page_size
    columns = max(1, -(-shape.tokens // size) + shape.spare_columns)
    pool = batch * heads * columns + 3
    order = torch.randperm(pool, generator=make)[: batch * heads * columns]
    if shape.seed % 2:  # pages mostly lie as they follow each other
        order = torch.arange(batch * heads * columns) + 2
    table = order.int().view(batch, heads, columns)
    position, lengths = (
        torch.tensor(x, dtype=torch.int32) for x in (shape.position, shape.lengths)
    )
    records = [
        kind(pool, field_width(field, spec.key_dim, 0), make=make) for field in spec.score_fields
    ]
    if spec.score == "box":
        low, high = records[-2:]
        records[-2:] = [torch.minimum(low, high), torch.maximum(low, high)]
    elif spec.score != "mean":
        records[1] = records[1].abs()

    def spoil(tensor: Tensor, part: float) -> None:
        strange = torch.tensor([torch.nan, torch.inf, -torch.inf])
        which = torch.randint(3, tensor.shape, generator=make)
        place = torch.rand(tensor.shape, generator=make) < part
        tensor[place] = strange[which[place]]

    for record in records:
        spoil(record, odd)
    full = (torch.arange(columns) + 1) * size <= (position + lengths)[:, None, None]
    unfilled = torch.ones(pool, dtype=torch.bool)
    unfilled[order] = ~full.expand(-1, heads, -1).flatten()
    for record in records:
        record[unfilled] = torch.nan
    query = kind(batch, heads * spec.group, shape.rows, spec.key_dim, make=make)
    if kind is whole:
        some = torch.rand(query.shape, generator=make).topk(2).indices
        query = torch.zeros_like(query).scatter(
            3, some, torch.tensor([3.0, -4.0]).expand(some.shape)
        )
    spoil(query, odd / 20)
    query.masked_fill_((torch.arange(shape.rows) >= lengths[:, None])[:, None, :, None], torch.nan)
    gone = torch.rand(table.shape, generator=make) * 100 < shape.holes
    dtype = spec.torch_dtype
    return Case(
        spec, query.to(dtype), [record.to(dtype) for record in records],
        torch.where(gone, -1, table), position, lengths,
    )  # fmt: skip


def check_exact(case: Case, choice: Choice, operators) -> None:
    assert torch.equal(case.kernel(operators[case.spec], choice), case.reference(choice))


def check_close(case: Case, choice: Choice, operators) -> int:
    """Returns how many rows left rounding no choice."""
    got, expected = case.kernel(operators[case.spec], choice), case.reference(choice, torch.float64)
    assert got.dtype == torch.int32 and got.shape == expected.shape
    clear = (got == expected).all(-1)
    if clear.all():
        return clear.numel()
    truth, eager = case.scores(torch.float64), case.scores(torch.float32)
    token = token_of_row(case.position, case.lengths, case.query.shape[2])
    for b, h, i in (~clear).nonzero().tolist():
        mine, right = ([p for p in x[b, h, i].tolist() if p >= 0] for x in (got, expected))
        assert len(mine) == len(right) and mine == sorted(set(mine))
        assert got[b, h, i, len(mine) :].eq(-1).all()
        assert (case.table[b, h, mine] >= 0).all()
        open_page = int(token[b, i]) // case.spec.page_size
        for page in {*right} ^ {*mine}:
            assert choice.sinks <= page < open_page - choice.window, "a forced page is missing"
        candidates = torch.arange(choice.sinks, open_page - choice.window)
        score = truth[b, h, i]
        error = (score - eager[b, h, i])[candidates].abs().max()
        size = score[candidates].abs().max() + case.spec.key_dim
        band = 2 * error + rounding_band(torch.float32, 2 * case.spec.key_dim) * size
        worst_taken = score[[p for p in mine if p not in right]].min()
        best_left = score[[p for p in right if p not in mine]].max()
        assert worst_taken >= best_left - 2 * band, "a page is left out for one that scores lower"
        total_mine, total_right = score[mine].sum(), score[right].sum()
        assert total_mine >= total_right - 2 * band * len(mine) or not score[mine].isfinite().all()
    return int(clear.sum())


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=12)
@given(shape=shapes(longest=900), choice=choices)
def test_ties_included_when_scores_are_exact(name, shape, choice, operators) -> None:
    check_exact(lay_out(BY_NAME[name], shape, whole), choice, operators)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=8)
@given(shape=shapes(longest=900), choice=choices)
def test_what_is_not_a_number(name, shape, choice, operators) -> None:
    """NaN is the lowest score, also beside better heads; infinities are the largest numbers."""
    odd = 0.3 / BY_NAME[name].key_dim
    check_exact(lay_out(BY_NAME[name], shape, whole, odd), choice, operators)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=12)
@given(shape=shapes(longest=900), choice=choices)
def test_equals_the_reference(name, shape, choice, operators) -> None:
    check_close(lay_out(BY_NAME[name], shape), choice, operators)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_far_and_wide(name: str, threads: int, operators) -> None:
    """Long enough for many chunks; few blocks for many threads and the other way round."""
    s = BY_NAME[name]
    many = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for shape in (
            Shape((s.page_size * 1000,), (1,), kv_heads=1, holes=3),
            Shape((s.page_size * 300, 40), (19, 0), rows=19, kv_heads=1, holes=3, seed=1),
            Shape(tuple(s.page_size * (9 + b) + b for b in range(64)), (1,) * 64, kv_heads=1),
        ):
            close, rows = lay_out(s, shape), sum(shape.lengths) * shape.kv_heads
            assert check_close(close, Choice(more=20), operators) >= 0.8 * rows
            check_exact(lay_out(s, shape, whole), Choice(more=20), operators)
    finally:
        torch.set_num_threads(many)


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_do_not_depend_on_their_call(name: str, operators) -> None:
    s = BY_NAME[name]
    case = lay_out(s, Shape((s.page_size * 12 + 3, s.page_size * 9), (40, 33), rows=40))
    together = case.kernel(operators[s], Choice())
    for i in range(40):
        alone = Case(
            s, case.query[:, :, i : i + 1], case.records, case.table, case.position + i,
            (case.lengths - i).clamp(0, 1),
        )  # fmt: skip
        assert torch.equal(alone.kernel(operators[s], Choice())[:, :, 0], together[:, :, i])


@pytest.mark.parametrize("choice", [Choice(more=40), Choice(more=0, dense_below=12)], ids=repr)
def test_nothing_is_scored_where_everything_fits(choice: Choice, operators) -> None:
    case = lay_out(SPECS[0], Shape((600, 100), (9, 4), rows=9, holes=20))
    case.records = [torch.full_like(record, torch.nan) for record in case.records]
    check_exact(case, choice, operators)
    empty = torch.where(case.table >= 0, len(case.records[0]) + 10**8, -1)  # nowhere to read
    case.table, reference = empty.int(), case.reference(choice)
    assert torch.equal(case.kernel(operators[SPECS[0]], choice), reference)


@pytest.mark.parametrize("rows", [1, 7])
def test_where_dense_reading_ends(rows: int, operators) -> None:
    """Tokens below dense_below have every page, the others choose."""
    choice = Choice(sinks=0, window=0, more=1, dense_below=20)
    edge = choice.numbers(16)[-1]
    for start in range(edge - rows - 1, edge + 2):
        case = lay_out(SPECS[3], Shape((start,), (rows,), rows=rows), whole)
        check_exact(case, choice, operators)
        counts = (case.kernel(operators[SPECS[3]], choice) >= 0).sum(-1)
        below = torch.arange(start, start + rows) < edge
        assert torch.equal(counts > choice.budget, below.expand_as(counts))


def test_more_forced_pages_than_the_budget(operators) -> None:
    case = lay_out(SPECS[1], Shape((16 * 30,), (3,), rows=3), whole)
    for sinks, window, budget in ((4, 9, 6), (9, 2, 6), (40, 0, 6), (0, 40, 6), (2, 3, 1)):
        numbers = (sinks, window, 8, budget, 0)
        at = (case.table, case.position, case.lengths)
        got = operators[SPECS[1]](case.query, *case.records, *at, *numbers)
        s = SPECS[1]
        expected = score_select(
            case.query, case.records, list(s.score_fields), *at, s.score, s.page_size, *numbers
        )
        assert torch.equal(got, expected)


def test_a_table_of_holes(operators) -> None:
    case = lay_out(SPECS[0], Shape((3000,), (2,), rows=2))
    case.table = torch.full_like(case.table, -1)
    assert case.kernel(operators[SPECS[0]], Choice()).eq(-1).all()
    case.table[0, 0, 3] = 5
    check_exact(case, Choice(more=1), operators)


def test_a_table_shorter_than_the_sequence(operators) -> None:
    case = lay_out(SPECS[0], Shape((3000,), (2,), rows=2), whole)
    for columns in (1, 20, 45):
        short = Case(
            SPECS[0], case.query, case.records, case.table[:, :, :columns].contiguous(),
            case.position, case.lengths,
        )  # fmt: skip
        check_exact(short, Choice(), operators)


def test_lists_too_short_are_refused(operators) -> None:
    case = lay_out(SPECS[0], Shape((3000,), (2,), rows=2))
    at = (case.table, case.position, case.lengths)
    for numbers, most in (((1, 1, 4, 5, 0), 5), ((1, 1, 40, 5, 4000), 47)):
        with pytest.raises(ValueError, match=f"{most} pages are to be selected into a list of"):
            operators[SPECS[0]](case.query, *case.records, *at, *numbers)


def test_wrong_tensors_are_refused(operators) -> None:
    case = lay_out(SPECS[0], Shape())
    call, at = operators[SPECS[0]], (case.table, case.position, case.lengths)
    numbers = Choice().numbers(64)
    with pytest.raises(TypeError, match=r"query is Float; this kernel reads BFloat16"):
        call(case.query.float(), *case.records, *at, *numbers)
    with pytest.raises(ValueError, match=r"index_std is \[\d+, 64\]; this call needs"):
        call(case.query, case.records[0], case.records[1][:, :64].contiguous(), *at, *numbers)
    with pytest.raises(ValueError, match=r"index_mean has strides .*pools are contiguous"):
        call(case.query, case.records[0].t().contiguous().t(), case.records[1], *at, *numbers)


def test_strided_queries_and_empty_calls(operators) -> None:
    case = lay_out(SPECS[0], Shape((3000, 80), (5, 2), rows=5))
    expected = case.kernel(operators[SPECS[0]], Choice())
    case.query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.kernel(operators[SPECS[0]], Choice()), expected)
    case.query = case.query[:, :, :0]
    assert case.kernel(operators[SPECS[0]], Choice()).shape == (2, 2, 0, expected.shape[3])


@pytest.mark.parametrize("index", [0, 6])
def test_golden_source(index: int, golden) -> None:
    golden(f"{SPECS[index].name}.cpp", cpp.source(SPECS[index]))


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
    dim=st.sampled_from((8, 40, 64, 80, 128, 256, 576)),
    group=st.integers(1, 130),
    page_size=st.sampled_from((1, 16, 1024)),
    score=st.sampled_from([*SCORE_TERMS]),
    page_logits=st.booleans(),
)
def test_every_spec_prints_readable_source(
    dtype, dim, group, page_size, score, page_logits
) -> None:
    made = spec(dtype, dim, group, page_size, score, page_logits)
    text = cpp.source(made)
    assert ("norm" in text) == (score == "ball")
    assert ("logits" in text) == page_logits
    rows = min(16, max(1, 32 // group))
    rests = {count * group % 4 for count in range(1, rows + 1)}
    tiles = [f"score_tile<{rest}, true>" in text for rest in (1, 2, 3)]
    assert tiles == [rest in rests for rest in (1, 2, 3)]
    assert math.prod(text.count(f"* {field};") for field in made.score_fields) == 1
