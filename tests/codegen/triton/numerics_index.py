"""What generated Triton kernels write into an index and choose by it, against the references.

`test_numerics.py` runs this file in a process of its own: on a GPU where there is one, otherwise
through Triton's interpreter, which has to be chosen before the first kernel is made.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor
from triton_case import DEVICE, Case, Laid, by_dtype, dtype_name, long, punch_holes, quantised, run

import memcompile.models.ops  # noqa: F401 (registers the references)
from memcompile.codegen.spec import KernelSpec
from memcompile.models.memory.parts import INDEX_FIELDS, SCORE_FIELDS, field_width

reference = torch.ops.memcompile


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


def select(
    laid: Laid, records: dict[str, Tensor], score: str, *limits: int, products: bool = False
) -> Tensor:
    """Runs score_select, with the products of queries and mean keys on demand; gives the lists."""
    case = laid.case
    spec = KernelSpec(
        "score_select", dtype=dtype_name(case.dtype), key_dim=case.key_dim, group=case.group,
        page_size=case.page_size, score=score, page_logits=products,
    )  # fmt: skip
    names = ("sink_pages", "window_pages", "capacity", "budget_pages", "dense_below")
    given = dict(zip(names, limits, strict=True))
    got = run(
        spec, query=laid.query, **{f"index_{name}": r for name, r in records.items()},
        page_table=laid.table, position=laid.position, lengths=laid.lengths, **given,
    )  # fmt: skip
    wanted = reference_selection(laid, records, score, *limits)
    lists, *kept = got if products else (got,)
    assert lists.dtype == torch.int32
    assert lists.tolist() == wanted[0].tolist()
    for logits in kept:  # whole numbers: nothing is rounded
        assert logits.dtype == torch.float32
        assert torch.equal(logits, wanted[1])
    return lists


def reference_selection(
    laid: Laid, records: dict[str, Tensor], score: str, *limits: int
) -> tuple[Tensor, ...]:
    """Lists and products; where there is no mean, lists alone."""
    op = reference.score_select.page_logits if "mean" in records else reference.score_select
    wanted = op(
        laid.query, list(records.values()), list(records), laid.table, laid.position,
        laid.lengths, score, laid.case.page_size, *limits,
    )  # fmt: skip
    return wanted if isinstance(wanted, tuple) else (wanted,)


@by_dtype
@pytest.mark.parametrize("score", [*SCORE_FIELDS])
@pytest.mark.parametrize(
    ("group", "key_dim"), [(2, 8), (3, 40), (5, 128), long(70, 264, id="wide")]
)
def test_selection_is_the_references(
    dtype: torch.dtype, score: str, group: int, key_dim: int
) -> None:
    case = Case(
        position=(130, 21), lengths=(2, 1), kv_heads=1, group=group, page_size=4, dtype=dtype,
        key_dim=key_dim, value_dim=8,
    )  # fmt: skip
    laid = Laid(case)
    records = quantised(laid, score, mean=True)
    select(laid, records, score, 1, 1, 10, 8, 0, products=True)
    punch_holes(laid, 5)
    scored = {name: records[name] for name in SCORE_FIELDS[score]}
    select(laid, scored, score, 0, 2, 9, 9, 22)


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
    select(laid, records, "mean-std", 2, 3, 140, 130, 0, products=True)


@pytest.mark.parametrize("score", [s if s == "mean-std" else long(s) for s in SCORE_FIELDS])
def test_products_of_chunks_with_padding_and_holes(score: str) -> None:
    """Rows that are padding, that read everything, and that choose, beside each other."""
    case = Case(
        position=(30, 0, 66), lengths=(7, 0, 2), kv_heads=2, group=3, page_size=4, key_dim=16,
        value_dim=8, spare_columns=30,
    )  # fmt: skip
    laid = Laid(case)
    records = quantised(laid, score, mean=True)
    punch_holes(laid, 5)
    select(laid, records, score, 1, 1, 9, 5, 34, products=True)


@pytest.mark.parametrize("products", [False, True], ids=["lists", "products"])
def test_selection_in_two_launches(monkeypatch: pytest.MonkeyPatch, products: bool) -> None:
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
    records = quantised(laid, "box", mean=products)
    spec = KernelSpec(
        "score_select", key_dim=16, group=2, page_size=4, score="box", page_logits=products
    )
    target = emit.device_target()
    chosen = emit.launches(spec, target)
    chosen["choose"] = dataclasses.replace(chosen["choose"], constants={"BLOCK_R": 64})
    monkeypatch.setattr(emit, "launches", lambda *_: chosen)
    made = imported(emit.path(spec, target))
    monkeypatch.setattr(made, "known_at_most", lambda *_: False)
    tensors = [laid.query, *records.values(), laid.table, laid.position, laid.lengths]
    limits = (1, 1, 40, 30, 0)
    got = made.score_select(*(tensor.to(DEVICE) for tensor in tensors), *limits)
    wanted = reference_selection(laid, records, "box", *limits)
    for part, expected in zip(got if products else (got,), wanted, strict=True):
        assert torch.equal(part.cpu(), expected)


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
