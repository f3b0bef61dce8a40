"""Levels by generated Triton kernels: records of records, and choices among candidates.

`test_numerics.py` runs this file in a process of its own: on a GPU where there is one, otherwise
through Triton's interpreter, which has to be chosen before the first kernel is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_case import Shape, check_attend, lay_out
from level_case import FOLDS, Fold, candidates, lay_out_fold
from torch import Tensor
from triton_case import Case, Laid, by_dtype, dtype_name, punch_holes, quantised, run

import memcompile.models.ops  # noqa: F401 (registers the references)
from memcompile.codegen.spec import KernelSpec

reference = torch.ops.memcompile
EXACT = ("key_pages", "value_pages")
D: dict[str, Any] = dict(key_dim=16, value_dim=8, page_size=4)


@pytest.mark.parametrize("pages", ["all", "listed", "unlisted"])
@pytest.mark.parametrize("span", [4096, 1 << 18])
def test_records_of_many_tokens_are_read(span: int, pages: str) -> None:
    """A slot is seen from its last token on, whatever it stands for."""
    spec = KernelSpec(
        "attend", key_dim=16, value_dim=8, group=3, span=span, pages=pages, bias=True,
        page_lse=span == 4096,
    )  # fmt: skip
    shape = Shape((span * 40 - 2, span * 3 - 1, 7), (2, 1, 0), rows=2, holes=10, listed=20)
    laid = lay_out(spec, shape)
    check_attend(laid, run(spec, **laid.given))


@pytest.mark.parametrize("kind", ["window", "page_lse", "window and page_lse"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_reading_after_pages_were_evicted(page_size: int, kind: str) -> None:
    """All but the first and the last have left the table; each KV head kept one more of its own."""
    spec = KernelSpec(
        "attend", "float16", 16, 8, group=2, page_size=page_size, window="window" in kind,
        page_lse="page_lse" in kind,
    )  # fmt: skip
    laid = lay_out(spec, Shape((page_size * 11, page_size * 9), (1, 1)))
    table = laid.given["page_table"]
    kept = table[:, :, 7:9].clone()
    table[:, :, 1:-3] = -1
    table[:, 0, 7], table[:, 1, 8] = kept[:, 0, 0], kept[:, 1, 1]
    laid.given["window"] = page_size * 5 + 3  # its first page is not there
    check_attend(laid, run(spec, **laid.given))


def fold(laid: Fold) -> Fold:
    run(laid.spec, **laid.given)
    return laid


@pytest.mark.parametrize("spec", FOLDS, ids=lambda spec: spec.name)
def test_groups_are_folded_as_by_the_reference(spec: KernelSpec) -> None:
    for ratio in (2, 21):  # less and more children than are read at a time
        position, lengths = (3, 200, 50), (20 * ratio, 9, 0)
        assert fold(lay_out_fold(spec, position, lengths, 4, ratio)).check() >= 2 * 5
    one = fold(lay_out_fold(spec, (7,), (1,), 8, 1, kv_heads=1))
    assert one.check() == 1


def test_more_groups_than_programs_that_share_them() -> None:
    assert fold(lay_out_fold(FOLDS[1], (0,), (200,), 1, 3, kv_heads=1)).check() == 66


def test_groups_that_lack_a_child_or_a_row_are_left_out() -> None:
    laid = lay_out_fold(FOLDS[1], (0,), (60,), 4, 3, kv_heads=1)
    laid.given["child_table"][0, 0, 7] = -1
    laid.given["page_table"][0, 0, 1] = -1
    laid.given["child_table"] = laid.given["child_table"][:, :, :14]  # the last group's last is 14
    fold(laid)
    written = laid.pools("index")[0].isfinite().all(1).nonzero().flatten().tolist()
    assert sorted(written) == sorted(laid.given["page_table"][0, 0, [0, 3]].tolist())


@by_dtype
def test_records_go_to_rows_of_their_own_table(dtype: torch.dtype) -> None:
    """They are those of append_index; without a row, or beyond the table, they are left out."""
    laid = Laid(Case(position=(20,), lengths=(0,), kv_heads=2, group=1, dtype=dtype, **D))
    fields = ("mean", "value_mean", "log_count")
    apart = KernelSpec(
        "append_index", dtype=dtype_name(dtype), fields=fields, record_table=True, **D
    )
    rows = torch.randperm(11).int()[:8].view(1, 2, 4)  # of five pages
    rows[0, 1, 2] = -1
    given = {
        "key": laid.keys[0][None], "value": laid.values[0][None], "page_table": laid.table,
        "record_table": rows, "position": torch.zeros(1, dtype=torch.int32),
        "lengths": laid.position,
    }  # fmt: skip

    def written(spec: KernelSpec, count: int) -> dict[str, Tensor]:
        pools = {
            name: torch.full((count, width), torch.nan, dtype=kind)
            for name, width, kind in zip(
                fields, (16, 8, 1), (dtype, dtype, torch.float32), strict=True
            )
        }
        exact = {name: torch.full_like(getattr(laid, name), torch.nan) for name in EXACT}
        run(spec, **given, **exact, **{f"index_{name}": pool for name, pool in pools.items()})
        assert all(
            torch.equal(exact[name].nan_to_num(7), getattr(laid, name).nan_to_num(7))
            for name in EXACT
        )
        return pools

    got = written(apart, 11)
    beside = written(dataclasses.replace(apart, record_table=False), len(laid.key_pages))
    for name, pool in got.items():
        wanted = torch.full_like(pool, torch.nan)
        for h, page in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
            if rows[0, h, page] >= 0:
                wanted[rows[0, h, page]] = beside[name][laid.table[0, h, page]]
        assert torch.equal(pool.nan_to_num(7), wanted.nan_to_num(7)), name
        assert pool.isfinite().any(1).sum() == 7


def among(
    laid: Laid, records: dict[str, Tensor], lists: Tensor, score: str, *numbers: int,
    page_size: int = 0, table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The choice, equal to the reference's; with `table` made from another table."""
    case, size = laid.case, page_size or laid.case.page_size
    spec = KernelSpec(
        "score_select", dtype=dtype_name(case.dtype), key_dim=case.key_dim, group=case.group,
        page_size=size, score=score, among=True,
    )  # fmt: skip
    names = ("sink_pages", "window_pages", "budget_pages")
    got: Tensor = run(
        spec, query=laid.query, **{f"index_{name}": r for name, r in records.items()},
        page_table=laid.table if table is None else table, candidates=lists,
        position=laid.position, lengths=laid.lengths, **dict(zip(names, numbers, strict=True)),
    )  # fmt: skip
    wanted = reference.score_select.among(
        laid.query, list(records.values()), list(records), laid.table, lists, laid.position,
        laid.lengths, score, size, *numbers,
    )  # fmt: skip
    assert got.dtype == torch.int32
    assert got.tolist() == wanted.tolist()
    return got


