"""Plug-ins' kernels against what their nodes mean, `models/contiguous/`: run by
test_numerics.py under Triton's interpreter, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import assert_close_to_float64
from torch import Tensor
from triton_case import DEVICE

from memcompile.codegen.triton.load import imported
from memcompile.codegen.triton.plugin import extras_of, known_sizes, plugin_launches, wrapped
from memcompile.codegen.triton.sizes import evaluate
from memcompile.compiler.export.plugins import Call, plugin_of
from memcompile.models import portable

TARGET = "cuda:sm_90"
HEADS, GROUP, DIM, SIZE, COLUMNS = 2, 3, 16, 4, 9


def tensors(batch: int, rows: int, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    position = torch.tensor([17, 5, 30][:batch], dtype=torch.int32)
    lengths = torch.tensor([rows, max(0, rows - 1), 0][:batch], dtype=torch.int32)
    wanted = torch.rand(batch, HEADS, rows, COLUMNS).argsort(-1)[..., :5].sort(-1).values
    wanted[..., -1] = -1
    own = (position[:, None] + torch.arange(rows)) // SIZE
    full = (torch.arange(COLUMNS) < own[..., None])[:, None]  # [B, 1, rows, COLUMNS]
    page_logits = torch.randn(batch, HEADS * GROUP, rows, COLUMNS)
    return {
        "query": torch.randn(batch, HEADS * GROUP, rows, DIM),
        "keys": torch.randn(batch, HEADS, COLUMNS * SIZE, DIM),
        "values": torch.randn(batch, HEADS, COLUMNS * SIZE, DIM),
        "pages": wanted,
        "page_logits": page_logits.where(full, float("-inf")),
        "value_mean": torch.randn(batch, HEADS, COLUMNS, DIM),
        "log_count": torch.rand(batch, HEADS, COLUMNS, 1),
        "index_0": torch.randn(batch, HEADS, COLUMNS, DIM),
        "index_1": torch.rand(batch, HEADS, COLUMNS, DIM),
        "candidates": torch.arange(COLUMNS)[:7].expand(batch, HEADS, rows, 7).contiguous(),
        "position": position,
        "lengths": lengths,
        **{f"outs_{i}": torch.randn(batch, HEADS, rows, DIM) for i in range(2)},
        **{f"lses_{i}": torch.randn(batch, HEADS, rows) for i in range(2)},
    }


READ = {"scale": 0.3, "softcap": 0.0, "window": 0, "size": SIZE, "slots": SIZE, "pinned": -1}
INDEX = {"fields": ["mean", "std"], "score": "mean-std", "size": SIZE, "sink_pages": 1}
CHOICE = {**INDEX, "window_pages": 1, "capacity": 5, "budget_pages": 4, "dense_below": 0}
AMONG = {**INDEX, "window_pages": 1, "budget_pages": 4, "pinned": -1}
AT = ("position", "lengths")
READS = ("attend", "attend.summaries")
CASES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "all": ("MemcAttend", "attend", ("query", "keys", "values", *AT), {**READ, "exclude": False}),
    "window": (
        "MemcAttend",
        "attend",
        ("query", "keys", "values", *AT),
        {**READ, "exclude": False, "window": 6, "softcap": 2.0},
    ),
    "listed": (
        "MemcAttend",
        "attend",
        ("query", "keys", "values", "pages", *AT),
        {**READ, "exclude": False},
    ),
    "unlisted": (
        "MemcAttend",
        "attend",
        ("query", "keys", "values", "pages", *AT),
        {**READ, "exclude": True},
    ),
    "summaries": (
        "MemcSummaries",
        "attend.summaries",
        (*("query", "keys", "values", "pages", "page_logits", "value_mean", "log_count"), *AT),
        {"scale": 0.3, "softcap": 0.0, "size": SIZE},
    ),
    "select": ("MemcScoreSelect", "score_select", ("query", "index_0", "index_1", *AT), CHOICE),
    "logits": (
        "MemcScoreSelectLogits",
        "score_select.page_logits",
        ("query", "index_0", "index_1", *AT),
        CHOICE,
    ),
    "among": (
        "MemcScoreSelectAmong",
        "score_select.among",
        ("query", "index_0", "index_1", "candidates", *AT),
        AMONG,
    ),
    "combine": ("MemcCombine", "combine", ("outs_0", "outs_1", "lses_0", "lses_1"), {}),
}


def meant(operation: str, given: dict[str, Tensor], static: dict[str, Any]) -> list[Tensor]:
    """What the node means, of the same inputs."""
    operator = portable.operator(operation)
    arguments = []
    for argument in operator._schema.arguments:
        if str(argument.type) == "List[Tensor]":
            listed = [x for name, x in given.items() if name.startswith(f"{argument.name}_")]
            arguments.append(listed)
        else:
            arguments.append(static.get(argument.name, given.get(argument.name)))
    made = operator(*arguments)
    return [made] if isinstance(made, Tensor) else [*made]


@pytest.mark.parametrize(("case", "rows"), [*((case, 5) for case in CASES), ("all", 1)])
def test_a_plugin_computes_what_its_node_means(case: str, rows: int) -> None:
    kind, operation, names, static = CASES[case]
    given = {name: tensors(3, rows)[name] for name in names}
    symbols = {0: "batch", 2: "n"}

    def shape(name: str) -> tuple[int | str, ...]:
        axes: list[int | str] = [*given[name].shape]
        state = name in ("keys", "values", "value_mean", "log_count") or name.startswith("index")
        for axis, symbol in symbols.items():
            if axis < len(axes):
                axes[axis] = "units" if state and axis == 2 else symbol
        return tuple(axes)

    told = {name: (x.dtype, shape(name)) for name, x in given.items()}
    plugin, sizes = plugin_of(Call("memc", kind, told, static), max_context=COLUMNS * SIZE)
    assert sizes["rows"].axis == 2
    expected = meant(operation, given, static)
    known = known_sizes(plugin)
    values = {n: given[s.input].shape[s.axis] // s.divisor for n, s in sizes.items()}
    whole = {**values, **plugin.known, **{k: v for k, v in known.items() if isinstance(v, int)}}
    for _, launched in plugin_launches(plugin, TARGET):
        extras = extras_of(launched, known)
        made = imported(wrapped(plugin, TARGET, launched, extras, known))
        outs = [
            torch.full(x.shape, -7, dtype=o.dtype)
            if o.dtype == torch.int64
            else torch.full(x.shape, float("nan"))
            for x, o in zip(expected, plugin.outputs, strict=True)
        ]
        grid = tuple(evaluate(extent, whole) for extent in launched.grid)
        on = [x.to(DEVICE) for x in (*given.values(), *outs)]
        numbers = [whole[name] for name in extras]
        inputs, results = on[: len(given)], on[len(given) :]
        getattr(made, plugin.name)[grid](*inputs, *numbers, *results)
        exact = meant(operation, {k: wide(x) for k, x in given.items()}, static)
        for result, right, truth in zip(results, expected, exact, strict=True):
            told = promised(operation, given, expected, right.dim())
            if result.dtype == torch.int64:
                assert torch.equal(*(rows_of(x.cpu(), told) for x in (result, right)))
            else:
                assert_close_to_float64(*(rows_of(x.cpu(), told) for x in (result, right, truth)))


def promised(
    operation: str, given: dict[str, Tensor], expected: list[Tensor], rank: int
) -> Tensor | None:
    """Which rows [B, heads, rows] a node says anything of: none of padding, and no out of those
    that see nothing. None: all."""
    if "lengths" not in given:
        return None
    batch, heads, rows = expected[0].shape[:3]
    valid = torch.arange(rows) < given["lengths"][:, None]
    assert bool(valid.any()) and not bool(valid.all())
    told = valid[:, None].expand(batch, heads, rows)
    return told & (expected[1] > float("-inf")) if operation in READS and rank == 4 else told


def rows_of(x: Tensor, told: Tensor | None) -> Tensor:
    if told is None:
        return x
    return x[told if x.shape[1] == told.shape[1] else told[:, :1].expand(x.shape[:3])]


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
