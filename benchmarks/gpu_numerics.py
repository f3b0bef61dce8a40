"""Every kernel against float64, by the rule of the tests, with nothing but torch at hand.

The truth is computed in float64 without pages; plain eager at the precision under test, which sets
what error is allowed, by the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codegen.spec import specialise
from ..models.memory.records import page_scores
from ..models.ops import operator
from . import gpu_state
from .gpu_cases import Case, Laid
from .gpu_truth import NEGATIVE_INFINITY, by_hand
from .memory_step import Load


def check(
    case: Case, dtype: torch.dtype, device: torch.device, load: Load | None
) -> dict[str, Any]:
    """Runs a case on the device; its error beside the allowed one.

    Returns:
        case, dtype, kernel, error and allowed (of the worst result), passed.
    """
    laid = Laid(case, dtype)
    checks = {
        "append_index": _append_index,
        "append_index.record_table": _append_index,
        "append_index.fold": _fold,
        "score_select": _score_select,
        "score_select.page_logits": _score_select,
        "score_select.among": _score_select,
        "attend.summaries": _summaries,
        "combine": _combine,
        **dict.fromkeys(("state_step", "state_chunk", "state_chunk.backward"), _state),
    }
    kernel, results = checks.get(case.op, _attend)(laid, device, load)
    worst = max(results, key=_badness)
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "kernel": kernel,
        "error": worst[0],
        "allowed": worst[1],
        "passed": all(error <= allowed for error, allowed in results),
    }


def _badness(pair: tuple[float, float]) -> float:
    error, allowed = pair
    if error <= allowed:
        return error / allowed if allowed else 0.0
    return math.inf if not allowed else error / allowed


def run(op: str, args: Sequence[Any], device: torch.device, load: Load | None) -> tuple[str, Any]:
    """The kernel of a call, or its reference, on the device: its name and its results."""
    moved: dict[tuple[int, Any], Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(move(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        # Values that are a part of their keys must be that on the device as well.
        storage = value.untyped_storage().data_ptr()
        base = moved.setdefault((storage, value.dtype), _whole(value).to(device))
        return base.as_strided(value.shape, value.stride(), value.storage_offset())

    given = move(list(args))
    family = getattr(torch.ops.memcompile, op.split(".")[0])
    overload = op.partition(".")[2] or "default"
    if load is None:
        return "reference", (getattr(family, overload)(*given), given)
    spec, arguments = specialise(op, given)
    return spec.name, (load([spec])[spec](*arguments), given)


def _whole(value: Tensor) -> Tensor:
    """All elements of a tensor's memory, in a row."""
    count = value.untyped_storage().nbytes() // value.element_size()
    return value.as_strided((count,), (1,), 0)


def error_and_allowed(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    logarithm: bool = False,
    reduction: int = 1,
) -> tuple[float, float]:
    """The error against float64, and twice eager's own plus the rounding of `reduction` terms.

    An entry that is not finite where the truth is, or the other way round, is an infinite error.
    """
    actual, eager = actual.cpu(), eager.cpu()
    finite = truth.isfinite()
    same = torch.where(finite, actual.isfinite(), actual.double() == truth)
    if not bool(same.all()):
        return math.inf, 0.0
    plain = torch.where(finite, truth, 0)
    error, own = (
        float((torch.where(finite, tensor.double(), 0) - plain).abs().max())
        for tensor in (actual, eager)
    )
    size = max(float(plain.abs().max()), float(logarithm))
    return error, 2 * own + torch.finfo(eager.dtype).eps * math.sqrt(reduction) * size