@by_dtype
@pytest.mark.parametrize(
    ("score", "group", "key_dim"),
    [("mean", 2, 8), ("mean-std", 5, 40), ("box", 3, 128), ("ball", 33, 264)],
)
def test_a_choice_among_candidates_is_the_references(
    dtype: torch.dtype, score: str, group: int, key_dim: int
) -> None:
    case = Case(
        position=(130, 21, 0), lengths=(2, 1, 0), kv_heads=1, group=group, page_size=4,
        dtype=dtype, key_dim=key_dim, value_dim=8,
    )  # fmt: skip
    laid = Laid(case)
    records = quantised(laid, score)
    punch_holes(laid, 5)
    among(laid, records, candidates(laid.table, 2, 33), score, 0, 2, 9)


@pytest.mark.parametrize("width", [0, 1, 300])
def test_lists_of_any_width(width: int) -> None:
    laid = Laid(Case(position=(1290,), lengths=(1,), kv_heads=1, group=2, **D))
    records = quantised(laid, "mean-std")
    got = among(laid, records, candidates(laid.table, 1, width), "mean-std", 2, 3, 40)
    assert int((got >= 0).sum()) == min(40, width)


def test_more_candidates_than_a_program_ranks_are_refused() -> None:
    laid = Laid(Case(position=(5,), lengths=(1,), kv_heads=1, group=1, **D))
    lists = torch.full((1, 1, 1, 4097), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match="4097 candidates a row; this kernel chooses among 4096"):
        among(laid, quantised(laid, "mean"), lists, "mean", 1, 1, 3)


def test_pages_of_a_quarter_million_tokens() -> None:
    size = 250_000
    laid = Laid(Case(position=(90,), lengths=(2,), kv_heads=1, group=2, **D))
    records = quantised(laid, "box")
    laid.case = dataclasses.replace(laid.case, position=(20 * size + 5,))
    got = among(laid, records, candidates(laid.table, 2, 20), "box", 1, 1, 6, page_size=size)
    assert int((got >= 0).sum()) == 2 * 6


@pytest.mark.parametrize("numbers", [(0, 0, 30), (9, 4, 8), (0, 60, 8), (3, 3, 0)], ids=str)
def test_no_record_is_read_where_scores_do_not_choose(numbers: tuple[int, ...]) -> None:
    """Everything fits, or the first and last pages fill the list, or there is no list."""
    laid = Laid(Case(position=(130,), lengths=(2,), kv_heads=1, group=2, **D))
    lists = torch.arange(2, 31).int().expand(1, 1, 2, -1).contiguous()
    nowhere = torch.where(laid.table >= 0, 10**8, -1).int()
    among(laid, quantised(laid, "mean"), lists, "mean", *numbers, table=nowhere)


def test_a_score_that_is_not_a_number_is_the_lowest() -> None:
    laid = Laid(Case(position=(39,), lengths=(1,), kv_heads=1, group=2, **D))
    laid.query = torch.ones_like(laid.query)
    lists = torch.arange(10).int().expand(1, 1, 1, -1).contiguous()
    mean = torch.full((len(laid.key_pages), 16), 0.5)
    mean[laid.table[0, 0, 3:5].long()] = torch.nan
    got = among(laid, {"mean": mean}, lists, "mean", 1, 1, 5)
    assert got.tolist() == [[[[0, 1, 2, 8, 9]]]]
