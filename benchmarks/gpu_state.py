"""Recurrent states in the GPU command: ragged rows, padded with NaN, to check; full ones, timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..codegen.spec import specialise
from ..models import ops
from .gpu_cases import Case
from .gpu_decode import Captured, Place, microseconds, states_needed
from .rules import Contender

# Runs an operation with its arguments: the kernel's name, its results, the arguments it had.
Call = Callable[[str, list[Any]], tuple[str, tuple[tuple[Tensor, ...], list[Any]]]]
RULES = ("normalised", "delta")  # that are timed, gated


def arguments(case: Case, dtype: torch.dtype, live_rows: list[int], kv_heads: int = 2) -> list[Any]:
    """Those of the case's operation, on the CPU, in its element type; live rows by sequence."""
    make = torch.Generator().manual_seed(0)
    n, group = case.rows, case.group
    lengths = torch.tensor(live_rows, dtype=torch.int32)
    each = (len(lengths), kv_heads, n)
    live = torch.arange(n) < lengths[:, None]  # [B, n]

    def normal(heads: int, *width: int) -> Tensor:
        drawn = torch.randn((len(lengths), n, heads, *width), generator=make).transpose(1, 2)
        alive = live[:, None].expand(-1, heads, -1)
        return drawn.masked_fill(~alive.view(*alive.shape, *(1 for _ in width)), torch.nan)

    query, key = normal(kv_heads * group, case.key_dim), normal(kv_heads, case.key_dim)
    if case.rule == "normalised":
        query, key = query.softmax(3), key.softmax(3)
    elif case.rule == "delta":
        key = torch.nn.functional.normalize(key, dim=3)
    rows = [x.to(dtype) for x in (query, key, normal(kv_heads, case.value_dim))]
    share = torch.rand(each, generator=make).masked_fill(~live[:, None], torch.nan)
    decays = {"": None, "constant": -0.1 * torch.rand(kv_heads, generator=make)}
    decay = -0.3 * share if case.decay == "gate" else decays[case.decay]
    given = [*rows, decay, 1 - share if case.rule == "delta" else None, lengths]
    divided = case.rule == "normalised"
    if case.op.endswith(".backward"):
        of_den = normal(kv_heads * group) if divided else None
        return [*given, normal(kv_heads * group, case.value_dim), of_den]
    held = (*each[:2], case.key_dim)
    state = torch.randn((*held, case.value_dim), generator=make)
    return [*given, state, torch.rand(held, generator=make) if divided else None]


def results(
    case: Case, dtype: torch.dtype, call: Call
) -> tuple[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """The kernel's name; and of each thing it returns or leaves: its own, eager's, the truth.

    The truth takes rows one after the other, in float64.
    """
    given = arguments(case, dtype, [case.rows, max(1, case.rows - 3), case.rows // 2])

    def reference(op: str, wide: bool) -> tuple[Tensor, ...]:
        copied = [x.clone() if isinstance(x, Tensor) else x for x in given]
        if wide:
            copied = [
                x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in copied
            ]
        found = ops.operator(op)(*copied)
        return (*found, *left(op, copied))

    def left(op: str, args: list[Any]) -> list[Tensor]:
        return [] if op.endswith(".backward") else [x for x in args[6:] if x is not None]

    eager = reference(case.op, False)
    truth = reference("state_step" if case.op == "state_chunk" else case.op, True)
    kernel, (found, args) = call(case.op, given)
    triples = zip((*found, *left(case.op, args)), eager, truth, strict=True)
    return kernel, [
        (mine, plain.to(dtype), exact) for mine, plain, exact in triples if mine.numel()
    ]


def timed(
    where: Place, batches: tuple[int, ...], chunks: tuple[int, ...], rounds: int, ceiling: float
) -> list[dict[str, Any]]:
    """Steps of one row in each batch, and chunks of those many rows, beside what bounds them."""
    calls = [("state_step", batch, 1) for batch in batches]
    calls += [("state_chunk", 1, rows) for rows in chunks]
    done = []
    for rule, (op, batch, rows) in itertools.product(RULES, calls):
        heads, kv_heads, dim = where.heads
        group = heads // kv_heads
        case = Case(op, 2 * dim, dim, group, rows=rows, decay="gate", rule=rule)
        plain = contender(where, case, batch, kv_heads)
        took = microseconds([Captured(plain, where.device)], rounds)[case.name]
        share = 1e6 * plain.floor / took / ceiling
        told = {"case": case.name, "batch": batch, "floor_bytes": plain.floor}
        done.append({**told, "us": took, "bandwidth_share": share})
    return done


def contender(where: Place, case: Case, batch: int, kv_heads: int) -> Contender:
    """Calls of a case's operation, rotating over copies of its state.

    The bytes it cannot but move are, for a step, its state's, read and written; for a chunk its
    rows' and results'.
    """
    drawn = arguments(case, where.dtypes[0], [case.rows] * batch, kv_heads)
    given = [x.to(where.device) if isinstance(x, Tensor) else x for x in drawn]
    if case.op == "state_step":
        floor = 2 * given[6].nbytes
    else:
        floor = sum(x.nbytes for x in given[:3]) + 4 * given[0][..., 0].numel() * case.value_dim
    copies = [
        [*given[:6], *(None if x is None else x.clone() for x in given[6:])]
        for _ in range(states_needed(floor, where.cache))
    ]
    kernel, calls = ops.operator(case.op), copies
    if where.load is not None:
        spec = specialise(case.op, given)[0]
        kernel = where.load([spec])[spec]
        calls = [list(specialise(case.op, copy)[1]) for copy in copies]
    return Contender(case.name, lambda at: kernel(*calls[at]), len(calls), floor)
