"""One token through 16-bit linear layers: the generated kernel against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bandwidth, buffers
from .registry import Column, Outcome, Settings, figure
from .rules import CACHES, Bar, Contender, measure, states_for

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
LEAST_SHARE = 0.6


@dataclass(frozen=True)
class Case:
    """Linear layers that one token passes one after the other.

    Attributes:
        shapes: (out, in) of each.
        held: whether the issue's bar holds for it.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    held: bool = True

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(out * width for out, width in self.shapes) * self.dtype.itemsize


def layer(hidden: int, inner: int, kv: int) -> tuple[tuple[int, int], ...]:
    """q, k, v, o, gate, up, down of a Llama layer."""
    attention = ((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden))
    return (*attention, (inner, hidden), (inner, hidden), (hidden, inner))


CASES = (
    Case("layer, hidden 1024", layer(1024, 2816, 256)),
    Case("head 32000 × 1024", ((32000, 1024),)),
    Case("layer, hidden 4096", layer(4096, 14336, 1024)),
    Case("1024 × 1024", ((1024, 1024),), held=False),
    Case("layer, hidden 1024, float16", layer(1024, 2816, 256), torch.float16, held=False),
)
QUICK = (Case("64 × 64", ((64, 64),)),)


def contender(name: str, linear: Linear, case: Case, kind: str, cache: int) -> Contender:
    """`linear` on weights of its own in memory pages of that kind."""
    # Weights are small enough to go as far past the cache as the probes of bandwidth do.
    states = states_for(case.size, cache * bandwidth.FAR // CACHES)
    weights = [
        [buffers.empty(shape, case.dtype, kind).normal_(0, 0.02) for shape in case.shapes]
        for _ in range(states)
    ]
    inputs = {width: torch.randn(1, 1, width).to(case.dtype) for _, width in case.shapes}

    def call(state: int) -> None:
        for weight in weights[state]:
            linear(inputs[weight.shape[1]], weight, None)

    return Contender(f"{name} {kind}", call, states, case.size)


def run(settings: Settings) -> Outcome:
    ours: Linear = F.linear
    if settings.kernels == "generated":
        from .. import codegen

        ours = codegen.load_linear()
    cases = QUICK if settings.quick else CASES
    probes = bandwidth.probes(settings.cache)
    rows = [measured(case, ours, settings, probes) for case in cases]
    return Outcome(rows, COLUMNS, bars(rows))


def measured(
    case: Case, ours: Linear, settings: Settings, probes: list[Contender]
) -> dict[str, Any]:
    """The row of one case: both kernels in both kinds of memory pages."""
    contenders = [
        contender(name, linear, case, kind, settings.cache)
        for kind in buffers.KINDS
        for name, linear in (("memcompile", ours), ("torch", F.linear))
    ]
    timings = measure([*contenders, *probes], settings.rounds)
    speed = bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes})
    row: dict[str, Any] = {
        "case": case.name,
        "held": case.held,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": case.size,
        "states": contenders[0].states,
        "bandwidth": {kind: figure(value / 1e9) for kind, value in speed.items()},
        "timings": {name: timing.to_json() for name, timing in timings.items()},
    }
    for kind in buffers.KINDS:
        mine, theirs = (timings[f"{name} {kind}"].median for name in ("memcompile", "torch"))
        row[kind] = {
            "ms": 1e3 * mine,
            "torch_ms": 1e3 * theirs,
            "times_torch": theirs / mine,
            "bandwidth_share": case.size / mine / speed[kind],
            "torch_share": case.size / theirs / speed[kind],
        }
    return row


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """The part of the read bandwidth that is asked for, in the same kind of memory pages."""
    return [
        Bar(
            f"{row['case']}, part of bandwidth, {kind} pages",
            row[kind]["bandwidth_share"],
            LEAST_SHARE,
        )
        for row in rows
        if row["held"]
        for kind in buffers.KINDS
    ]


def _columns(kind: str) -> tuple[Column, ...]:
    return (
        Column(f"{kind}: ms", lambda row: f"{row[kind]['ms']:.3f}"),
        Column("% bw", lambda row: f"{100 * row[kind]['bandwidth_share']:.0f}"),
        Column("torch ms", lambda row: f"{row[kind]['torch_ms']:.3f}"),
        Column("% bw", lambda row: f"{100 * row[kind]['torch_share']:.0f}"),
        Column("×", lambda row: f"{row[kind]['times_torch']:.2f}"),
    )


COLUMNS = (
    Column("case", lambda row: row["case"]),
    Column("MB", lambda row: f"{row['bytes'] / 1e6:.1f}"),
    Column("read GB/s", lambda row: " / ".join(f"{v:.0f}" for v in row["bandwidth"].values())),
    *(column for kind in buffers.KINDS for column in _columns(kind)),
)
