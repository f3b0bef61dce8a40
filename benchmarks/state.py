"""A fixed-size state: a step against its bytes, a layer by context, prefill against other code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codegen.spec import specialise
from ..models.ops import operator
from . import bandwidth, state_baselines
from .memory_step import Load
from .registry import Column, Outcome, Settings, figure
from .rules import Bar, Contender, Timing, measure, near_the_best, states_for

CONTEXTS = (8192, 32768, 131072)
PREFILL = 8192
CHUNKS: tuple[int, ...] = (64, 128, 256)
TOGETHER = 16  # sequences: one alone does not fill the machine
MOST_FLOORS = 2.0
MOST_GROWTH = 1.1
LEAST_SPEEDUP = 2.0


@dataclass(frozen=True)
class Shape:
    """A state: query heads, KV heads, features of a key, width of a value, what it is made by.

    Attributes:
        decay: "" or "gate".
        rule: "additive", "normalised" or "delta".
        sequences: how many of them take a step together.
    """

    heads: int = 32
    kv_heads: int = 8
    features: int = 128
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    decay: str = ""
    rule: str = "additive"
    window: int = 64
    page_size: int = 64
    sequences: int = 1

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.rule}{', gated' if self.decay else ''}, {heads}, {kind}"

    def inputs(self, rows: int, seed: int = 0) -> dict[str, Any]:
        """What `state_step` takes, by name."""
        make = torch.Generator().manual_seed(seed)
        query, key, value = (
            torch.randn(self.sequences, heads, rows, width, generator=make)
            for heads, width in (
                (self.heads, self.features),
                (self.kv_heads, self.features),
                (self.kv_heads, self.dim),
            )
        )
        query, key = query.softmax(-1), key.softmax(-1)
        each = (self.sequences, self.kv_heads)
        gates = torch.rand(2, *each, rows, generator=make)
        norm = torch.rand(*each, self.features, generator=make)
        return {
            "query": query.to(self.dtype),
            "key": key.to(self.dtype),
            "value": value.to(self.dtype),
            "decay": -0.05 * gates[0] if self.decay else None,
            "beta": gates[1] if self.rule == "delta" else None,
            "lengths": torch.full((self.sequences,), rows, dtype=torch.int32),
            "state": torch.randn(*each, self.features, self.dim, generator=make),
            "norm": norm if self.rule == "normalised" else None,
        }

    def floor_bytes(self) -> int:
        """Bytes that a step of one row cannot but move: the state, read and written, and the row's
        inputs and results."""
        given = {name: x.nbytes for name, x in self.inputs(1).items() if x is not None}
        kept = given["state"] + given.get("norm", 0)
        rows = sum(given.get(name, 0) for name in ("query", "key", "value", "decay", "beta"))
        return int(2 * kept + rows + 4 * self.sequences * self.heads * (self.dim + 1))

    def window_bytes(self) -> int:
        """Bytes of the keys and values of all windows."""
        tokens = self.sequences * self.kv_heads * self.window
        return 2 * tokens * self.dim * self.dtype.itemsize


STEPS = (
    Shape(rule="normalised"),
    Shape(rule="normalised", decay="gate"),
    Shape(),
    Shape(rule="delta", decay="gate"),
    Shape(rule="normalised", decay="gate", dtype=torch.float32),
    Shape(64, 64, rule="normalised"),
)
PREFILLS = tuple(
    Shape(*heads, decay=decay, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for heads in ((32, 8), (16, 16))
    for decay in ("", "gate")
)
QUICK = Shape(4, 2, 16, 16, rule="normalised", window=8, page_size=8)


def bound(op: str, args: tuple[Any, ...], load: Load | None) -> Callable[[], Any]:
    """A call of the operation on these arguments: its kernel, or the reference without one."""
    if load is None:
        return partial(operator(op), *args)
    spec, given = specialise(op, args)
    return partial(load([spec])[spec], *given)


def step(shape: Shape, load: Load | None, cache: int) -> Contender:
    """One token through `state_step`, on states that rotate past the cache."""
    floor = shape.floor_bytes()
    count = states_for(floor // 2, cache)
    calls = [bound("state_step", tuple(shape.inputs(1, s).values()), load) for s in range(count)]
    return Contender(f"step {shape.name}", lambda state: calls[state](), count, floor)


class Layer:
    """One token through a layer that keeps a window and a state: written to the window's pages,
    read from them and from the state, both joined. Pages behind the window are let go."""

    def __init__(self, shape: Shape, context: int, load: Load | None, seed: int) -> None:
        make = torch.Generator().manual_seed(seed)
        held = shape.window // shape.page_size + 1
        columns = -(-context // shape.page_size)
        each = (shape.sequences, shape.kv_heads)
        pages = shape.sequences * shape.kv_heads * held
        table = torch.full((*each, columns), -1, dtype=torch.int32)
        table[..., -held:] = torch.arange(pages, dtype=torch.int32).view(*each, held)
        pools = [
            torch.randn(pages, shape.page_size, shape.dim, generator=make).to(shape.dtype)
            for _ in range(2)
        ]
        position = torch.full((shape.sequences,), context - 1, dtype=torch.int32)
        given = shape.inputs(1, seed)
        row = [
            torch.randn(shape.sequences, heads, 1, shape.dim, generator=make).to(shape.dtype)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        ]
        at = position, given["lengths"]
        self.write = bound("append_index", (*row[1:], table, *at, *pools, [], []), load)
        window = (row[0], *pools, None, table, None, False, *at, shape.dim**-0.5, 0.0)
        self.near = bound("attend", (*window, shape.window, 1), load)
        self.far = bound("state_step", tuple(given.values()), load)
        near, far = self.near(), self.far()
        self.join: Callable[..., Any] = operator("combine")
        if load is not None:
            spec, _ = specialise("combine", ([near[0], far[0]], [near[1], far[1]]))
            kernel = load([spec])[spec]
            self.join = lambda outs, lses: kernel(outs[0], lses[0], outs[1], lses[1])

    def __call__(self) -> tuple[Tensor, Tensor]:
        self.write()
        (near, near_lse), (far, far_lse) = self.near(), self.far()
        joined: tuple[Tensor, Tensor] = self.join([near, far], [near_lse, far_lse])
        return joined


def layer(shape: Shape, context: int, load: Load | None, cache: int) -> Contender:
    floor = shape.floor_bytes() + shape.window_bytes()
    count = states_for(floor // 2, cache)
    calls = [Layer(shape, context, load, seed) for seed in range(count)]
    together = f", {shape.sequences} sequences" if shape.sequences > 1 else ""
    name = f"layer at {context}{together}"
    return Contender(name, lambda state: calls[state](), count, floor)


def prefill(
    shape: Shape, rows: int, chunks: tuple[int, ...], load: Load | None, settings: Settings
) -> tuple[dict[str, Any], list[str]]:
    """The row of one shape, and what could not be held against it."""
    given = shape.inputs(rows)
    given["state"].zero_()
    work = given["query"].nbytes + given["key"].nbytes + given["value"].nbytes
    ours = bound("state_chunk", tuple(given.values()), load)
    forms = [(chunk, folded) for chunk in chunks for folded in (False, True)]
    if shape.heads == shape.kv_heads:  # there is nothing to fold
        forms = forms[::2]
    baselines = {
        f"torch, chunks of {chunk}{', folded' if folded else ''}": state_baselines.compiled(
            given, chunk, folded, "aot_eager" if settings.quick else "inductor"
        )
        for chunk, folded in forms
    }
    left_out = []
    try:
        baselines["onnxruntime"] = state_baselines.onnxruntime(given)
    except (ImportError, ValueError) as error:
        left_out.append(f"onnxruntime, {shape.name}: {error}")

    def contender(name: str, call: Callable[[], Any]) -> Contender:
        return Contender(name, lambda _: call(), 1, work)

    theirs, behind = near_the_best([contender(*each) for each in baselines.items()])
    timings = measure([contender("ours", ours), *theirs], settings.rounds)
    best = min(theirs, key=lambda each: timings[each.name].median).name
    row = {
        "what": f"prefill of {rows}: {shape.name}",
        "ms": 1e3 * timings["ours"].median,
        "baseline": best,
        "baseline_ms": 1e3 * timings[best].median,
        "times_baseline": timings[best].median / timings["ours"].median,
        "far_behind_ms": {name: 1e3 * seconds for name, seconds in behind.items()},
        "timings": {name: timing.to_json() for name, timing in timings.items()},
    }
    return row, left_out


def _row(contender: Contender, timing: Timing, speed: float) -> dict[str, Any]:
    low, median, high = timing.quartiles
    return {
        "what": contender.name,
        "ms": 1e3 * median,
        "ms_quartiles": [1e3 * low, 1e3 * high],
        "states": contender.states,
        "floor_bytes": contender.floor,
        "bandwidth": figure(speed / 1e9),
        "times_floor": median * speed / contender.floor,
    }


def run(settings: Settings) -> Outcome:
    load = settings.load()
    steps: tuple[Shape, ...] = STEPS
    prefills: tuple[Shape, ...] = PREFILLS
    rows_of, chunks = PREFILL, CHUNKS
    if settings.quick:
        steps, prefills = (QUICK,), (replace(QUICK, rule="additive"),)
        rows_of, chunks = 64, (16,)
    contexts = settings.contexts or ((64, 128) if settings.quick else CONTEXTS)
    probes = bandwidth.probes(settings.cache)
    contenders = [step(shape, load, settings.cache) for shape in steps]
    contenders += [layer(steps[0], context, load, settings.cache) for context in contexts]
    together = replace(steps[0], sequences=2 if settings.quick else TOGETHER)
    contenders.append(layer(together, contexts[-1], load, settings.cache))
    timings = measure([*contenders, *probes], settings.rounds)
    speed = bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes})
    rows = [_row(each, timings[each.name], speed["ordinary"]) for each in contenders]
    for row, context in zip(rows[len(steps) : -1], contexts, strict=True):
        row["context"] = context
    del contenders, probes
    left_out = []
    for shape in prefills:
        row, missing = prefill(shape, rows_of, chunks, load, settings)
        rows.append(row)
        left_out += missing
    setting = {"features": steps[0].features, "dim": steps[0].dim, "window": steps[0].window}
    return Outcome(rows, COLUMNS, bars(rows), setting, left_out)


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What issue 5 asks of a state, on what was measured."""
    found = [
        Bar(f"{row['what']} × floor", row["times_floor"], MOST_FLOORS, at_least=False)
        for row in rows
        if row["what"].startswith(("step", "layer"))
    ]
    by_context = {row["context"]: row["ms"] for row in rows if "context" in row}
    growth = None
    if {CONTEXTS[0], CONTEXTS[-1]} <= set(by_context):
        growth = by_context[CONTEXTS[-1]] / by_context[CONTEXTS[0]]
    what = f"layer at {CONTEXTS[-1]} ÷ at {CONTEXTS[0]}"
    found.append(Bar(what, growth, MOST_GROWTH, at_least=False))
    found += [
        Bar(f"{row['what']} × baseline", row["times_baseline"], LEAST_SPEEDUP)
        for row in rows
        if "times_baseline" in row
    ]
    return found


def _figure(name: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: form.format(row[name]) if name in row else "-"


COLUMNS = (
    Column("what", lambda row: str(row["what"])),
    Column("ms", _figure("ms", "{:.3f}")),
    Column("read GB/s", _figure("bandwidth", "{:.0f}")),
    Column("× floor", _figure("times_floor", "{:.2f}")),
    Column("baseline", _figure("baseline", "{}")),
    Column("ms", _figure("baseline_ms", "{:.1f}")),
    Column("×", _figure("times_baseline", "{:.2f}")),
)
