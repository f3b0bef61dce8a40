"""append_index and score_select against straight-line references; selection apart from reading."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import Case, Laid, cases
from tolerance import assert_close_to_float64
from torch import Tensor

import memcompile.models.ops  # noqa: F401 (registers the operations)
from memcompile.models.memory import paged
from memcompile.models.memory.parts import INDEX_FIELDS, SCORE_FIELDS, field_width

ops = torch.ops.memcompile
few = settings(max_examples=40, deadline=None)
FIELDS = list(INDEX_FIELDS)


def empty_pools(laid: Laid) -> tuple[Tensor, Tensor, list[Tensor]]:
    c, count = laid.case, len(laid.key_pages)
    index = [
        torch.full(
            (count, field_width(name, c.key_dim, c.value_dim)),
            torch.nan,
            dtype=torch.float32 if name == "log_count" else c.dtype,
        )
        for name in FIELDS
    ]
    return *(torch.full_like(p, torch.nan) for p in (laid.key_pages, laid.value_pages)), index


def append(laid: Laid, pools: tuple[Tensor, Tensor, list[Tensor]], cuts: list[int]) -> None:
    """Appends every token of the case in calls that end at `cuts`; padding carries NaN."""
    c = laid.case
    held = torch.tensor([len(k[0]) for k in laid.keys])
    start = 0
    for stop in cuts:
        position, end = held.clamp_max(start), held.clamp_max(stop)
        new = []
        for tokens, width in ((laid.keys, c.key_dim), (laid.values, c.value_dim)):
            padded = torch.full(
                (c.batch, c.kv_heads, stop - start, width), torch.nan, dtype=c.dtype
            )
            for b, sequence in enumerate(tokens):
                part = sequence[:, position[b] : end[b]]
                padded[b, :, : part.shape[1]] = part
            new.append(padded)
        lengths = (end - position).int()
        ops.append_index(
            *new, laid.table, position.int(), lengths, pools[0], pools[1], pools[2], FIELDS
        )
        start = stop


def record_by_hand(keys: Tensor, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    keys, values = keys.to(dtype), values.to(dtype)
    apart = keys - keys.mean(0)
    return {
        "mean": keys.mean(0),
        "std": keys.std(0, correction=0),
        "min": keys.amin(0),
        "max": keys.amax(0),
        "radius": (apart @ apart.T).diagonal().sqrt().max().view(1),
        "value_mean": values.mean(0),
        "log_count": torch.tensor([float(len(keys))], dtype=dtype).log(),
    }


@few
@given(cases(), st.lists(st.integers(1, 30), max_size=3), st.sampled_from((1, 1 << 24)))
def test_append_writes_tokens_and_records(case: Case, cuts: list[int], block_bytes: int) -> None:
    laid = Laid(case)
    held = [len(k[0]) for k in laid.keys]
    cuts = sorted({cut for cut in cuts if cut < max(held)} | {max(held)})
    pools = empty_pools(laid)
    with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
        append(laid, pools, cuts)
    assert torch.equal(pools[0].nan_to_num(7), laid.key_pages.nan_to_num(7))
    assert torch.equal(pools[1].nan_to_num(7), laid.value_pages.nan_to_num(7))
    actual, eager, truth = ({name: [] for name in FIELDS} for _ in range(3))
    full = set()
    for b in range(case.batch):
        for h in range(case.kv_heads):
            for page in range(held[b] // case.page_size):  # the open page has no record
                physical, start = int(laid.table[b, h, page]), page * case.page_size
                full.add(physical)
                tokens = slice(start, start + case.page_size)
                for into, dtype in ((eager, case.dtype), (truth, torch.float64)):
                    hand = record_by_hand(laid.keys[b][h, tokens], laid.values[b][h, tokens], dtype)
                    for name in FIELDS:
                        into[name].append(hand[name])
                for name, pool in zip(FIELDS, pools[2], strict=True):
                    actual[name].append(pool[physical])
    for name in FIELDS if full else ():
        # Spreads are differences: what rounds is the keys they are taken between.
        scale = truth["max"] if name in ("std", "radius") else []
        eager_dtype = torch.float32 if name == "log_count" else case.dtype
        assert_close_to_float64(
            *(torch.cat([*side[name], *extra]) for side, extra in (
                (actual, [x.to(actual[name][0].dtype) for x in scale]),
                ({name: [x.to(eager_dtype) for x in eager[name]]},
                 [x.to(eager_dtype) for x in scale]),
                (truth, scale),
            )),
            reduction=case.page_size * case.key_dim,
        )  # fmt: skip
    for pool in pools[2]:
        for physical in {*range(len(pool))} - full:
            assert pool[physical].isnan().all()


@few
@given(cases(), st.lists(st.integers(1, 30), max_size=4))
def test_records_do_not_depend_on_how_tokens_were_split(case: Case, cuts: list[int]) -> None:
    laid = Laid(case)
    most = max(len(k[0]) for k in laid.keys)
    split = sorted({cut for cut in cuts if cut < most} | {most})
    pools = [empty_pools(laid) for _ in range(3)]
    for filled, how in zip(pools, ([most], split, list(range(1, most + 1))), strict=True):
        append(laid, filled, how)
    for other in pools[1:]:
        for one, two in zip(pools[0][2], other[2], strict=True):
            assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


def test_a_write_replaces_what_was_forgotten_in_the_open_page() -> None:
    case = Case(position=(6,), lengths=(3,))
    laid, other = Laid(case), Laid(Case(position=(6,), lengths=(3,), seed=1))
    pools = empty_pools(laid)
    append(laid, pools, [9])
    other.table, fresh = laid.table, empty_pools(laid)
    for sequence in (other.keys, other.values):
        sequence[0] = sequence[0].clone()
    other.keys[0][:, :5], other.values[0][:, :5] = laid.keys[0][:, :5], laid.values[0][:, :5]
    append(other, fresh, [9])
    rest = [x[0][None, :, 5:] for x in (other.keys, other.values)]
    at = torch.tensor([5], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    ops.append_index(*rest, laid.table, *at, pools[0], pools[1], pools[2], FIELDS)
    used = laid.table[laid.table >= 0].long()
    for one, two in zip((*pools[:2], *pools[2]), (*fresh[:2], *fresh[2]), strict=True):
        assert torch.equal(one[used].nan_to_num(7), two[used].nan_to_num(7))


def test_state_carries_no_gradient() -> None:
    laid = Laid(Case())
    pools = empty_pools(laid)
    laid.keys, laid.values = ([x.requires_grad_() for x in xs] for xs in (laid.keys, laid.values))
    append(laid, pools, [9, 18])
    assert not any(pool.requires_grad for pool in (*pools[:2], *pools[2]))


@pytest.mark.parametrize("table", ["too short", "unassigned"])
def test_tokens_without_a_page_are_refused(table: str) -> None:
    laid = Laid(Case(position=(0,), lengths=(9,)))
    pools = empty_pools(laid)
    laid.table = laid.table[:, :, :1] if table == "too short" else torch.full_like(laid.table, -1)
    with pytest.raises(IndexError, match="reserve the tokens first"):
        append(laid, pools, [9])


def score_by_hand(queries: Tensor, record: dict[str, Tensor], score: str) -> float:
    """The largest of a group's queries [G, Dk]."""
    best = -float("inf")
    for q in queries.double():
        if score == "box":
            value = sum(max(x * lo, x * hi) for x, lo, hi in
                        zip(q, record["min"], record["max"], strict=True))  # fmt: skip
        else:
            value = q @ record["mean"]
            if score == "mean-std":
                value = value + q.abs() @ record["std"]
            if score == "ball":
                value = value + (q @ q).sqrt() * record["radius"][0]
        best = max(best, float(value))
    return best