def _attend(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    case = laid.case
    keys, values = laid.pools
    bias, span, lists = None, 1, None
    if case.pages != "all":
        lists = laid.lists()
    if case.pages == "records":
        keys, values = (laid.index[name].unsqueeze(1) for name in ("mean", "value_mean"))
        bias, span = laid.index["log_count"], case.page_size
    exclude = case.pages in ("unlisted", "records")
    args = (laid.query, keys, values, bias, laid.table, lists, exclude, laid.position, laid.lengths)
    numbers = (laid.scale, case.softcap, case.window, span)
    kernel, (results, _) = run(case.op, (*args, *numbers), device, load)
    truth = by_hand(torch.float64, *args, *numbers)
    eager = by_hand(laid.dtype, *args, *numbers)
    found = [
        error_and_allowed(result, plain, exact, logarithm=name > 0)
        for name, (result, plain, exact) in enumerate(
            zip(results, eager[: len(results)], truth[: len(results)], strict=True)
        )
    ]
    return kernel, found


def _summaries(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    """Listed pages and the records of the others: two reads by hand, merged by hand."""
    case, lists = laid.case, laid.lists()
    mean, page_values, page_bias = (laid.index[n] for n in ("mean", "value_mean", "log_count"))
    at = (laid.position, laid.lengths, laid.scale, case.softcap)
    # What may not be read is NaN: records of pages that are not full, products of no use.
    columns = torch.arange(laid.table.shape[2])
    ends = (columns + 1) * case.page_size
    token = laid.position[:, None] + torch.arange(case.rows)  # [B, n]
    full = (ends <= token[..., None] + 1)[:, None] & (laid.table >= 0)[:, :, None]
    full = full & (torch.arange(case.rows) < laid.lengths[:, None])[:, None, :, None]
    used = full & (lists[..., None] != columns).all(3)  # [B, Hkv, n, pages]
    known = torch.zeros(len(mean), dtype=torch.bool)
    known[laid.table[full.any(2)].long()] = True
    page_values, page_bias = (
        pool.masked_fill(~known[:, None], torch.nan) for pool in (page_values, page_bias)
    )
    logits = _products(laid, torch.float64).float()
    logits.masked_fill_(~used.repeat_interleave(case.group, 1), torch.nan)
    args = (laid.query, *laid.pools, laid.table, lists, logits, page_values, page_bias, *at)
    kernel, (results, _) = run(case.op, args, device, load)

    def reference(dtype: torch.dtype) -> Any:
        def read(*pools: Any, exclude: bool, span: int) -> tuple[Tensor, ...]:
            given: tuple[Any, ...] = (laid.query, *pools, laid.table, lists, exclude, *at, 0, span)
            return by_hand(dtype, *given)[:2]

        records = (mean[:, None], page_values[:, None], page_bias)
        both = (
            read(*laid.pools, None, exclude=False, span=1),
            read(*records, exclude=True, span=case.page_size),
        )
        return torch.ops.memcompile.combine(*map(list, zip(*both, strict=True)))

    pairs = zip(results, reference(laid.dtype), reference(torch.float64), strict=True)
    return kernel, [
        error_and_allowed(result, plain, exact, logarithm=name > 0)
        for name, (result, plain, exact) in enumerate(pairs)
    ]


def _append_index(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    fields = list(laid.index)
    tables = [laid.table]
    if laid.case.op == "append_index.record_table":  # rows in the opposite order
        tables.append(torch.where(laid.table < 0, -1, len(laid.pools[0]) - 1 - laid.table))

    def args(dtype: torch.dtype) -> tuple[Any, ...]:
        """Copies, since the operation writes: in another element type, the records in it too."""
        keys = laid.pools[0].to(dtype, copy=True)
        shared = laid.case.shared
        values = keys[..., : laid.case.value_dim] if shared else laid.pools[1].to(dtype, copy=True)
        index = [
            torch.full_like(pool, torch.nan, dtype=dtype if dtype == torch.float64 else None)
            for pool in laid.index.values()
        ]
        new = [tensor.to(dtype) for tensor in laid.new]
        return (*new, *tables, laid.position, laid.lengths, keys, values, index, fields)

    kernel, (_, given) = run(laid.case.op, args(laid.dtype), device, load)
    exact, plain = args(torch.float64), args(laid.dtype)
    for each in (exact, plain):
        operator(laid.case.op)(*each)
    found = []
    for at in (-4, -3):  # pools: nothing is computed, so that nothing may differ
        same = torch.equal(given[at].cpu().nan_to_num(7.0), plain[at].nan_to_num(7.0))
        found.append((0.0 if same else math.inf, 0.0))
    return kernel, found + _written(given[-2], plain[-2], exact[-2])


def _written(
    mine: list[Tensor], eager: list[Tensor], exact: list[Tensor]
) -> list[tuple[float, float]]:
    """Errors of the records that were written; the others must be what they were, NaN."""
    found = []
    for actual, plain, truth in zip(mine, eager, exact, strict=True):
        written = truth.isfinite().all(-1)
        left = actual.cpu()[~written]
        found.append((0.0 if bool(left.isnan().all()) else math.inf, 0.0))
        found.append(error_and_allowed(actual.cpu()[written], plain[written], truth[written]))
    return found


def _fold(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    """Groups of three pages, as if one call had brought every token."""
    fields, ratio = list(laid.index), 3
    batch, heads, columns = laid.table.shape
    rows = torch.arange(batch * heads * columns, dtype=torch.int32).view_as(laid.table)
    at = (torch.zeros_like(laid.position), laid.position + laid.lengths)

    def args(dtype: torch.dtype | None) -> tuple[Any, ...]:
        children = [pool.to(dtype or pool.dtype) for pool in laid.index.values()]
        index = [torch.full_like(pool, torch.nan) for pool in children]
        return (children, laid.table, rows, *at, index, fields, laid.case.page_size, ratio)

    kernel, (_, given) = run(laid.case.op, args(None), device, load)
    exact, plain = args(torch.float64), args(None)
    for each in (exact, plain):
        operator(laid.case.op)(*each)
    return kernel, _written(given[5], plain[5], exact[5])


def _score_select(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    """The lists' form exactly; their choice by the scores that they leave out."""
    case, budget, sinks, window = laid.case, 5, 1, 1
    fields = list(laid.index)
    candidates = laid.lists(9) if case.op == "score_select.among" else None
    tables = (laid.table,) if candidates is None else (laid.table, candidates)
    args = (laid.query, list(laid.index.values()), fields, *tables, laid.position, laid.lengths)
    limits = (budget, budget, 0) if candidates is None else (budget,)
    whole = (case.score, case.page_size, sinks, window, *limits)
    kernel, (results, _) = run(case.op, (*args, *whole), device, load)
    lists, *products = results if isinstance(results, tuple) else (results,)
    lists = lists.cpu()
    # What is scored is in the type under test already; sums are float32's in every kernel.
    exact, plain = (_scores(laid, dtype) for dtype in (torch.float64, torch.float32))
    worst, allowed = 0.0, math.inf
    chosen_from = torch.zeros(*exact.shape[:3], laid.table.shape[2], dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, lists.shape[:3])).tolist():
        row = [page for page in lists[b, h, i].tolist() if page >= 0]
        at = (int(laid.position[b]) + i) // case.page_size
        live = i < int(laid.lengths[b])
        offered = range(at + 1) if candidates is None else candidates[b, h, i].tolist()
        assigned = [p for p in offered if live and 0 <= p <= at and int(laid.table[b, h, p]) >= 0]
        forced = {p for p in assigned if p < sinks or p >= at - window}
        if at >= budget:
            chosen_from[b, h, i, sorted(set(assigned) - forced)] = True
        filled = lists[b, h, i].tolist() == row + [-1] * (lists.shape[3] - len(row))
        if (
            sorted(set(row)) != row
            or not filled
            or not forced <= set(row) <= set(assigned)
            or len(row) != min(budget, len(assigned))
        ):
            return kernel, [(math.inf, 0.0)]
        chosen, left = sorted(set(row) - forced), sorted(set(assigned) - set(row))
        if not chosen or not left:
            continue
        truth, eager = exact[b, h, i], plain[b, h, i].double()
        size = float(truth[assigned].abs().max())
        own = float((truth - eager)[assigned].abs().max())
        worst = max(worst, float(truth[left].max() - truth[chosen].min()))
        # Two scores are compared, each with an error of its own.
        allowed = min(allowed, 2 * (2 * own + torch.finfo(torch.float32).eps * size))
    found = [(worst, allowed if allowed < math.inf else 0.0)]
    for result in products:
        seen = chosen_from.repeat_interleave(case.group, 1)
        plain, truth = (
            _products(laid, dtype).masked_fill(~seen, NEGATIVE_INFINITY)
            for dtype in (torch.float32, torch.float64)
        )
        found.append(error_and_allowed(result, plain, truth, reduction=case.key_dim))
    return kernel, found


def _products(laid: Laid, dtype: torch.dtype) -> Tensor:
    """[B, H, n, pages]: each query times each page's mean key."""
    mean = laid.index["mean"][laid.table.long().clamp_min(0)].to(dtype)
    rows = laid.query.to(dtype).unflatten(1, (laid.kv_heads, -1))  # [B, Hkv, G, n, Dk]
    products: Tensor = rows @ mean.transpose(-1, -2)[:, :, None]
    return products.flatten(1, 2)


def _scores(laid: Laid, dtype: torch.dtype) -> Tensor:
    """[B, Hkv, n, pages], computed in `dtype`."""
    table = laid.table.long().clamp_min(0)
    records = {name: pool[table].to(dtype) for name, pool in laid.index.items()}
    rows = laid.query.to(dtype).unflatten(1, (laid.kv_heads, -1)).transpose(2, 3)
    return page_scores(rows, records, laid.case.score)


def _combine(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    make = torch.Generator().manual_seed(laid.seed)
    shape = (2, 6, 3, laid.case.value_dim)
    outs = [torch.randn(shape, generator=make) for _ in range(laid.case.count)]
    lses = [4 * torch.randn(shape[:3], generator=make) for _ in outs]
    lses[0][0, 1] = NEGATIVE_INFINITY  # sees nothing in one read
    outs[0][0, 1] = 0
    for out, lse in zip(outs, lses, strict=True):  # nor in any
        out[1, 2], lse[1, 2] = 0, NEGATIVE_INFINITY
    kernel, (results, _) = run("combine", (outs, lses), device, load)

    def reference(dtype: torch.dtype) -> Any:
        return torch.ops.memcompile.combine(
            [out.to(dtype) for out in outs], [lse.to(dtype) for lse in lses]
        )

    pairs = zip(results, reference(torch.float32), reference(torch.float64), strict=True)
    return kernel, [
        error_and_allowed(result, plain, exact, logarithm=name > 0)
        for name, (result, plain, exact) in enumerate(pairs)
    ]


def _state(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    case = laid.case
    kernel, found = gpu_state.results(
        case, laid.dtype, lambda op, args: run(op, args, device, load)
    )
    width = case.rows * max(case.key_dim, case.value_dim)
    # An lse is the second of what forward kernels return.
    forward = not case.op.endswith(".backward")
    return kernel, [
        error_and_allowed(*three, logarithm=forward and at == 1, reduction=width)
        for at, three in enumerate(found)
    ]
