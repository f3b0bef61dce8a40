"""Generated C++ appending: tokens bit by bit, records against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_case import Laid, Shape, lay_out, shapes
from tolerance import assert_close_to_float64
from torch import Tensor

from memcompile.codegen import cpp
from memcompile.codegen.spec import KernelSpec
from memcompile.models.memory.parts import INDEX_FIELDS, field_width
from memcompile.models.memory.records import append_index, append_index_record_table

SUMMARY = ("mean", "std", "value_mean", "log_count")
SPECS = [
    KernelSpec("append_index", "bfloat16", 128, 128, page_size=64, fields=SUMMARY),
    KernelSpec("append_index", "float32", 40, 24, page_size=16, fields=INDEX_FIELDS),
    KernelSpec("append_index", "float16", 80, 256, page_size=32, fields=INDEX_FIELDS),
    KernelSpec("append_index", "bfloat16", 8, 64, page_size=128, fields=("max", "min")),
    KernelSpec("append_index", "bfloat16", 576, 512, True, page_size=64, fields=SUMMARY),
    KernelSpec("append_index", "float32", 64, 64, page_size=16),
    KernelSpec(
        "append_index", "bfloat16", 64, 40, page_size=16, fields=INDEX_FIELDS, record_table=True
    ),
]
BY_NAME = {spec.name: spec for spec in SPECS}
Pools = tuple[Tensor, Tensor, list[Tensor]]


@pytest.fixture(scope="module")
def operators():
    return cpp.load(SPECS)


def empty(laid: Laid, dtype: torch.dtype | None = None) -> Pools:
    """Key and value pools and an index without anything written: all NaN."""
    spec, count = laid.spec, len(laid.given["key_pages"])
    dtype = dtype or spec.torch_dtype
    small = torch.float32 if dtype != torch.float64 else dtype
    rows = count + 2 if spec.record_table else count
    keys, values = (
        torch.full((count, spec.page_size, width), torch.nan, dtype=dtype)
        for width in (spec.key_dim, spec.value_dim)
    )
    index = [
        torch.full(
            (rows, field_width(field, spec.key_dim, spec.value_dim)),
            torch.nan,
            dtype=small if field == "log_count" else dtype,
        )
        for field in spec.fields
    ]
    return keys, keys[..., : spec.value_dim] if spec.shared_kv else values, index


def tokens(laid: Laid, pool: str, begin: list[int], end: list[int]) -> Tensor:
    """Tokens begin[b] .. end[b] - 1 as [B, Hkv, n, D], laid out by token, NaN behind the last."""
    g, c = laid.given, laid.shape
    pages, table = g[pool], g["page_table"]
    n = max(stop - start for start, stop in zip(begin, end, strict=True))
    padded = torch.full((len(begin), n, c.kv_heads, pages.shape[2]), torch.nan, dtype=pages.dtype)
    for b, (start, stop) in enumerate(zip(begin, end, strict=True)):
        held = pages[table[b].clamp_min(0).long()].flatten(1, 2)
        padded[b, : stop - start] = held[:, start:stop].transpose(0, 1)
    return padded.transpose(1, 2)


def append(laid: Laid, pools: Pools, cuts: list[int], kernel=None) -> None:
    """Appends all of the laid-out tokens in calls that end at `cuts`."""
    spec, g = laid.spec, laid.given
    held = (g["position"] + g["lengths"]).tolist()
    start = 0
    for stop in cuts:
        begin, end = ([min(count, at) for count in held] for at in (start, stop))
        key = tokens(laid, "key_pages", begin, end)
        value = key[..., : spec.value_dim]
        if not spec.shared_kv:
            value = tokens(laid, "value_pages", begin, end)
        position = torch.tensor(begin, dtype=torch.int32)
        lengths = torch.tensor(end, dtype=torch.int32) - position
        tables = ("page_table", "record_table") if spec.record_table else ("page_table",)
        at = (*(g[name] for name in tables), position, lengths)
        if kernel is None:
            wide = pools[0].dtype
            reference = append_index_record_table if spec.record_table else append_index
            reference(key.to(wide), value.to(wide), *at, *pools, list(spec.fields))
        elif spec.shared_kv:
            kernel(key, *at, pools[0], *pools[2])
        else:
            kernel(key, value, *at, pools[0], pools[1], *pools[2])
        start = stop


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def same(one: Pools, two: Pools) -> bool:
    flat = zip((*one[:2], *one[2]), (*two[:2], *two[2]), strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in flat)


def check(laid: Laid, cuts: list[int], operators) -> Pools:
    spec = laid.spec
    pools, eager, truth = empty(laid), empty(laid), empty(laid, torch.float64)
    append(laid, pools, cuts, operators[spec])
    append(laid, eager, cuts[-1:])
    append(laid, truth, cuts[-1:])
    assert torch.equal(bits(pools[0]), bits(laid.given["key_pages"]))
    if not spec.shared_kv:
        assert torch.equal(bits(pools[1]), bits(laid.given["value_pages"]))
    written = truth[2][0].isfinite()[:, 0] if spec.fields else torch.zeros(0, dtype=torch.bool)
    for field, *three in zip(spec.fields, pools[2], eager[2], truth[2], strict=True):
        assert all(pool[~written].isnan().all() for pool in three), field
        assert_close_to_float64(
            *(pool[written] for pool in three),
            reduction=spec.page_size * spec.key_dim,
            logarithm=field == "log_count",
        )
    return pools


def ends(laid: Laid, cuts: list[int]) -> list[int]:
    most = int((laid.given["position"] + laid.given["lengths"]).max())
    return [*sorted({cut for cut in cuts if cut < most}), most]


splits = st.lists(st.integers(1, 300), max_size=4)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=12)
@given(shape=shapes(batch=(1, 2, 3)), cuts=splits)
def test_equals_the_reference(name: str, shape: Shape, cuts: list[int], operators) -> None:
    laid = lay_out(BY_NAME[name], replace(shape, holes=0))
    if laid.shape.tokens:
        check(laid, ends(laid, cuts), operators)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=4)
@given(shape=shapes(longest=140), cuts=splits)
def test_results_do_not_depend_on_the_split(name, shape, cuts, operators) -> None:
    laid = lay_out(BY_NAME[name], replace(shape, holes=0))
    most = ends(laid, [])[-1]
    pools = [empty(laid) for _ in range(3)]
    for filled, how in zip(pools, ([most], ends(laid, cuts), range(1, most + 1)), strict=True):
        append(laid, filled, list(how), operators[laid.spec])
    assert same(pools[0], pools[1]) and same(pools[0], pools[2])


@pytest.mark.parametrize("name", [SPECS[0].name, SPECS[2].name])
def test_many_sequences(name: str, operators) -> None:
    lengths = tuple(1 + b % 2 for b in range(64))
    laid = lay_out(BY_NAME[name], Shape(tuple(range(64)), lengths, rows=2))
    check(laid, ends(laid, [30]), operators)


def test_the_same_whatever_the_threads(operators) -> None:
    laid = lay_out(SPECS[0], Shape((500, 3), (1, 1)))
    many = torch.get_num_threads()
    try:
        pools = [empty(laid) for _ in range(3)]
        for threads, filled in zip((1, 2, 5), pools, strict=True):
            torch.set_num_threads(threads)
            append(laid, filled, ends(laid, [7, 200]), operators[laid.spec])
        assert same(pools[0], pools[1]) and same(pools[0], pools[2])
    finally:
        torch.set_num_threads(many)


def test_a_write_replaces_what_was_forgotten(operators) -> None:
    """After a rewind the page that fills anew has the record of its new tokens alone."""
    spec = SPECS[1]
    laid, other = (lay_out(spec, Shape((45,), (7,), rows=7, seed=seed)) for seed in (0, 1))
    rewound, fresh = empty(laid), empty(laid)
    append(laid, rewound, [52], operators[spec])
    append(laid, fresh, [33], operators[spec])
    old = [pool.clone() for pool in rewound[2]]
    for begin, end in (([33], [40]), ([40], [48])):
        new = [tokens(other, pool, begin, end) for pool in ("key_pages", "value_pages")]
        position = torch.tensor(begin, dtype=torch.int32)
        lengths = torch.tensor(end, dtype=torch.int32) - position
        for pools in (rewound, fresh):
            table = laid.given["page_table"]
            operators[spec](*new, table, position, lengths, *pools[:2], *pools[2])
    assert rewound[0].isfinite().sum() > fresh[0].isfinite().sum()  # what is gone lies there still
    assert all(map(torch.equal, map(bits, rewound[2]), map(bits, fresh[2])))
    assert not torch.equal(bits(rewound[2][0]), bits(old[0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_shows_as_in_the_reference(bad: float, operators) -> None:
    for spec in (SPECS[1], SPECS[2]):
        laid = lay_out(spec, Shape((50,), (3,), rows=3))
        page = laid.given["page_table"][0].long()
        laid.given["key_pages"][page[0, 0], 5, 3] = bad
        laid.given["key_pages"][page[1, 1], 0, 7] = bad
        laid.given["value_pages"][page[1, 0], 2, 1] = bad
        pools, eager = empty(laid), empty(laid)
        append(laid, pools, [53], operators[spec])
        append(laid, eager, [53])
        for field, one, two in zip(spec.fields, pools[2], eager[2], strict=True):
            odd = ~two.isfinite()
            assert torch.equal(one.isfinite(), ~odd), field
            assert torch.equal(one[odd].nan_to_num(7), two[odd].nan_to_num(7)), field


@pytest.mark.parametrize("table", ["too short", "unassigned", "one head's page missing", "no pool"])
def test_tokens_without_a_page_are_refused_before_any_is_written(table: str, operators) -> None:
    laid = lay_out(SPECS[1], Shape((20, 40), (9, 9), rows=9))
    given = laid.given["page_table"]
    if table == "too short":
        laid.given["page_table"] = given[:, :, :3]
    elif table == "unassigned":
        laid.given["page_table"] = torch.full_like(given, -1)
    elif table == "one head's page missing":
        given[1, 1, 48 // 16] = -1
    else:
        given[1, 1, 48 // 16] = len(laid.given["key_pages"])
    pools, untouched = empty(laid), empty(laid)
    new = [torch.randn(2, 2, 9, width) for width in (40, 24)]
    at = [laid.given[name] for name in ("page_table", "position", "lengths")]
    with pytest.raises(IndexError, match="reserve the tokens first"):
        operators[SPECS[1]](*new, *at, *pools[:2], *pools[2])
    assert same(pools, untouched)


def test_records_stay_where_pages_are_let_go(operators) -> None:
    """Full pages leave the table, and later ones take their places in the pools."""
    spec = SPECS[6]
    laid = lay_out(spec, Shape((70,), (9,), rows=9))
    kept, ring, g = empty(laid), empty(laid), laid.given
    append(laid, kept, [79], operators[spec])
    for start in range(0, 79, 8):
        stop, page = min(start + 8, 79), start // 16
        new = [tokens(laid, pool, [start], [stop]) for pool in ("key_pages", "value_pages")]
        table = torch.full_like(g["page_table"], -1)
        table[:, :, page] = g["page_table"][:, :, page % 2]
        at = (torch.tensor([x], dtype=torch.int32) for x in (start, stop - start))
        operators[spec](*new, table, g["record_table"], *at, *ring[:2], *ring[2])
    assert all(map(torch.equal, map(bits, kept[2]), map(bits, ring[2])))
    assert kept[0].isfinite().sum() > 2 * ring[0].isfinite().sum()


@pytest.mark.parametrize("fault", ["too short", "unassigned", "no pool"])
def test_records_without_a_row_are_refused_before_any_is_written(fault: str, operators) -> None:
    laid = lay_out(SPECS[6], Shape((20, 40), (9, 9), rows=9))
    record_table = laid.given["record_table"]
    if fault == "too short":
        laid.given["record_table"] = record_table[:, :, :2].contiguous()
    else:
        record_table[1, 1, 2] = -1 if fault == "unassigned" else len(laid.given["key_pages"]) + 2
    pools, untouched = empty(laid), empty(laid)
    new = [torch.randn(2, 2, 9, width).bfloat16() for width in (64, 40)]
    at = [laid.given[name] for name in ("page_table", "record_table", "position", "lengths")]
    with pytest.raises(IndexError, match=r"column 2 of .* names no row .* in record_table"):
        operators[SPECS[6]](*new, *at, *pools[:2], *pools[2])
    assert same(pools, untouched)


def test_calls_without_tokens(operators) -> None:
    laid = lay_out(SPECS[1], Shape((20,), (0,), rows=3))
    pools, untouched = empty(laid), empty(laid)
    at = [laid.given[name] for name in ("page_table", "position", "lengths")]
    for rows in (0, 3):
        new = [torch.randn(1, 2, rows, width) for width in (40, 24)]
        operators[SPECS[1]](*new, *at, *pools[:2], *pools[2])
    assert same(pools, untouched)


def test_wrong_tensors_are_refused(operators) -> None:
    laid = lay_out(SPECS[1], Shape())
    keys, values, index = empty(laid)
    new = [torch.randn(1, 2, 1, width) for width in (40, 24)]
    at = [laid.given[name] for name in ("page_table", "position", "lengths")]
    kernel = operators[SPECS[1]]
    with pytest.raises(TypeError, match=r"value is Half; this kernel reads Float"):
        kernel(new[0], new[1].half(), *at, keys, values, *index)
    with pytest.raises(ValueError, match=r"index_mean is \[\d+, 1\]; this call needs"):
        kernel(*new, *at, keys, values, index[0][:, :1].contiguous(), *index[1:])
    with pytest.raises(ValueError, match=r"key_pages must be \[P, 16, 40\]"):
        kernel(*new, *at, keys[0], values, *index)


def test_golden_source(golden) -> None:
    golden(f"{SPECS[0].name}.cpp", cpp.source(SPECS[0]))


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
    dims=st.tuples(*[st.sampled_from((8, 40, 128, 512, 576))] * 2),
    shared=st.booleans(),
    page_size=st.sampled_from((1, 16, 1024)),
    fields=st.lists(st.sampled_from(INDEX_FIELDS), unique=True),
)
def test_every_spec_prints_readable_source(dtype, dims, shared, page_size, fields) -> None:
    value_dim = min(dims) if shared else dims[1]
    spec = KernelSpec(
        "append_index", dtype, dims[0], value_dim, shared, page_size=page_size, fields=tuple(fields)
    )
    text = cpp.source(spec)
    assert ("radius(" in text) == ("radius" in fields)
    assert ("value_pages" in text) == (not shared)
