"""Records of records against the tokens' own statistics, and choices among candidates."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import Case, Laid, cases
from test_index_ops import record_by_hand, score_by_hand, whole_records
from tolerance import assert_close_to_float64, rounding_band
from torch import Tensor

import memcompile.models.ops  # noqa: F401 (registers the operations)
from memcompile.models.memory import paged
from memcompile.models.memory.parts import INDEX_FIELDS, SCORE_FIELDS, field_width

ops = torch.ops.memcompile
few = settings(max_examples=30)
FIELDS = list(INDEX_FIELDS)
HEADS, DIMS = 2, (6, 4)  # KV heads; widths of keys and values
SIZES = (2, 6, 12)  # tokens of a record, by level: pages of 2, then 3 of them, then 2 of those
many_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=3)


class Levels:
    """The tokens of some sequences, and records of three levels behind permuted tables."""

    def __init__(self, held: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.held = torch.tensor(held)
        make = torch.Generator().manual_seed(seed)
        shape = (len(held), HEADS, max(held))
        self.tokens = [torch.randn(*shape, width, generator=make).to(dtype) for width in DIMS]

        def table(size: int) -> Tensor:
            rows = len(held) * HEADS * (max(held) // size + 1)
            return torch.randperm(rows, generator=make).int().view(*shape[:2], -1)

        self.page_table, *self.tables = (table(size) for size in (SIZES[0], *SIZES))
        pages = self.page_table.numel()
        self.pools = [torch.full((pages, SIZES[0], d), torch.nan, dtype=dtype) for d in DIMS]
        self.index = [self.empty(len(level.flatten())) for level in self.tables]

    def empty(self, rows: int) -> list[Tensor]:
        dtype = {"log_count": torch.float32}
        return [
            torch.full(
                (rows, field_width(field, *DIMS)),
                torch.nan,
                dtype=dtype.get(field, self.tokens[0].dtype),
            )
            for field in FIELDS
        ]

    def append(self, cuts: list[int]) -> Levels:
        """Appends all tokens in calls that end at `cuts`, and folds after each."""
        for start, stop in zip([0, *cuts], cuts, strict=False):
            position, end = self.held.clamp_max(start).int(), self.held.clamp_max(stop).int()
            at = position, end - position
            new = [tokens[:, :, start:stop].clone() for tokens in self.tokens]
            for b, count in enumerate(at[1]):
                for tokens in new:
                    tokens[b, :, count:] = torch.nan
            ops.append_index.record_table(
                *new, self.page_table, self.tables[0], *at, *self.pools, self.index[0], FIELDS
            )
            for low in range(2):
                self.fold(low, self.tables[low], at)
        return self

    def fold(self, low: int, child_table: Tensor, at: tuple[Tensor, Tensor]) -> None:
        size, ratio = SIZES[low], SIZES[low + 1] // SIZES[low]
        of, to, table = self.index[low], self.index[low + 1], self.tables[low + 1]
        ops.append_index.fold(of, child_table, table, *at, to, FIELDS, size, ratio)

    def same(self, other: Levels) -> bool:
        mine, others = ([pool for level in x.index for pool in level] for x in (self, other))
        pairs = zip(mine, others, strict=True)
        return all(torch.equal(one.nan_to_num(7), two.nan_to_num(7)) for one, two in pairs)


def reach(keys: Tensor, level: int) -> Tensor:
    """The radius that folding gives: of the ball around the balls of the level below."""
    if level == 0:
        return (keys - keys.mean(0)).norm(dim=1).max()
    parts = keys.split(SIZES[level - 1])
    return torch.stack(
        [(part.mean(0) - keys.mean(0)).norm() + reach(part, level - 1) for part in parts]
    ).max()


@few
@given(many_lengths, st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
       st.integers(0, 2**31), st.sampled_from((1, 1 << 24)))  # fmt: skip
def test_records_of_records_are_the_tokens_own_statistics(
    held: list[int], dtype: torch.dtype, seed: int, block_bytes: int
) -> None:
    with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
        levels = Levels(held, dtype, seed).append([max(held)])
    keys, values = levels.tokens
    for level, size in enumerate(SIZES):
        table, complete = levels.tables[level], set()
        got, eager, truth = ({name: [] for name in FIELDS} for _ in range(3))
        for b, h in torch.cartesian_prod(*map(torch.arange, (len(held), HEADS))).tolist():
            for group in range(held[b] // size):
                row, tokens = int(table[b, h, group]), slice(group * size, (group + 1) * size)
                complete.add(row)
                for into, kind in ((eager, dtype), (truth, torch.float64)):
                    hand = record_by_hand(keys[b, h, tokens], values[b, h, tokens], kind)
                    direct = hand["radius"]
                    hand["radius"] = reach(keys[b, h, tokens].to(kind), level).view(1)
                    assert hand["radius"] >= direct * (1 - rounding_band(kind, size * DIMS[0]))
                    for name in FIELDS:
                        into[name].append(hand[name])
                for name, pool in zip(FIELDS, levels.index[level], strict=True):
                    got[name].append(pool[row])
        for name in FIELDS if complete else ():
            kind = torch.float32 if name == "log_count" else dtype
            # Spreads are differences: what rounds is the keys they are taken between.
            scale = truth["max"] if name in ("std", "radius") else []
            assert_close_to_float64(
                torch.cat([*got[name], *(x.to(kind) for x in scale)]),
                torch.cat([x.to(kind) for x in (*eager[name], *scale)]),
                torch.cat([*truth[name], *scale]),
                reduction=size * DIMS[0],
            )
        for pool in levels.index[level]:
            assert all(pool[row].isnan().all() for row in {*range(len(pool))} - complete)


@few
@given(many_lengths, st.lists(st.integers(1, 40), max_size=4), st.integers(0, 2**31))
def test_records_do_not_depend_on_how_tokens_were_split(
    held: list[int], cuts: list[int], seed: int
) -> None:
    most = max(held)
    split = sorted({cut for cut in cuts if cut < most} | {most})
    whole = Levels(held, seed=seed).append([most])
    for how in (split, list(range(1, most + 1))):
        assert whole.same(Levels(held, seed=seed).append(how))


def test_children_may_be_gone_once_they_are_folded() -> None:
    kept, freed = Levels([40, 31]).append([40]), Levels([40, 31])
    freed.index[:2] = [[pool.clone() for pool in level] for level in kept.index[:2]]
    for token in range(40):
        at = (freed.held.clamp_max(token).int(), (freed.held > token).int())
        child = torch.arange(freed.tables[1].shape[2])
        gone = (child < (at[0] // SIZES[2] * 2)[:, None])[:, None].expand_as(freed.tables[1])
        for pool in freed.index[1]:
            pool[freed.tables[1][gone].long()] = torch.nan
        freed.fold(1, freed.tables[1].masked_fill(gone, -1), at)
    for one, two in zip(kept.index[2], freed.index[2], strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


def test_records_stay_where_pages_are_let_go() -> None:
    """Full pages leave the table, and later ones take their places in the pools."""
    kept, ring = Levels([17]).append([17]), Levels([17])
    for token in range(17):
        table = torch.full_like(ring.page_table, -1)
        table[:, :, token // 2] = torch.tensor([0, 1])
        at = (torch.tensor([x], dtype=torch.int32) for x in (token, 1))
        new = [tokens[:, :, token : token + 1] for tokens in ring.tokens]
        ops.append_index.record_table(
            *new, table, ring.tables[0], *at, *ring.pools, ring.index[0], FIELDS
        )
    for one, two in zip(kept.index[0], ring.index[0], strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


@pytest.mark.parametrize("which", ["page_table", "child_table", "record_table"])
@pytest.mark.parametrize("fault", ["too short", "unassigned"])
def test_records_without_a_row_are_refused(which: str, fault: str) -> None:
    levels = Levels([12])
    level = ("record_table", "child_table", "page_table").index(which)
    if fault == "unassigned":
        levels.tables[level][0, 1, 0] = -1
    else:
        levels.tables[level] = levels.tables[level][:, :, :0]
    what = ("the record of a page of 2", "a record of 6 of them", "a group of 12 tokens")[level]
    at = (torch.tensor([0], dtype=torch.int32), torch.tensor([12], dtype=torch.int32))
    with pytest.raises(IndexError, match=f"{what} to write has no row .*reserve the tokens first"):
        if level == 0:
            levels.append([12])
        else:
            levels.fold(1, levels.tables[1], at)


@pytest.mark.parametrize(
    ("fields", "ratio", "message"),
    [
        (["std"], 2, r"std and radius are folded around the mean; add it to \['std'\]"),
        (["mean"], 0, "groups of 0 children of 4 tokens; both must be at least 1"),
    ],
)
def test_folding_refuses(fields: list[str], ratio: int, message: str) -> None:
    table, at = torch.zeros(1, 1, 4, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    pool = [torch.zeros(4, 6)]
    with pytest.raises(ValueError, match=message):
        ops.append_index.fold(pool, table, table, at, at, [torch.zeros(4, 6)], fields, 4, ratio)


def test_folding_without_fields_or_sequences_writes_nothing() -> None:
    none, table = torch.zeros(0, dtype=torch.int32), torch.zeros(0, 2, 4, dtype=torch.int32)
    ops.append_index.fold([], table, table, none, none, [], [], 4, 2)
    pool = torch.zeros(3, 6)
    ops.append_index.fold([pool], table, table, none, none, [pool + 1], ["mean"], 4, 2)


def among_by_hand(
    laid: Laid, scores: dict[tuple[int, ...], float], lists: Tensor, sinks: int, window: int,
    budget: int,
) -> list[list[int]]:  # fmt: skip
    c, chosen = laid.case, []
    for b, h, i in torch.cartesian_prod(*map(torch.arange, lists.shape[:3])).tolist():
        last = (c.position[b] + i) // c.page_size if i < c.lengths[b] else -1
        inside = [
            p for p in lists[b, h, i].tolist()
            if 0 <= p <= last and p < laid.table.shape[2] and laid.table[b, h, p] >= 0
        ]  # fmt: skip
        forced = [p for p in inside if p < sinks or p >= last - window]
        others = {p: scores[b, h, i, p] for p in inside if p not in forced}
        best = sorted(others, key=lambda p: (-others[p], p))[: max(0, budget - len(forced))]
        pages = inside if len(inside) <= budget else sorted([*forced[:budget], *best])
        chosen.append(pages + [-1] * (budget - len(pages)))
    return chosen


def strewn(laid: Laid, width: int) -> Tensor:
    """Ascending distinct pages a row, -1 between them, some past the table's end."""
    c, make = laid.case, torch.Generator().manual_seed(laid.case.seed + 1)
    lists = torch.full((c.batch, c.kv_heads, c.rows, width), -1, dtype=torch.int32)
    for row in lists.flatten(0, 2):
        some = torch.randperm(c.columns + 2, generator=make)[:width].sort().values.int()
        row[: len(some)] = some.masked_fill(torch.rand(len(some), generator=make) < 0.2, -1)
    return lists