def whole_records(laid: Laid, score: str) -> dict[str, Tensor]:
    """Whole numbers, and queries of norm 5: scores are exact in every precision, ties frequent."""
    case, make = laid.case, torch.Generator().manual_seed(laid.case.seed)
    records = {
        name: torch.randint(-2, 3, (len(laid.key_pages), width), generator=make).to(case.dtype)
        for name in SCORE_FIELDS[score]
        for width in [field_width(name, case.key_dim, case.value_dim)]
    }
    if score == "box":
        low, high = records["min"], records["max"]
        records = {"min": torch.minimum(low, high), "max": torch.maximum(low, high)}
    live = laid.query.isfinite()
    laid.query = torch.zeros_like(laid.query)
    for row in laid.query.view(-1, case.key_dim):
        row[torch.randperm(case.key_dim, generator=make)[:2]] = torch.tensor(
            [3.0, -4.0], dtype=case.dtype
        )
    laid.query[~live] = torch.nan
    return records


def select_by_hand(
    laid: Laid, records: dict[str, Tensor], score: str, sinks: int, window: int, budget: int,
    capacity: int, dense_below: int,
) -> list[list[int]]:  # fmt: skip
    c, chosen = laid.case, []
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (c.batch, c.kv_heads, c.rows))).tolist():
        at = c.position[b] + i
        last = at // c.page_size
        always = {p for p in range(last + 1) if p < sinks or p >= last - window}
        ranking = []
        for page in {*range(last)} - always:
            at_page = {name: r[int(laid.table[b, h, page])].double() for name, r in records.items()}
            queries = laid.query[b, h * c.group : (h + 1) * c.group, i]
            ranking.append((-score_by_hand(queries, at_page, score), page))
        count = last + 1 if last < budget or at < dense_below else budget
        pages = sorted(always | {page for _, page in sorted(ranking)[: count - len(always)]})
        pages = pages if i < c.lengths[b] else []
        chosen.append(pages + [-1] * (capacity - len(pages)))
    return chosen


