"""What generated Triton kernels compute, against float64.

`test_numerics.py` runs this file in a process of its own: on a GPU where there is one, otherwise
through Triton's interpreter, which has to be chosen before the first kernel is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor
from triton_case import (
    DEVICE,
    DTYPES,
    Case,
    Laid,
    attend_by_hand,
    attend_spec,
    dtype_name,
    page_lists,
    punch_holes,
    run,
)

import memcompile.models.ops  # noqa: F401 (registers the references)
from memcompile.codegen.spec import KernelSpec
from memcompile.codegen.triton import load
from memcompile.codegen.triton.tune import example
from memcompile.models.memory.parts import INDEX_FIELDS, SCORE_FIELDS, field_width

reference = torch.ops.memcompile
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
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
) -> tuple[Tensor, ...]:
    """Runs attend on a laid out case and holds its results to float64."""
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
    )
    got = run(
        spec, query=laid.query, key_pages=laid.key_pages, value_pages=values, bias=bias,
        page_table=laid.table, pages=pages, position=laid.position, lengths=laid.lengths,
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
@pytest.mark.parametrize("page_size", [4, 16, 64, 128])
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


@pytest.mark.parametrize(("count", "value_dim"), [(1, 8), (2, 128), (3, 40), (4, 512)])
def test_combine_merges_reads(count: int, value_dim: int) -> None:
    outs = [torch.randn(2, 3, 5, value_dim) for _ in range(count)]
    lses = [torch.randn(2, 3, 5) * 4 for _ in range(count)]
    for out, lse in zip(outs, lses, strict=True):
        lse[torch.rand(2, 3, 5) < 0.3] = -torch.inf
        out[lse == -torch.inf] = 0
    spec = KernelSpec("combine", value_dim=value_dim, count=count)
    named = {f"out{i}": out for i, out in enumerate(outs)}
    got = run(spec, **named, **{f"lse{i}": lse for i, lse in enumerate(lses)})
    truth = reference.combine([o.double() for o in outs], [x.double() for x in lses])
    eager = reference.combine(outs, lses)
    for part, *three in zip(("out", "lse"), got, eager, truth, strict=True):
        assert_close_to_float64(*three, reduction=4 * count, logarithm=part == "lse")


def empty_pools(laid: Laid, fields: tuple[str, ...]) -> dict[str, Tensor]:
    c, count = laid.case, len(laid.key_pages)
    pools = {"key_pages": laid.key_pages, "value_pages": laid.value_pages}
    pools = {name: torch.full_like(pool, torch.nan) for name, pool in pools.items()}
    for name in fields:
        dtype = torch.float32 if name == "log_count" else c.dtype
        shape = (count, field_width(name, c.key_dim, c.value_dim))
        pools[f"index_{name}"] = torch.full(shape, torch.nan, dtype=dtype)
    return pools


def append(laid: Laid, spec: KernelSpec, pools: dict[str, Tensor], cuts: list[int]) -> None:
    """Appends every token of the case in calls that end at `cuts`; padding carries NaN."""
    c = laid.case
    held = torch.tensor([len(k[0]) for k in laid.keys])
    start = 0
    for stop in cuts:
        position, end = held.clamp_max(start), held.clamp_max(stop)
        new = {}
        for name, tokens in (("key", laid.keys), ("value", laid.values)):
            width = tokens[0].shape[2]
            new[name] = torch.full(
                (c.batch, c.kv_heads, stop - start, width), torch.nan, dtype=c.dtype
            )
            for b, sequence in enumerate(tokens):
                part = sequence[:, position[b] : end[b]]
                new[name][b, :, : part.shape[1]] = part
        run(
            spec, **new, page_table=laid.table, position=position.int(),
            lengths=(end - position).int(), **pools,
        )  # fmt: skip
        start = stop


def records_by_hand(keys: Tensor, values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    keys, values = keys.to(dtype), values.to(dtype)
    apart = keys - keys.mean(0)
    return {
        "mean": keys.mean(0),
        "std": keys.std(0, correction=0),
        "min": keys.amin(0),
        "max": keys.amax(0),
        "radius": apart.norm(dim=1).max().view(1),
        "value_mean": values.mean(0),
        "log_count": torch.tensor([float(len(keys))], dtype=dtype).log(),
    }


@by_dtype
@pytest.mark.parametrize(
    ("page_size", "dims", "fields"),
    [
        (16, (40, 24), INDEX_FIELDS),
        (64, (128, 80), INDEX_FIELDS),
        (256, (128, 16), INDEX_FIELDS),
        (256, (96, 256), ("min",)),
        (1, (16, 8), ()),
        (8, (16, 8), ("value_mean", "radius")),
    ],
)
def test_append_writes_tokens_and_records(
    dtype: torch.dtype, page_size: int, dims: tuple[int, int], fields: tuple[str, ...]
) -> None:
    held = (3, 0) if page_size == 1 else (page_size + 9, 5)
    laid = Laid(Case(
        position=held, lengths=(0, 0), kv_heads=2, group=1, page_size=page_size, dtype=dtype,
        key_dim=dims[0], value_dim=dims[1],
    ))  # fmt: skip
    spec = KernelSpec(
        "append_index", dtype=dtype_name(dtype), key_dim=dims[0], value_dim=dims[1],
        page_size=page_size, fields=fields,
    )  # fmt: skip
    pools, split = empty_pools(laid, fields), empty_pools(laid, fields)
    append(laid, spec, pools, [max(held)])
    append(laid, spec, split, [2, max(held)] if page_size == 1 else [4, max(held) - 8, max(held)])
    for name in ("key_pages", "value_pages"):
        assert torch.equal(pools[name].nan_to_num(7), getattr(laid, name).nan_to_num(7))
    for name, pool in pools.items():
        assert torch.equal(pool.nan_to_num(7), split[name].nan_to_num(7)), name
    full = set()
    got, eager, truth = ({name: [] for name in INDEX_FIELDS} for _ in range(3))
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        for page in range(held[b] // page_size):  # the open page has no record
            physical, start = int(laid.table[b, h, page]), page * page_size
            full.add(physical)
            tokens = slice(start, start + page_size)
            for into, kind in ((eager, dtype), (truth, torch.float64)):
                hand = records_by_hand(laid.keys[b][h, tokens], laid.values[b][h, tokens], kind)
                for name in fields:
                    into[name].append(hand[name])
            for name in fields:
                got[name].append(pools[f"index_{name}"][physical])
    for name in fields:
        # Spreads are differences: what rounds is the keys they are taken between.
        kind = torch.float32 if name == "log_count" else dtype
        largest = [x.abs().max()[None] for k in laid.keys for x in k if x.numel()]
        scale = largest if name in ("std", "radius") else []
        assert_close_to_float64(
            torch.cat([*got[name], *scale]).to(kind),
            torch.cat([*eager[name], *scale]).to(kind),
            torch.cat([*truth[name], *(x.double() for x in scale)]),
            reduction=page_size * dims[0],
        )
        for physical in {*range(len(laid.key_pages))} - full:
            assert pools[f"index_{name}"][physical].isnan().all()


@by_dtype
def test_append_writes_keys_whose_part_is_the_value(dtype: torch.dtype) -> None:
    laid = Laid(
        Case(
            position=(21,),
            lengths=(0,),
            group=1,
            page_size=16,
            dtype=dtype,
            key_dim=40,
            value_dim=24,
        )
    )
    fields = ("mean", "value_mean")
    spec = KernelSpec(
        "append_index", dtype=dtype_name(dtype), key_dim=40, value_dim=24, page_size=16,
        fields=fields, shared_kv=True,
    )  # fmt: skip
    pools = empty_pools(laid, fields)
    append(laid, spec, pools, [21])
    assert torch.equal(pools["key_pages"].nan_to_num(7), laid.key_pages.nan_to_num(7))
    assert torch.equal(
        pools["index_value_mean"].nan_to_num(7), pools["index_mean"][:, :24].nan_to_num(7)
    )


def test_append_leaves_out_tokens_without_a_page() -> None:
    laid = Laid(
        Case(
            position=(40,), lengths=(0,), kv_heads=1, group=1, page_size=16, key_dim=16, value_dim=8
        )
    )
    spec = KernelSpec("append_index", key_dim=16, value_dim=8, page_size=16, fields=("mean",))
    lost = int(laid.table[0, 0, 1])
    laid.table[0, 0, 1] = -1
    laid.table = laid.table[:, :, :2].contiguous()
    pools = empty_pools(laid, ("mean",))
    append(laid, spec, pools, [40])
    first = int(laid.table[0, 0, 0])
    written = [i for i in range(len(laid.key_pages)) if not pools["key_pages"][i].isnan().any()]
    assert written == [first] and lost != first
    assert not pools["index_mean"][first].isnan().any()


def quantised(laid: Laid, score: str) -> dict[str, Tensor]:
    """Whole records and queries of norm 5: scores are exact in every precision, ties frequent.

    Records of pages that are not full are poison.
    """
    case = laid.case
    make = torch.Generator().manual_seed(case.seed)
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
    held = torch.tensor([len(k[0]) for k in laid.keys])
    page = torch.arange(case.columns)
    for b, h in torch.cartesian_prod(
        torch.arange(case.batch), torch.arange(case.kv_heads)
    ).tolist():
        unfilled = laid.table[b, h][(page + 1) * case.page_size > held[b]]
        for pool in records.values():
            pool[unfilled[unfilled >= 0].long()] = torch.nan
    return records


def select(laid: Laid, records: dict[str, Tensor], score: str, *limits: int) -> Tensor:
    case = laid.case
    spec = KernelSpec(
        "score_select", dtype=dtype_name(case.dtype), key_dim=case.key_dim, group=case.group,
        page_size=case.page_size, score=score,
    )  # fmt: skip
    names = ("sink_pages", "window_pages", "capacity", "budget_pages", "dense_below")
    given = dict(zip(names, limits, strict=True))
    got: Tensor = run(
        spec, query=laid.query, **{f"index_{name}": r for name, r in records.items()},
        page_table=laid.table, position=laid.position, lengths=laid.lengths, **given,
    )  # fmt: skip
    wanted = reference.score_select(
        laid.query, list(records.values()), list(records), laid.table, laid.position,
        laid.lengths, score, case.page_size, *limits,
    )  # fmt: skip
    assert got.dtype == torch.int32
    assert got.tolist() == wanted.tolist()
    return got


@by_dtype
@pytest.mark.parametrize("score", [*SCORE_FIELDS])
@pytest.mark.parametrize(
    ("group", "key_dim"), [(2, 8), (3, 40), (5, 128), pytest.param(70, 264, id="wide")]
)
def test_selection_is_the_references(
    dtype: torch.dtype, score: str, group: int, key_dim: int
) -> None:
    case = Case(
        position=(130, 21), lengths=(2, 1), kv_heads=1, group=group, page_size=4, dtype=dtype,
        key_dim=key_dim, value_dim=8,
    )  # fmt: skip
    laid = Laid(case)
    records = quantised(laid, score)
    select(laid, records, score, 1, 1, 10, 8, 0)
    if group < 70:
        punch_holes(laid, 5)
        select(laid, records, score, 0, 2, 9, 9, 22)


@by_dtype
@pytest.mark.parametrize("columns", [300, 1030])
def test_selection_from_tables_of_any_width(dtype: torch.dtype, columns: int) -> None:
    case = Case(
        position=(4 * columns - 9,),
        lengths=(1,),
        kv_heads=1,
        group=2,
        page_size=4,
        dtype=dtype,
        key_dim=16,
        value_dim=8,
    )
    laid = Laid(case)
    records = quantised(laid, "mean-std")
    got = select(laid, records, "mean-std", 2, 3, 140, 130, 0)
    assert int((got >= 0).sum()) == 130


def test_selection_in_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width that is not known when the launch is traced; ranks come in several blocks."""
    from memcompile.codegen.triton import emit
    from memcompile.codegen.triton.load import imported

    case = Case(
        position=(700, 44),
        lengths=(2, 1),
        kv_heads=2,
        group=2,
        page_size=4,
        key_dim=16,
        value_dim=8,
    )
    laid = Laid(case)
    records = quantised(laid, "box")
    spec = KernelSpec("score_select", key_dim=16, group=2, page_size=4, score="box")
    target = emit.device_target()
    chosen = emit.launches(spec, target)
    chosen["choose"] = dataclasses.replace(chosen["choose"], constants={"BLOCK_R": 64})
    monkeypatch.setattr(emit, "launches", lambda *_: chosen)
    made = imported(emit.path(spec, target))
    monkeypatch.setattr(made, "known_at_most", lambda *_: False)
    tensors = [laid.query, *records.values(), laid.table, laid.position, laid.lengths]
    limits = (1, 1, 40, 30, 0)
    got = made.score_select(*(tensor.to(DEVICE) for tensor in tensors), *limits)
    wanted = reference.score_select(
        laid.query, list(records.values()), list(records), laid.table, laid.position,
        laid.lengths, "box", 4, *limits,
    )  # fmt: skip
    assert got.tolist() == wanted.tolist()