@few
@given(
    cases((torch.float32, torch.bfloat16)), st.sampled_from([*SCORE_FIELDS]), st.integers(0, 9),
    st.tuples(*map(st.integers, (0, 0, 0), (2, 2, 5))), st.sampled_from((1, 1 << 24)),
)  # fmt: skip
def test_a_choice_among_candidates(
    case: Case, score: str, width: int, numbers: tuple[int, int, int], block_bytes: int
) -> None:
    laid = Laid(case)
    laid.table[:, :, 1::4] = -1
    records, lists, scores = whole_records(laid, score), strewn(laid, width), {}
    for b, h, i, p in torch.cartesian_prod(
        *map(torch.arange, (case.batch, case.kv_heads, case.rows, case.columns))
    ).tolist():
        record = {name: r[laid.table[b, h, p].long()].double() for name, r in records.items()}
        queries = laid.query[b, h * case.group : (h + 1) * case.group, i]
        scores[b, h, i, p] = score_by_hand(queries, record, score)
    with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
        got = ops.score_select.among(
            laid.query, [*records.values()], [*records], laid.table, lists, laid.position,
            laid.lengths, score, case.page_size, *numbers,
        )  # fmt: skip
    assert got.dtype == torch.int32
    assert got.shape == (*lists.shape[:3], numbers[2])
    assert got.flatten(0, 2).tolist() == among_by_hand(laid, scores, lists, *numbers)


