"""Every kernel against float64, by the rule of the tests, with nothing but torch at hand.

A case lays out a paged memory by hand: ragged sequences, pages in random order, a hole, NaN in
every slot that was never written. The truth is computed in float64 without pages; plain eager at
the precision under test, which sets what error is allowed, by the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codegen.spec import specialise
from ..models import ops as _registered  # noqa: F401 (registers the operations used below)
from ..models.memory.parts import field_width
from ..models.memory.records import page_scores
from .memory_step import Load

NEGATIVE_INFINITY = float("-inf")
SCOUT_FIELDS = ("mean", "std", "value_mean", "log_count")


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        op: "append_index", "score_select", "attend", "attend.page_lse" or "combine".
        rows: new tokens n of the longest sequence.
        shared: values are the first `value_dim` elements of their keys.
        pages: attend reads "all", "listed" or "unlisted" pages, or "records": those of the pages
            that are not listed.
        score: of score_select; append_index writes the fields of it.
    """

    op: str
    key_dim: int = 128
    value_dim: int = 128
    group: int = 4
    page_size: int = 64
    rows: int = 1
    shared: bool = False
    pages: str = "all"
    softcap: float = 0.0
    window: int = 0
    score: str = "mean-std"
    count: int = 2

    @property
    def name(self) -> str:
        if self.op == "combine":
            return f"combine ×{self.count}"
        said = [self.op, f"{self.key_dim}/{self.value_dim}", f"page {self.page_size}"]
        said += [f"group {self.group}"] if self.op != "append_index" else []
        said += [f"n {self.rows}"]
        said += [self.pages] if self.op.startswith("attend") else []
        said += [self.score] if self.op == "score_select" else []
        said += [
            name for name in ("shared", "softcap", "window") if getattr(self, name) and name != ""
        ]
        return " ".join(said)


# What a scout step of a common model needs stands first: it is tested even where time is short.
CASES = (
    Case("append_index"),
    Case("score_select"),
    Case("attend"),
    Case("attend", pages="listed"),
    Case("attend", pages="records"),
    Case("combine"),
    Case("attend", rows=17),
    Case("append_index", rows=70),
    Case("attend", key_dim=576, value_dim=512, group=16, shared=True),
    Case("attend", pages="unlisted"),
    Case("attend", key_dim=64, value_dim=64, group=8, page_size=16, softcap=30.0, window=96),
    Case("attend", pages="listed", rows=3),
    Case("score_select", rows=3),
    Case("score_select", key_dim=64, group=3, page_size=16, score="box"),
    Case("attend", key_dim=256, value_dim=256, group=2, page_size=32),
    Case("attend", key_dim=96, value_dim=32, group=3, page_size=16, rows=5),
    Case("attend.page_lse", pages="listed"),
    Case("append_index", key_dim=576, value_dim=512, shared=True),
    Case("attend", key_dim=576, value_dim=512, group=16, shared=True, pages="listed"),
    Case("score_select", key_dim=64, group=1, page_size=16, score="mean"),
    Case("score_select", group=8, score="ball"),
    Case("attend", key_dim=32, value_dim=32, group=1, page_size=128, window=100, rows=4),
    Case("combine", count=3),
)
TINY = (
    Case("append_index", key_dim=8, value_dim=8, page_size=16, rows=3),
    Case("score_select", key_dim=8, page_size=16, group=3),
    Case("attend", key_dim=16, value_dim=8, page_size=16, group=3, rows=2),
    Case("attend", key_dim=16, value_dim=8, page_size=16, pages="listed"),
    Case("attend", key_dim=16, value_dim=8, page_size=16, pages="records"),
    Case("attend", key_dim=16, value_dim=8, page_size=16, group=2, shared=True, softcap=5.0),
    Case("attend.page_lse", key_dim=16, value_dim=8, page_size=16, pages="listed"),
    Case("combine", value_dim=8),
)