def test_a_score_that_overflows_never_displaces_the_open_page() -> None:
    laid = Laid(
        Case(position=(23,), lengths=(1,), kv_heads=1, group=1, page_size=4, key_dim=8, value_dim=8)
    )
    laid.query = torch.ones_like(laid.query)
    for extreme in (torch.inf, -torch.inf, torch.nan):
        mean = torch.full((len(laid.key_pages), 8), extreme)
        got = select(laid, {"mean": mean}, "mean", 1, 1, 4, 4, 0)
        assert got.tolist() == [[[[0, 1, 4, 5]]]]


def test_a_score_that_is_nan_for_one_head_is_the_lowest() -> None:
    case = Case(
        position=(39,), lengths=(1,), kv_heads=1, group=2, page_size=4, key_dim=8, value_dim=8
    )
    laid = Laid(case)
    laid.query = torch.ones_like(laid.query)
    laid.query[:, 1] = 0
    mean = torch.full((len(laid.key_pages), 8), 0.5)
    mean[laid.table[0, 0, 3:5].long()] = torch.inf  # inf for the first head, nan for the second
    got = select(laid, {"mean": mean}, "mean", 1, 1, 5, 5, 0)
    assert got.tolist() == [[[[0, 1, 2, 8, 9]]]]


@pytest.mark.parametrize(
    "spec",
    [
        KernelSpec("attend", key_dim=16, value_dim=8, group=2, page_size=16),
        KernelSpec(
            "attend", key_dim=16, value_dim=8, pages="unlisted", span=16, bias=True,
            softcap=True, window=True,
        ),
        KernelSpec("score_select", key_dim=16, group=2, page_size=16, score="mean-std"),
        KernelSpec("append_index", key_dim=16, value_dim=8, page_size=16, fields=INDEX_FIELDS),
        KernelSpec("combine", value_dim=8, count=2),
    ],
    ids=lambda spec: spec.name,
)  # fmt: skip
def test_what_tuning_measures_runs(spec: KernelSpec) -> None:
    given = example(spec, torch.device(DEVICE), 1, 2, 80, 3, 32)
    out = load([spec])[spec](*given)
    for tensor in out if isinstance(out, tuple) else ():
        assert tensor.isfinite().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_step_is_captured_in_a_cuda_graph() -> None:
    """Select and read replay with other positions, tables and queries than were captured."""
    case = Case(
        position=(700, 90), lengths=(1, 1), kv_heads=2, group=3, page_size=16,
        dtype=torch.bfloat16, key_dim=64, value_dim=64,
    )  # fmt: skip
    laid, later = Laid(case), Laid(dataclasses.replace(case, position=(650, 200), seed=1))
    later.table = torch.nn.functional.pad(
        later.table, (0, laid.table.shape[2] - later.table.shape[2]), value=-1
    )
    records = quantised(laid, "mean")
    shapes = dict(dtype="bfloat16", key_dim=64, group=3, page_size=16)
    chooses = KernelSpec("score_select", score="mean", **shapes)  # type: ignore[arg-type]
    reads = KernelSpec("attend", value_dim=64, pages="listed", **shapes)  # type: ignore[arg-type]
    ops = load([chooses, reads])
    query, table, position, lengths = (
        x.to(DEVICE) for x in (laid.query, laid.table, laid.position, laid.lengths)
    )
    keys, values = (p.nan_to_num(0).to(DEVICE) for p in (laid.key_pages, laid.value_pages))
    mean = records["mean"].nan_to_num(0).to(DEVICE)

    def step() -> tuple[Tensor, ...]:
        pages = ops[chooses](query, mean, table, position, lengths, 1, 1, 12, 10, 0)
        return (pages, *ops[reads](query, keys, values, table, pages, position, lengths, 0.1))

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in (laid, later):
        query.copy_(other.query.nan_to_num(0))
        table.copy_(other.table.clamp_max(len(keys) - 1))
        position.copy_(other.position)
        graph.replay()
        for replayed, fresh in zip(captured, step(), strict=True):
            assert torch.equal(replayed, fresh)