@few
@given(cases(), st.sampled_from([*SCORE_FIELDS]), st.integers(0, 2), st.integers(0, 2),
       st.integers(0, 3))  # fmt: skip
def test_among_all_pages_it_is_score_select(
    case: Case, score: str, sinks: int, window: int, more: int
) -> None:
    laid = Laid(case)
    laid.table[:, :, 1::4] = -1
    records = whole_records(laid, score)
    budget = sinks + window + 1 + more
    every = torch.arange(case.columns, dtype=torch.int32)
    lists = every.expand(case.batch, case.kv_heads, case.rows, -1)
    given = (laid.query, [*records.values()], [*records], laid.table)
    at = (laid.position, laid.lengths, score, case.page_size, sinks, window)
    got = ops.score_select.among(*given, lists, *at, budget)
    assert torch.equal(got, ops.score_select(*given, *at, budget, budget, 0))


def test_candidates_of_a_table_without_columns_or_an_unknown_score() -> None:
    laid = Laid(Case(position=(23,), lengths=(1,), kv_heads=1, group=1))
    given = (laid.query, [laid.key_pages[:, 0]], ["mean"], laid.table[:, :, :0])
    at = (laid.position, laid.lengths)
    lists = torch.zeros(1, 1, 1, 2, dtype=torch.int32)
    assert ops.score_select.among(*given, lists, *at, "mean", 4, 1, 1, 3).tolist() == [[[[-1] * 3]]]
    with pytest.raises(ValueError, match="unknown score 'cosine'; known: mean, mean-std, box"):
        ops.score_select.among(*given, lists, *at, "cosine", 4, 1, 1, 3)