@few
@given(
    cases((torch.float32, torch.bfloat16)), st.sampled_from([*SCORE_FIELDS]), st.integers(0, 2),
    st.integers(0, 2), st.integers(0, 2), st.sampled_from((0, 13)), st.sampled_from((1, 1 << 24)),
)  # fmt: skip
def test_selection_is_the_reference_ties_included(
    case: Case, score: str, sinks: int, window: int, more: int, dense_below: int, block_bytes: int
) -> None:
    laid = Laid(case)
    records = whole_records(laid, score)
    held = torch.tensor([len(k[0]) for k in laid.keys])
    page = torch.arange(case.columns)
    for b in range(case.batch):  # records of pages that are not full are poison
        for h in range(case.kv_heads):
            unfilled = laid.table[b, h][(page + 1) * case.page_size > held[b]]
            for pool in records.values():
                pool[unfilled[unfilled >= 0].long()] = torch.nan
    budget = sinks + window + 1 + more
    capacity = max(budget, -(-dense_below // case.page_size))
    with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
        got = ops.score_select(
            laid.query, list(records.values()), list(records), laid.table, laid.position,
            laid.lengths, score, case.page_size, sinks, window, capacity, budget, dense_below,
        )  # fmt: skip
    assert got.dtype == torch.int32
    assert got.shape == (case.batch, case.kv_heads, case.rows, capacity)
    by_hand = select_by_hand(laid, records, score, sinks, window, budget, capacity, dense_below)
    assert got.view(-1, capacity).tolist() == by_hand


@few
@given(
    cases((torch.float32, torch.float64)), st.sampled_from([*SCORE_FIELDS]), st.integers(0, 2),
    st.integers(0, 2), st.sampled_from((0, 13)), st.sampled_from((1, 1 << 24)),
)  # fmt: skip
def test_logits_are_the_products_with_the_means_of_pages_to_choose_from(
    case: Case, score: str, sinks: int, window: int, dense_below: int, block_bytes: int
) -> None:
    laid = Laid(case)
    laid.table[0, 0, 0] = -1  # a hole
    fields = [*dict.fromkeys(("mean", *SCORE_FIELDS[score]))]
    widths = (field_width(name, case.key_dim, case.value_dim) for name in fields)
    make = torch.Generator().manual_seed(case.seed)
    records = [
        torch.randint(-2, 3, (len(laid.key_pages), width), generator=make).to(case.dtype)
        for width in widths
    ]
    laid.query = laid.query.round()  # whole numbers: products are exact
    budget = sinks + window + 2
    whole = (sinks, window, max(budget, 4), budget, dense_below)
    at = (laid.table, laid.position, laid.lengths, score, case.page_size)
    with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
        pages, logits = ops.score_select.page_logits(laid.query, records, fields, *at, *whole)
    assert torch.equal(pages, ops.score_select(laid.query, records, fields, *at, *whole))
    expected = torch.full_like(logits, -float("inf"))
    for b, head, i in torch.cartesian_prod(*map(torch.arange, logits.shape[:3])).tolist():
        token, row = case.position[b] + i, laid.table[b, head // case.group].tolist()
        last = token // case.page_size
        if i >= case.lengths[b] or last < budget or token < dense_below:
            continue
        for page in range(sinks, last - window):
            if row[page] >= 0:
                expected[b, head, i, page] = laid.query[b, head, i] @ records[0][row[page]]
    assert torch.equal(logits, expected)


def test_a_score_that_overflows_never_displaces_the_open_page() -> None:
    laid = Laid(Case(position=(23,), lengths=(1,), kv_heads=1, group=1))
    mean = torch.full((len(laid.key_pages), 7), float("inf"))
    got = ops.score_select(
        torch.ones(1, 1, 1, 7), [mean], ["mean"], laid.table, laid.position, laid.lengths,
        "mean", 4, 1, 1, 4, 4, 0,
    )  # fmt: skip
    assert got.tolist() == [[[[0, 1, 4, 5]]]]


@pytest.mark.parametrize(
    ("score", "capacity", "message"),
    [
        ("cosine", 4, "unknown score 'cosine'; known: mean, mean-std, box, ball"),
        ("mean", 3, "4 pages are to be selected into a list of 3"),
    ],
)
def test_selection_refuses(score: str, capacity: int, message: str) -> None:
    laid = Laid(Case(position=(23,), lengths=(1,), kv_heads=1, group=1))
    with pytest.raises(ValueError, match=message):
        ops.score_select(
            laid.query, [laid.key_pages[:, 0]], ["mean"], laid.table, laid.position, laid.lengths,
            score, 4, 1, 1, capacity, 4, 0,
        )  # fmt: skip
