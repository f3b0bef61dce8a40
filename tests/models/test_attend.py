"""Reading operations against straight-line float64, on poisoned pools behind permuted tables."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_case import Case, Laid, attend_by_hand, cases, page_lists
from tolerance import assert_close_to_float64

import memcompile.models.ops  # noqa: F401 (registers the operations)
from memcompile.models.memory import paged

ops = torch.ops.memcompile
few = settings(max_examples=40, deadline=None)


def assert_read(laid: Laid, got: tuple[torch.Tensor, torch.Tensor], **options: object) -> None:
    truth, eager = (
        attend_by_hand(laid, dtype, **options)  # type: ignore[arg-type]
        for dtype in (torch.float64, laid.case.dtype)
    )
    width = sum(map(max, zip(laid.case.position, strict=True))) + laid.case.rows
    for part, actual, plain, exact in zip(("out", "lse"), got, eager, truth, strict=True):
        assert actual.dtype == paged.wide(laid.case.dtype)
        assert_close_to_float64(
            actual, plain, exact, reduction=width * laid.case.key_dim, logarithm=part == "lse"
        )


@few
@given(
    cases(), st.sampled_from((0, 1, 3, 9, 100)), st.sampled_from((0.0, 2.5)), st.booleans(),
    st.sampled_from((1, 700, 1 << 24)),
)  # fmt: skip
def test_attend_reads_every_page_of_the_table(
    case: Case, window: int, softcap: float, biased: bool, block_bytes: int
) -> None:
    laid = Laid(case)
    bias = torch.randn(laid.key_pages.shape[:2]) if biased else None
    with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
        got = ops.attend(
            laid.query, laid.key_pages, laid.value_pages, bias, laid.table, None, False,
            laid.position, laid.lengths, 0.4, softcap, window, 1,
        )  # fmt: skip
    assert_read(laid, got, bias=bias, softcap=softcap, window=window)


@few
@given(
    cases(), st.integers(1, 5), st.booleans(), st.sampled_from((0, 6)), st.booleans(),
    st.sampled_from((1, 1 << 24)),
)  # fmt: skip
def test_attend_reads_the_listed_pages_or_all_others(
    case: Case, width: int, exclude: bool, window: int, biased: bool, block_bytes: int
) -> None:
    laid = Laid(case)
    pages = page_lists(laid, width)
    bias = torch.randn(laid.key_pages.shape[:2]) if biased else None
    with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
        got = ops.attend(
            laid.query, laid.key_pages, laid.value_pages, bias, laid.table, pages, exclude,
            laid.position, laid.lengths, 0.4, 0.0, window, 1,
        )  # fmt: skip
    assert_read(laid, got, bias=bias, pages=pages, exclude=exclude, window=window)


@few
@given(cases(), st.integers(1, 3), st.booleans())
def test_attend_reads_a_record_as_one_key_that_stands_for_its_page(
    case: Case, width: int, exclude: bool
) -> None:
    laid = Laid(case)
    pages = page_lists(laid, width)
    records = laid.key_pages.nanmean(1, keepdim=True), laid.value_pages.nanmean(1, keepdim=True)
    bias = torch.randn(laid.key_pages.shape[0], 1)
    got = ops.attend(
        laid.query, *records, bias, laid.table, pages, exclude,
        laid.position, laid.lengths, 0.4, 0.0, 0, case.page_size,
    )  # fmt: skip
    assert_read(
        laid, got, pools=records, bias=bias, pages=pages, exclude=exclude, span=case.page_size
    )


@few
@given(cases(), st.integers(1, 4), st.sampled_from((0.0, 1.5)), st.sampled_from((1, 1 << 24)))
def test_summaries_are_a_read_of_the_listed_pages_and_of_the_others_records(
    case: Case, width: int, softcap: float, block_bytes: int
) -> None:
    """One softmax over both, by hand and in float64, from the same records."""
    laid = Laid(case)
    pages = page_lists(laid, width)
    means = laid.key_pages.double().mean(1)  # NaN unless the page is full
    values = laid.value_pages.double().mean(1).to(case.dtype)
    bias = torch.randn(len(values), 1)
    table = laid.table.clamp_min(0).long().repeat_interleave(case.group, 1)
    wide = paged.wide(case.dtype)

    def read(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        products = torch.einsum("bhnd,bhpd->bhnp", laid.query.to(dtype), means.to(dtype)[table])
        given = (laid.key_pages, laid.value_pages, laid.table, pages, products, values, bias)
        query, *given = (t.to(dtype) if t.is_floating_point() else t for t in (laid.query, *given))
        with mock.patch.object(paged, "BLOCK_BYTES", block_bytes):
            out, lse = ops.attend.summaries(
                query, *given, laid.position, laid.lengths, 0.4, softcap
            )
        return out, lse

    exact, rest = (
        attend_by_hand(
            laid, torch.float64, pools=pools, bias=added, pages=pages, exclude=exclude,
            softcap=softcap, span=span,
        )
        for pools, added, exclude, span in (
            (None, None, False, 1),
            ((means[:, None], values[:, None]), bias, True, case.page_size),
        )
    )  # fmt: skip
    truth = paged.combine([exact[0], rest[0]], [exact[1], rest[1]])
    reduction = case.columns * case.page_size * case.key_dim
    for part, got, right in zip(("out", "lse"), read(wide), truth, strict=True):
        assert got.dtype == wide
        plain = right.to(torch.float32)
        assert_close_to_float64(got, plain, right, reduction=reduction, logarithm=part == "lse")


@few
@given(cases((torch.float32,)), st.integers(1, 4))
def test_tiers_split_anywhere_merge_to_the_whole(case: Case, width: int) -> None:
    laid = Laid(case)
    pages = page_lists(laid, width)
    parts = [
        ops.attend(
            laid.query, laid.key_pages, laid.value_pages, None, laid.table, pages, exclude,
            laid.position, laid.lengths, 0.4, 0.0, 0, 1,
        )
        for exclude in (False, True)
    ]  # fmt: skip
    assert_read(laid, ops.combine([out for out, _ in parts], [lse for _, lse in parts]))


@few
@given(cases(), st.sampled_from(("all", "listed", "unlisted")), st.sampled_from((0, 6)))
def test_each_pages_part_of_the_log_sum_exp(case: Case, kind: str, window: int) -> None:
    laid = Laid(case)
    pages = None if kind == "all" else page_lists(laid, 3)
    read = (laid.query, laid.key_pages, laid.value_pages, None, laid.table, pages)
    rest = (kind == "unlisted", laid.position, laid.lengths, 0.4, 0.0, window, 1)
    out, lse, page_lse = ops.attend.page_lse(*read, *rest)
    assert_read(laid, (out, lse), pages=pages, exclude=kind == "unlisted", window=window)
    count = case.columns if pages is None or kind == "unlisted" else pages.shape[3]
    assert page_lse.shape == (*lse.shape, count)
    for column in range(count):
        if kind == "listed":
            one = pages[..., column : column + 1]
        else:
            one = torch.full((case.batch, case.kv_heads, case.rows, 1), column, dtype=torch.int32)
            if pages is not None:
                one = torch.where((pages == column).any(-1, keepdim=True), -1, one)
        exact = attend_by_hand(laid, torch.float64, pages=one, window=window)[1]
        plain = attend_by_hand(laid, case.dtype, pages=one, window=window)[1]
        got = page_lse[..., column]
        assert_close_to_float64(got, plain, exact, reduction=case.key_dim, logarithm=True)
    options = {"pages": pages, "exclude": kind == "unlisted", "window": window}
    whole, plain = (
        attend_by_hand(laid, dtype, **options)[1]  # type: ignore[arg-type]
        for dtype in (torch.float64, case.dtype)
    )
    merged = page_lse.logsumexp(3) if count else lse
    assert_close_to_float64(merged, plain, whole, reduction=case.key_dim, logarithm=True)


@few
@given(cases(), st.integers(0, 2**31))
def test_where_a_page_lies_in_the_pool_changes_nothing(case: Case, seed: int) -> None:
    laid = Laid(case)
    order = torch.randperm(len(laid.key_pages), generator=torch.Generator().manual_seed(seed))
    place = order.argsort().int()
    moved = torch.where(laid.table >= 0, place[laid.table.clamp_min(0).long()], -1)
    pages = page_lists(laid, 3)
    for listed in (None, pages):
        read = [
            ops.attend(
                laid.query, keys, values, None, table, listed, False,
                laid.position, laid.lengths, 0.4, 0.0, 0, 1,
            )
            for keys, values, table in (
                (laid.key_pages, laid.value_pages, laid.table),
                (laid.key_pages[order], laid.value_pages[order], moved),
            )
        ]  # fmt: skip
        assert torch.equal(read[0][0], read[1][0])
        assert torch.equal(read[0][1], read[1][1])


def test_a_page_that_was_recycled_is_not_read() -> None:
    laid = Laid(Case(position=(20,), lengths=(3,)))
    laid.table[:, :, :2] = -1
    got = ops.attend(
        laid.query, laid.key_pages, laid.value_pages, None, laid.table, None, False,
        laid.position, laid.lengths, 0.4, 0.0, 0, 1,
    )  # fmt: skip
    assert_read(laid, got)


def test_rows_that_see_nothing_are_zero_with_lse_minus_infinity() -> None:
    laid = Laid(Case(lengths=(0, 0)))
    nothing = torch.full((2, 2, 1, 4), -1, dtype=torch.int32)
    for pages, lengths in ((None, laid.lengths), (nothing, torch.ones(2, dtype=torch.int32))):
        out, lse = ops.attend(
            torch.randn(2, 6, 1, 7), laid.key_pages, laid.value_pages, None, laid.table, pages,
            False, laid.position, lengths, 0.4, 0.0, 0, 1,
        )  # fmt: skip
        assert not out.any()
        assert torch.isneginf(lse).all()
    out, lse = ops.combine([out, out], [lse, lse])
    assert not out.any()
    assert torch.isneginf(lse).all()


MASKS = ("none", "causal", "bool", "bool a head", "added", "causal and bool")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_bytes", [1, 1 << 24])
@pytest.mark.parametrize("kind", MASKS)
def test_attention_is_the_plain_form(
    kind: str, block_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "BLOCK_BYTES", block_bytes)
    batch, kv_heads, group, n = 2, 2, 3, 7
    m = n if "causal" in kind else 11
    query = torch.randn(batch, kv_heads * group, n, 6, dtype=dtype)
    key, value = (torch.randn(batch, kv_heads, m, d, dtype=dtype) for d in (6, 5))
    mask = None
    if "bool" in kind:
        heads = kv_heads * group if "head" in kind else 1
        mask = torch.rand(batch, heads, n, m) < 0.5
        mask[:, :, 3] = False
    elif kind == "added":
        mask = torch.randn(n, m, dtype=dtype)
    visible = torch.ones(n, m, dtype=torch.bool)
    if "causal" in kind:
        visible = visible.tril()
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask

    def plain(precision: torch.dtype) -> torch.Tensor:
        keys, values = (x.to(precision).repeat_interleave(group, 1) for x in (key, value))
        logits = 2.0 * torch.tanh(0.4 * query.to(precision) @ keys.transpose(2, 3) / 2.0)
        if kind == "added":
            logits = logits + mask
        weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)
        return torch.nan_to_num(weights) @ values

    got = ops.attention(query, key, value, mask, "causal" in kind, 0.4, 2.0)
    assert got.dtype == dtype
    assert_close_to_float64(got, plain(dtype), plain(torch.float64), reduction=6 * m)
    if mask is not None and mask.dtype == torch.bool:
        assert not got[:, :, 3].any()


def test_query_heads_must_share_kv_heads_evenly() -> None:
    query, key = torch.randn(1, 5, 2, 4), torch.randn(1, 2, 2, 4)
    with pytest.raises(ValueError, match="5 query heads cannot share 2 KV heads"):
        ops.attention(query, key, key, None, True, 1.0, 0.0)


def test_causal_attention_needs_as_many_queries_as_keys() -> None:
    query, key = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="2 queries and 3 keys"):
        ops.attention(query, key, key, None, True, 1.0, 0.0)


def test_combine_needs_an_lse_for_every_out() -> None:
    with pytest.raises(ValueError, match="got 1 and 0"):
        ops.combine([torch.zeros(1, 1, 1, 2)], [])
