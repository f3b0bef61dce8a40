"""Generated C++ records of records, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from level_case import FOLDS, Fold, lay_out_fold

from memcompile.codegen import cpp
from memcompile.codegen.spec import KernelSpec
from memcompile.models.memory.parts import INDEX_FIELDS

BY_NAME = {spec.name: spec for spec in FOLDS}
FOLD = lay_out_fold(FOLDS[1], (40, 9), (9, 40), 4, 4)


@pytest.fixture(scope="module")
def operators():
    return cpp.load(FOLDS)


def run(fold: Fold, operators) -> Fold:
    operators[fold.spec](*(fold.given[name] for _, name in fold.spec.arguments))
    return fold


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=10)
@given(
    added=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 70)), min_size=1, max_size=3),
    child_size=st.sampled_from((1, 4, 16)),
    ratio=st.sampled_from((1, 2, 5, 16)),
    kv_heads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(name, added, child_size, ratio, kv_heads, seed, operators) -> None:
    position, lengths = zip(*added, strict=True)
    fold = lay_out_fold(BY_NAME[name], position, lengths, child_size, ratio, kv_heads, seed)
    run(fold, operators).check()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_many_groups_whatever_the_threads(name: str, threads: int, operators) -> None:
    many = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        fold = lay_out_fold(BY_NAME[name], (3, 4096), (7000, 100), 64, 8)
        assert run(fold, operators).check() == 2 * 13
    finally:
        torch.set_num_threads(many)


def test_a_group_does_not_depend_on_its_call(operators) -> None:
    together = run(lay_out_fold(FOLDS[1], (5,), (250,), 4, 4), operators)
    apart = lay_out_fold(FOLDS[1], (5,), (250,), 4, 4)
    for token in range(5, 255):
        apart.given["position"][:] = token
        apart.given["lengths"][:] = 1
        run(apart, operators)
    for one, two in zip(together.pools("index"), apart.pools("index"), strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))
    assert together.check() == 2 * 15


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_shows_as_in_the_reference(bad: float, operators) -> None:
    for spec in FOLDS:
        fold = lay_out_fold(spec, (5,), (99,), 4, 4)
        for i, pool in enumerate(fold.pools("children")):
            pool[fold.given["child_table"][0, 0, 7 + i].long(), -1] = bad
        run(fold, operators)
        for field, one, two in zip(spec.fields, fold.pools("index"), fold.reference(), strict=True):
            odd = ~two.isfinite()
            assert torch.equal(one.isfinite(), ~odd), field
            assert torch.equal(one[odd].nan_to_num(7), two[odd].nan_to_num(7)), field


def test_a_call_that_completes_nothing_reads_no_table(operators) -> None:
    fold = lay_out_fold(FOLDS[1], (40, 9), (7, 0), 4, 4)
    for table in ("child_table", "page_table"):
        fold.given[table] = torch.full((2, 2, 0), -1, dtype=torch.int32)
    run(fold, operators)
    assert all(pool.isnan().all() for pool in fold.pools("index"))


@pytest.mark.parametrize("table", ["child_table", "page_table"])
@pytest.mark.parametrize("fault", ["too short", "unassigned", "no pool"])
def test_missing_rows_are_refused_before_any_is_written(table: str, fault: str, operators) -> None:
    fold = lay_out_fold(FOLDS[1], (40, 9), (9, 40), 4, 4)
    last = (49 // 16 - 1) * (4 if table == "child_table" else 1)
    if fault == "too short":
        fold.given[table] = fold.given[table][:, :, :last].contiguous()
    else:
        fold.given[table][1, 1, last] = -1 if fault == "unassigned" else 10**8
    with pytest.raises(IndexError, match=f"names no row .* in {table}.*reserve the tokens first"):
        run(fold, operators)
    assert all(pool.isnan().all() for pool in fold.pools("index"))


def test_wrong_arguments_are_refused(operators) -> None:
    given = {**FOLD.given}
    for name, bad, error, match in (
        ("ratio", 0, ValueError, "groups of 0 children of 4 tokens; both must be at least 1"),
        ("page_table", given["page_table"][0], ValueError, r"page_table must be \[B, Hkv, col"),
        ("children_std", given["children_std"][:, :8].contiguous(), ValueError, "index_std is"),
        ("index_mean", given["index_mean"].half(), TypeError, "this kernel reads Float"),
    ):
        with pytest.raises(error, match=match):
            run(Fold(FOLD.spec, {**given, name: bad}), operators)


def test_golden_source(golden) -> None:
    golden(f"{FOLDS[0].name}.cpp", cpp.source(FOLDS[0]))


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
    dims=st.tuples(*[st.sampled_from((8, 40, 128, 576))] * 2),
    fields=st.lists(st.sampled_from(INDEX_FIELDS), min_size=1, unique=True),
)
def test_every_spec_prints_readable_source(dtype, dims, fields) -> None:
    fields = (*dict.fromkeys(("mean", *fields)),)
    text = cpp.source(KernelSpec("append_index", dtype, *dims, fields=fields, fold=True))
    assert ("radius_of(" in text) == ("radius" in fields)
    assert ("std_of(" in text) == ("std" in fields)
