"""What generated Triton kernels read, against float64.

`test_numerics.py` runs this file in a process of its own: on a GPU where there is one, otherwise
through Triton's interpreter, which has to be chosen before the first kernel is made.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor
from triton_case import (
    Case,
    Laid,
    attend_by_hand,
    attend_spec,
    by_dtype,
    long,
    page_lists,
    punch_holes,
    run,
    summaries_by_hand,
)

import memcompile.models.ops  # noqa: F401 (registers the references)

reference = torch.ops.memcompile
D = dict(key_dim=16, value_dim=24, kv_heads=1)


def read(
    laid: Laid,
    pages: Tensor | None = None,
    exclude: bool = False,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
    page_lse: bool = False,
    shared: bool = False,
    by_slot: bool = False,
) -> tuple[Tensor, ...]:
    """Runs attend on a laid out case and holds its results to float64.

    Args:
        by_slot: the kernel is given views of the pools whose pages begin at every slot.
    """
    case, scale = laid.case, laid.case.key_dim**-0.5
    values = laid.key_pages[:, :, : case.value_dim] if shared else laid.value_pages
    spec = attend_spec(
        case,
        pages="all" if pages is None else "unlisted" if exclude else "listed",
        bias=bias is not None,
        softcap=bool(softcap),
        window=bool(window),
        page_lse=page_lse,
        shared_kv=shared,
        by_slot=by_slot,
    )
    pools, table = (laid.key_pages, values), laid.table
    if by_slot:
        pools = tuple(every_slot(pool) for pool in pools)
        table = torch.where(table < 0, -1, table * case.page_size + SHIFT)
    got = run(
        spec, query=laid.query, key_pages=pools[0], value_pages=pools[1], bias=bias,
        page_table=table, pages=pages, position=laid.position, lengths=laid.lengths,
        scale=scale, softcap=softcap, window=window,
    )  # fmt: skip
    options: dict[str, Any] = dict(
        pools=(laid.key_pages, values), bias=bias, scale=scale, softcap=softcap, window=window
    )
    truth, eager = (
        attend_by_hand(laid, dtype, pages=pages, exclude=exclude, **options)
        for dtype in (torch.float64, case.dtype)
    )
    longest = max(p + n for p, n in zip(case.position, case.lengths, strict=True))
    width = longest * case.key_dim
    for part, actual, plain, exact in zip(("out", "lse"), got[:2], eager, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_close_to_float64(actual, plain, exact, reduction=width, logarithm=part == "lse")
    if page_lse:
        every = torch.arange(case.columns, dtype=torch.int32)
        each = every.expand(case.batch, case.kv_heads, case.rows, -1) if pages is None else pages
        for entry in range(each.shape[3]):
            one = each[..., entry : entry + 1]
            if exclude:
                raise NotImplementedError
            exact, plain = (
                attend_by_hand(laid, dtype, pages=one, **options)[1]
                for dtype in (torch.float64, case.dtype)
            )
            assert_close_to_float64(
                got[2][..., entry], plain, exact, reduction=width, logarithm=True
            )
    return got


SHIFT = 3


def every_slot(pages: Tensor) -> Tensor:
    """A view of pools [P, s, D] in which page p begins at slot p * s + SHIFT."""
    size, width = pages.shape[1:]
    slots = torch.cat([pages.new_full((SHIFT, width), torch.nan), pages.flatten(0, 1)])
    return slots.as_strided((len(slots) - size + 1, size, width), (width, width, 1))


@by_dtype
@pytest.mark.parametrize("page_size", [4, 16, 128])
def test_attend_reads_pages_that_begin_at_every_slot(dtype: torch.dtype, page_size: int) -> None:
    case = Case(
        position=(90, 0, 133), lengths=(2, 1, 0), group=3, page_size=page_size, dtype=dtype, **D
    )
    laid = Laid(case)
    punch_holes(laid, 3)
    read(laid, by_slot=True)
    read(laid, page_lists(laid, 3), by_slot=True)


@by_dtype
@pytest.mark.parametrize("group", [1, 3, 5])
def test_attend_reads_every_page(dtype: torch.dtype, group: int) -> None:
    laid = Laid(
        Case(position=(70, 301), lengths=(1, 1), group=group, page_size=64, dtype=dtype, **D)
    )
    read(laid)


@by_dtype
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(8, 8), (40, 80), (96, 128), (128, 40), (256, 64)]
)
def test_attend_covers_the_dims_of_heads(dtype: torch.dtype, key_dim: int, value_dim: int) -> None:
    case = Case(
        position=(40,), lengths=(1,), kv_heads=2, group=2, page_size=16, dtype=dtype,
        key_dim=key_dim, value_dim=value_dim,
    )  # fmt: skip
    read(Laid(case))
    laid = Laid(case)
    read(laid, page_lists(laid, 3))


@by_dtype
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "group"), [(576, 512, 20), (48, 24, 3), (16, 8, 1), (16, 16, 2)]
)
def test_attend_reads_values_that_are_part_of_their_keys(
    dtype: torch.dtype, key_dim: int, value_dim: int, group: int
) -> None:
    case = Case(
        position=(50,), lengths=(2,), kv_heads=1, group=group, page_size=64, dtype=dtype,
        key_dim=key_dim, value_dim=value_dim,
    )  # fmt: skip
    read(Laid(case), shared=True)
    laid = Laid(case)
    read(laid, page_lists(laid, 2), shared=True)


@by_dtype
@pytest.mark.parametrize("page_size", [4, 16, long(64), 128])
def test_attend_reads_chunks_of_ragged_sequences(dtype: torch.dtype, page_size: int) -> None:
    case = Case(
        position=(90, 0, 13), lengths=(23, 9, 0), group=3, page_size=page_size, dtype=dtype, **D
    )
    laid = Laid(case)
    punch_holes(laid, 3)
    read(laid)


@by_dtype
@pytest.mark.parametrize("window", [1, 33])
@pytest.mark.parametrize("page_size", [16, 64])
def test_attend_sees_a_window(dtype: torch.dtype, page_size: int, window: int) -> None:
    laid = Laid(
        Case(position=(70, 201), lengths=(3, 2), group=2, page_size=page_size, dtype=dtype, **D)
    )
    read(laid, window=window)
    for exclude in (False, True):
        read(laid, page_lists(laid, 3), exclude, window=window)


@by_dtype
@pytest.mark.parametrize("page_size", [16, 64])
def test_attend_caps_and_biases_logits(dtype: torch.dtype, page_size: int) -> None:
    laid = Laid(
        Case(position=(70, 21), lengths=(2, 1), group=3, page_size=page_size, dtype=dtype, **D)
    )
    bias = torch.randn(laid.key_pages.shape[:2])
    laid.query *= 4
    read(laid, bias=bias, softcap=3.0)
    read(laid, page_lists(laid, 3), bias=bias, softcap=3.0)


@by_dtype
@pytest.mark.parametrize("exclude", [False, True], ids=["listed", "unlisted"])
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_attend_reads_lists(dtype: torch.dtype, page_size: int, exclude: bool) -> None:
    case = Case(position=(140, 33), lengths=(2, 1), group=5, page_size=page_size, dtype=dtype, **D)
    laid = Laid(case)
    lists = page_lists(laid, min(case.columns, 70))
    lists[:, :, :, -1] = case.columns + 5  # no page of the table
    punch_holes(laid, 4)
    read(laid, lists, exclude)


@by_dtype
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("page_size", [1, 16, 64, 128])
def test_attend_gives_each_pages_part(dtype: torch.dtype, page_size: int, listed: bool) -> None:
    tokens = 10 if page_size == 1 else 150
    laid = Laid(
        Case(position=(tokens, 5), lengths=(2, 3), group=2, page_size=page_size, dtype=dtype, **D)
    )
    got = read(laid, page_lists(laid, 3) if listed else None, page_lse=True, window=100)
    whole = got[2].logsumexp(3)
    assert_close_to_float64(whole, got[1].to(dtype), got[1].double(), logarithm=True)


@by_dtype
def test_attend_gives_the_part_of_unlisted_pages(dtype: torch.dtype) -> None:
    laid = Laid(Case(position=(90,), lengths=(2,), group=2, page_size=16, dtype=dtype, **D))
    lists = page_lists(laid, 3)
    scale = laid.case.key_dim**-0.5
    spec = attend_spec(laid.case, pages="unlisted", page_lse=True)
    _, lse, part = run(
        spec, query=laid.query, key_pages=laid.key_pages, value_pages=laid.value_pages,
        page_table=laid.table, pages=lists, position=laid.position, lengths=laid.lengths,
        scale=scale,
    )  # fmt: skip
    at = (laid.table, lists, True, laid.position, laid.lengths, scale, 0.0, 0, 1)
    exact, plain = (
        reference.attend.page_lse(
            laid.query.to(t), laid.key_pages.to(t), laid.value_pages.to(t), None, *at
        )
        for t in (torch.float64, torch.float32)
    )
    for actual, other, truth in ((part, plain[2], exact[2]), (lse, plain[1], exact[1])):
        assert_close_to_float64(
            actual, other.to(dtype), truth, reduction=92 * laid.case.key_dim, logarithm=True
        )


@by_dtype
def test_attend_reads_records_of_unlisted_pages(dtype: torch.dtype) -> None:
    laid = Laid(Case(position=(290, 31), lengths=(2, 1), group=3, page_size=16, dtype=dtype, **D))
    count = len(laid.key_pages)
    keys = torch.randn(count, 1, 16).to(dtype)
    values = torch.randn(count, 1, 24).to(dtype)
    held = torch.tensor([292, 32])
    for b, table in enumerate(laid.table[:, 0]):  # records of pages that are not full are poison
        open_pages = table[int(held[b]) // 16 :]
        keys[open_pages[open_pages >= 0].long()] = torch.nan
        values[open_pages[open_pages >= 0].long()] = torch.nan
    bias = torch.randn(count, 1)
    lists = page_lists(laid, 5)
    scale = 0.3
    spec = attend_spec(laid.case, page_size=1, span=16, bias=True, pages="unlisted")
    got = run(
        spec, query=laid.query, key_pages=keys, value_pages=values, bias=bias,
        page_table=laid.table, pages=lists, position=laid.position, lengths=laid.lengths,
        scale=scale,
    )  # fmt: skip
    truth, eager = (
        attend_by_hand(
            laid,
            t,
            pools=(keys, values),
            bias=bias,
            pages=lists,
            exclude=True,
            scale=scale,
            span=16,
        )
        for t in (torch.float64, dtype)
    )
    for part, actual, plain, exact in zip(("out", "lse"), got, eager, truth, strict=True):
        assert_close_to_float64(actual, plain, exact, reduction=300, logarithm=part == "lse")


@by_dtype
def test_attend_reads_a_query_that_is_laid_out_by_token(dtype: torch.dtype) -> None:
    laid = Laid(
        Case(
            position=(20,),
            lengths=(3,),
            kv_heads=2,
            group=2,
            page_size=16,
            dtype=dtype,
            key_dim=16,
            value_dim=8,
        )
    )
    laid.query = laid.query.transpose(1, 2).contiguous().transpose(1, 2)
    read(laid)
    laid.query = laid.query.transpose(2, 3).contiguous().transpose(2, 3)
    read(laid)


def read_summaries(
    laid: Laid, lists: Tensor, softcap: float = 0.0, shared: bool = False
) -> tuple[Tensor, ...]:
    """Runs attend.summaries, records and products that it may not read being NaN."""
    case, scale = laid.case, laid.case.key_dim**-0.5
    values = laid.key_pages[:, :, : case.value_dim] if shared else laid.value_pages
    page_values = torch.randn(len(values), case.value_dim).to(case.dtype)
    page_bias = 3 * torch.rand(len(values), 1)
    ends = (torch.arange(case.columns) + 1) * case.page_size
    token = laid.position[:, None] + torch.arange(case.rows)
    live = torch.arange(case.rows) < laid.lengths[:, None]
    full = live[..., None] & (ends <= token[..., None] + 1)  # [B, n, pages]
    known = torch.zeros(len(values), dtype=torch.bool)
    for b, h in torch.cartesian_prod(
        torch.arange(case.batch), torch.arange(case.kv_heads)
    ).tolist():
        pages = laid.table[b, h][full[b].any(0)]
        known[pages[pages >= 0].long()] = True
    page_values[~known] = torch.nan
    page_bias[~known] = torch.nan
    apart = (lists[..., None] != torch.arange(case.columns)).all(3)  # [B, Hkv, n, pages]
    read = full[:, None] & apart & (laid.table >= 0)[:, :, None]
    logits = case.key_dim**0.5 * torch.randn(*laid.query.shape[:3], case.columns)
    logits[torch.rand(logits.shape) < 0.05] = -torch.inf
    logits.masked_fill_(~read.repeat_interleave(case.group, 1), torch.nan)
    spec = attend_spec(
        case, pages="listed", summaries=True, softcap=bool(softcap), shared_kv=shared
    )
    got = run(
        spec, query=laid.query, key_pages=laid.key_pages, value_pages=values,
        page_table=laid.table, pages=lists, page_logits=logits, page_values=page_values,
        page_bias=page_bias, position=laid.position, lengths=laid.lengths, scale=scale,
        softcap=softcap,
    )  # fmt: skip
    truth, eager = (
        summaries_by_hand(
            *(laid, dtype, lists, logits, page_values, page_bias),
            values=values, scale=scale, softcap=softcap,
        )
        for dtype in (torch.float64, case.dtype)
    )  # fmt: skip
    longest = max(p + n for p, n in zip(case.position, case.lengths, strict=True))
    for part, actual, plain, exact in zip(("out", "lse"), got, eager, truth, strict=True):
        assert actual.dtype == torch.float32
        assert_close_to_float64(
            actual, plain, exact, reduction=longest * case.key_dim, logarithm=part == "lse"
        )
    return got


@by_dtype
@pytest.mark.parametrize("page_size", [1, long(4), long(16), 64, long(128)])
def test_summaries_stand_for_pages_that_are_not_listed(dtype: torch.dtype, page_size: int) -> None:
    tokens = 100 if page_size == 1 else 290
    case = Case(
        position=(tokens, 33, 5), lengths=(3, 1, 0), group=3, page_size=page_size, dtype=dtype, **D
    )
    laid = Laid(case)
    lists = page_lists(laid, min(case.columns, 70))
    lists[..., lists.shape[3] // 3 :: 2] = -1
    lists[..., -1] = case.columns + 5  # no page of the table
    read_summaries(laid, lists)
    punch_holes(laid, 4)
    read_summaries(laid, lists)


@by_dtype
@pytest.mark.parametrize(
    ("key_dim", "value_dim", "group", "shared"),
    [(40, 80, 1, False), (128, 96, 5, False), (16, 8, 70, False), (48, 24, 3, True)],
)
def test_summaries_cover_groups_and_dims(
    dtype: torch.dtype, key_dim: int, value_dim: int, group: int, shared: bool
) -> None:
    case = Case(
        position=(140, 77), lengths=(1, 1), kv_heads=2, group=group, page_size=16, dtype=dtype,
        key_dim=key_dim, value_dim=value_dim,
    )  # fmt: skip
    laid = Laid(case)
    read_summaries(laid, page_lists(laid, 3), shared=shared)


@by_dtype
def test_summaries_are_capped_as_keys_are(dtype: torch.dtype) -> None:
    laid = Laid(Case(position=(90, 200), lengths=(2, 1), group=3, page_size=16, dtype=dtype, **D))
    laid.query *= 4
    read_summaries(laid, page_lists(laid, 4), softcap=3.0)


def test_summaries_without_a_list_or_without_a_page() -> None:
    """Empty lists leave records alone; before the first page is full, there is not even one."""
    laid = Laid(Case(position=(63, 3), lengths=(1, 1), group=2, page_size=16, **D))
    got = read_summaries(laid, torch.full((2, 1, 1, 3), -1, dtype=torch.int32))
    assert got[1][0].isfinite().all()
    assert (got[1][1] == -torch.inf).all() and (got[0][1] == 0).all()
