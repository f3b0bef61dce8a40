"""Calls on levels become kernel specs: what a call decides, and what no kernel covers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from level_case import FOLDS, Fold, lay_out_fold

from memcompile.codegen import operators
from memcompile.codegen.spec import KernelSpec, NotCovered, specialise


def fold_call(laid: Fold, fields: tuple[str, ...]) -> list[Any]:
    """The arguments of append_index.fold with some of the fields."""
    g = laid.given
    children, index = ([g[f"{of}_{name}"] for name in fields] for of in ("children", "index"))
    at = (g["child_table"], g["page_table"], g["position"], g["lengths"])
    return [children, *at, index, list(fields), g["child_size"], g["ratio"]]


@pytest.mark.parametrize("spec", FOLDS, ids=lambda spec: spec.name)
def test_folding(spec: KernelSpec) -> None:
    laid = lay_out_fold(spec, (5,), (40,), 4, 4)
    made, given = specialise("append_index.fold", fold_call(laid, spec.fields))
    assert made == spec and spec == KernelSpec.from_json(spec.to_json())
    wanted = [laid.given[name] for _, name in spec.arguments]
    assert all(one is two for one, two in zip(given, wanted, strict=True))
    assert operators.fake(spec)(*given) is None


def test_folding_that_no_kernel_covers() -> None:
    laid = lay_out_fold(FOLDS[1], (5,), (40,), 4, 4)
    with pytest.raises(NotCovered, match="std, min are not folded without the mean"):
        specialise("append_index.fold", fold_call(laid, ("std", "min")))
    call = fold_call(laid, ("mean",))
    with pytest.raises(NotCovered, match="elements of float64"):
        specialise("append_index.fold", [[call[0][0].double()], *call[1:]])
    call[5] = [call[5][0].half()]
    with pytest.raises(NotCovered, match=r"torch.float16 beside torch.float32"):
        specialise("append_index.fold", call)


def test_records_in_rows_of_their_own() -> None:
    new = [torch.randn(1, 2, 3, width) for width in (16, 8)]
    tables = [torch.zeros(1, 2, columns, dtype=torch.int32) for columns in (4, 9)]
    at = [torch.zeros(1, dtype=torch.int32)] * 2
    pools = [torch.zeros(5, 4, width) for width in (16, 8)]
    mean = torch.zeros(20, 16)
    given = [*new, *tables, *at, *pools]
    spec, args = specialise("append_index.record_table", [*given, [mean], ["mean"]])
    shape: dict[str, Any] = dict(key_dim=16, value_dim=8, page_size=4)
    assert spec == KernelSpec("append_index", fields=("mean",), record_table=True, **shape)
    assert all(one is two for one, two in zip(args, [*given, mean], strict=True))
    spec, args = specialise("append_index.record_table", [*given, [], []])
    assert spec == KernelSpec("append_index", **shape)  # nothing is recorded, wherever
    assert all(one is two for one, two in zip(args, [*new, tables[0], *at, *pools], strict=True))


def test_choosing_among_candidates() -> None:
    query, mean = torch.randn(1, 6, 3, 16), torch.randn(9, 16)
    table, lists = (torch.zeros(shape, dtype=torch.int32) for shape in ((1, 2, 4), (1, 2, 3, 7)))
    at = [torch.zeros(1, dtype=torch.int32)] * 2
    given = [query, [mean], ["mean"], table, lists, *at]
    spec, args = specialise("score_select.among", [*given, "mean", 1 << 20, 1, 2, 5])
    assert spec == KernelSpec(
        "score_select", key_dim=16, group=3, page_size=1 << 20, score="mean", among=True
    )
    wanted = [query, mean, table, lists, *at, 1, 2, 5]
    assert all(one is two for one, two in zip(args, wanted, strict=True))
    assert operators.fake(spec)(*args).shape == (1, 2, 3, 5)
    with pytest.raises(NotCovered, match="pages of 2097152 tokens; kernels cover"):
        specialise("score_select.among", [*given, "mean", 1 << 21, 1, 2, 5])


def test_every_kind_has_a_name_and_a_template_of_its_own() -> None:
    shape: dict[str, Any] = dict(key_dim=16, value_dim=8, page_size=4, fields=("mean",))
    append = KernelSpec("append_index", **shape)
    apart = KernelSpec("append_index", record_table=True, **shape)
    fold = KernelSpec("append_index", key_dim=16, value_dim=8, fields=("mean",), fold=True)
    select = KernelSpec("score_select", key_dim=16, page_size=4, score="mean")
    among = KernelSpec("score_select", key_dim=16, page_size=4, score="mean", among=True)
    kinds = (append, apart, fold, select, among)
    assert [spec.name for spec in kinds] == [
        "append_index_f32_k16_v8_p4_mean",
        "append_index_f32_k16_v8_p4_record_table_mean",
        "append_index_f32_k16_v8_fold_mean",
        "score_select_f32_k16_g1_p4_mean",
        "score_select_f32_k16_g1_p4_among_mean",
    ]
    assert [spec.template for spec in kinds] == [
        *("append_index", "append_index", "append_index_fold"),
        *("score_select", "score_select_among"),
    ]