@dataclass
class Laid:
    """A case's memory on the CPU, in the element type under test."""

    case: Case
    dtype: torch.dtype
    seed: int = 0
    kv_heads: int = 2
    query: Tensor = field(init=False)
    new: tuple[Tensor, Tensor] = field(init=False)
    pools: tuple[Tensor, Tensor] = field(init=False)
    index: dict[str, Tensor] = field(init=False)
    table: Tensor = field(init=False)
    position: Tensor = field(init=False)
    lengths: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case, size = self.case, self.case.page_size
        make = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make).to(self.dtype)

        held = [11 * size + size // 2, 7 * size - 1, 1]
        rows = [case.rows, max(1, case.rows - 1), case.rows]
        self.position = torch.tensor(held, dtype=torch.int32)
        self.lengths = torch.tensor(rows, dtype=torch.int32)
        end = [h + n for h, n in zip(held, rows, strict=True)]
        columns = -(-max(end) // size) + 1
        batch, heads = len(held), self.kv_heads
        self.query = normal(batch, heads * case.group, case.rows, case.key_dim)
        count = batch * heads * columns
        order = torch.randperm(count, generator=make).int().view(batch, heads, columns)
        page = torch.arange(columns)
        used = page < -(-torch.tensor(end) // size)[:, None]
        self.table = torch.where(used[:, None], order, -1)
        keys = torch.full((count, size, case.key_dim), torch.nan, dtype=self.dtype)
        values = torch.full((count, size, case.value_dim), torch.nan, dtype=self.dtype)
        written = torch.tensor(held if case.op == "append_index" else end)
        for b in range(batch):
            token = torch.arange(int(written[b]))
            for h in range(heads):
                at = self.table[b, h, token // size].long(), token % size
                keys[at] = normal(len(token), case.key_dim)
                values[at] = normal(len(token), case.value_dim)
        if not case.op.startswith("append"):
            self.table[0, 1, 2] = -1  # a hole
        if case.shared:
            values = keys[..., : case.value_dim]
        self.pools = (keys, values)
        new = normal(batch, heads, case.rows, case.key_dim)
        value = new if case.shared else normal(batch, heads, case.rows, case.key_dim)
        self.new = (new, value[..., : case.value_dim])
        names = {"box": ("min", "max"), "ball": ("mean", "radius"), "mean": ("mean",)}
        fields = names.get(case.score, SCOUT_FIELDS)
        self.index = {}
        for name in fields:
            width = field_width(name, case.key_dim, case.value_dim)
            wide = torch.float32 if name == "log_count" else self.dtype
            drawn = torch.randn(count, width, generator=make)
            self.index[name] = (drawn.abs() if name in ("std", "radius", "max") else drawn).to(wide)
        if "min" in self.index:
            self.index["min"] = -self.index["min"].abs()

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.case.key_dim)

    def lists(self, width: int = 5) -> Tensor:
        """Distinct pages a row, some of them none, int32 [B, Hkv, n, width]."""
        make = torch.Generator().manual_seed(self.seed + 1)
        columns = self.table.shape[2]
        shape = (*self.table.shape[:2], self.case.rows, columns)
        lists = torch.rand(shape, generator=make).argsort(-1)[..., :width].sort(-1).values.int()
        lists[..., width // 2] = -1
        return lists


def check(
    case: Case, dtype: torch.dtype, device: torch.device, load: Load | None
) -> dict[str, Any]:
    """Runs a case on the device; its error beside the allowed one.

    Returns:
        case, dtype, kernel, error and allowed (of the worst result), passed.
    """
    laid = Laid(case, dtype)
    checks = {"append_index": _append_index, "score_select": _score_select, "combine": _combine}
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
    actual: Tensor, eager: Tensor, truth: Tensor, *, logarithm: bool = False
) -> tuple[float, float]:
    """The error against float64, and twice eager's own plus a rounding band.

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
    return error, 2 * own + torch.finfo(eager.dtype).eps * size


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


def by_hand(
    dtype: torch.dtype,
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    bias: Tensor | None,
    table: Tensor,
    pages: Tensor | None,
    exclude: bool,
    position: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    window: int,
    span: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and page_lse of attend, a row and a KV head at a time, computed in `dtype`."""
    batch, kv_heads, columns = table.shape
    heads, n = query.shape[1:3]
    group, slots = heads // kv_heads, key_pages.shape[1]
    listed = pages is not None and not exclude
    width = pages.shape[3] if pages is not None and listed else columns
    out = torch.zeros(batch, heads, n, value_pages.shape[2], dtype=dtype)
    lse = torch.full((batch, heads, n), NEGATIVE_INFINITY, dtype=dtype)
    page_lse = torch.full((batch, heads, n, width), NEGATIVE_INFINITY, dtype=dtype)
    page = torch.arange(columns)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, kv_heads, n))).tolist():
        if i >= int(lengths[b]):
            continue
        open_to = table[b, h] >= 0
        if pages is not None:
            open_to = open_to & (torch.isin(page, pages[b, h, i]) != exclude)
        last = (torch.arange(columns * slots) + 1) * span - 1
        age = int(position[b]) + i - last
        seen = (age >= 0) & open_to.repeat_interleave(slots)
        if window:
            seen &= age < window
        found = seen.nonzero().squeeze(1)
        if not len(found):
            continue
        at = table[b, h, found // slots].long(), found % slots
        mine = slice(h * group, (h + 1) * group)
        logits = (query[b, mine, i].to(dtype) @ key_pages[at].to(dtype).T) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[at].to(dtype)
        out[b, mine, i] = logits.softmax(-1) @ value_pages[at].to(dtype)
        lse[b, mine, i] = logits.logsumexp(-1)
        columns_of = page if pages is None or exclude else pages[b, h, i]
        for column, wanted in enumerate(columns_of.tolist()):
            part = logits[:, found // slots == wanted]
            if wanted >= 0 and part.shape[1]:
                page_lse[b, mine, i, column] = part.logsumexp(-1)
    return out, lse, page_lse


def _append_index(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    fields = list(laid.index)

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
        return (*new, laid.table, laid.position, laid.lengths, keys, values, index, fields)

    kernel, (_, given) = run("append_index", args(laid.dtype), device, load)
    exact, plain = args(torch.float64), args(laid.dtype)
    for each in (exact, plain):
        torch.ops.memcompile.append_index(*each)
    found = []
    for at in (5, 6):  # pools: nothing is computed, so that nothing may differ
        same = torch.equal(given[at].cpu().nan_to_num(7.0), plain[at].nan_to_num(7.0))
        found.append((0.0 if same else math.inf, 0.0))
    for actual, eager, truth in zip(given[7], plain[7], exact[7], strict=True):
        written = truth.isfinite().all(-1)
        found.append(error_and_allowed(actual.cpu()[written], eager[written], truth[written]))
    return kernel, found


def _score_select(
    laid: Laid, device: torch.device, load: Load | None
) -> tuple[str, list[tuple[float, float]]]:
    """The lists' form exactly; their choice by the scores that they leave out."""
    case, budget, sinks, window = laid.case, 5, 1, 1
    fields = list(laid.index)
    args = (laid.query, list(laid.index.values()), fields, laid.table, laid.position, laid.lengths)
    whole = (case.score, case.page_size, sinks, window, budget, budget, 0)
    kernel, (lists, _) = run("score_select", (*args, *whole), device, load)
    lists = lists.cpu()
    # What is scored is in the type under test already; sums are float32's in every kernel.
    exact, plain = (_scores(laid, dtype) for dtype in (torch.float64, torch.float32))
    worst, allowed = 0.0, math.inf
    for b, h, i in torch.cartesian_prod(*map(torch.arange, lists.shape[:3])).tolist():
        row = [page for page in lists[b, h, i].tolist() if page >= 0]
        at = (int(laid.position[b]) + i) // case.page_size
        live = i < int(laid.lengths[b])
        assigned = [p for p in range(at + 1) if live and int(laid.table[b, h, p]) >= 0]
        forced = {p for p in assigned if p < sinks or p >= at - window}
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
    return kernel, [(worst, allowed if allowed < math.inf else 0.0)]


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
