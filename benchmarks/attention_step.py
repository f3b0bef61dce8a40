"""One decode step of attention: dense and scout with all they do, against PyTorch's dense forms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.memory import preset
from ..models.memory.parts import SCORE_FIELDS, SUMMARY_FIELDS
from ..models.memory.spec import Memory
from ..models.memory.traffic import pages_read, record_bytes
from ..runtime.site_layout import SiteLayout
from . import bandwidth, buffers
from .memory_step import Load, MemoryStep, one_site, reads_dense
from .registry import Column, Outcome, Settings, figure
from .rules import Bar, Contender, Timing, measure, near_the_best, states_for

CONTEXTS = tuple(1024 << i for i in range(8))
SCOUT = {"budget": 2048, "sinks": 64, "window": 256, "compensate": True, "dense_layers": 0}
FORMS = ("sdpa-gqa", "sdpa-folded", "matmul")


@dataclass(frozen=True)
class Shape:
    """A site: query heads, KV heads, width of keys and values, tokens a page, element type."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.dim)

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of `tokens` tokens."""
        return 2 * tokens * self.kv_heads * self.dim * self.dtype.itemsize

    def layout(self, memory: Memory) -> SiteLayout:
        return SiteLayout("site", self.kv_heads, self.dim, self.dim, self.dtype, memory)

    def sample(self, position: int, seed: int = 1) -> tuple[Tensor, ...]:
        """query, key, value [1, heads, 1, dim], position [1], lengths [1]."""
        make = torch.Generator().manual_seed(seed)
        query, key, value = (
            torch.randn(1, heads, 1, self.dim, generator=make).to(self.dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        at = torch.tensor([position], dtype=torch.int32)
        return query, key, value, at, torch.ones(1, dtype=torch.int32)


def floor_bytes(memory: Memory, layout: SiteLayout, position: int) -> int:
    """Bytes that a step at token `position` cannot but read, each counted once.

    Keys and values of the tokens in the pages it reads; where it chooses among pages, the scored
    fields of the pages that compete and the summaries of those that lose. The record of a page that
    is both scored and summarised counts once for the fields that both read.
    """
    size, full = memory.page_size, position // memory.page_size
    if reads_dense(memory, position):
        tokens = position + 1
    else:
        tokens = (pages_read(memory, position) - 1) * size + position % size + 1
    total = tokens * layout.kv_heads * (layout.key_dim + layout.value_dim) * layout.dtype.itemsize
    if reads_dense(memory, position):
        return total
    assert memory.score is not None
    scored = SCORE_FIELDS[memory.score.kind]
    competing = max(0, full - memory.sink_pages - memory.window_pages)
    total += competing * layout.kv_heads * record_bytes(memory, layout, scored)
    if memory.compensate:
        rest = tuple(field for field in SUMMARY_FIELDS if field not in scored)
        skipped = full + 1 - pages_read(memory, position)
        total += skipped * layout.kv_heads * record_bytes(memory, layout, rest)
    return total


def dense_form(name: str, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """A dense read of keys and values [1, Hkv, m, D] for query [1, H, 1, D] in plain PyTorch."""
    kv_heads = keys.shape[1]
    if name == "sdpa-gqa":
        return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True)
    folded = query.view(1, kv_heads, -1, query.shape[3])
    if name == "sdpa-folded":
        return F.scaled_dot_product_attention(folded, keys, values, scale=scale)
    weights = torch.softmax((folded * scale) @ keys.transpose(-1, -2), -1)
    return weights @ values


def _dense_call(
    form: str, query: Tensor, cache: list[tuple[Tensor, Tensor]], scale: float, state: int
) -> Tensor:
    return dense_form(form, query, *cache[state], scale)


def baselines(shape: Shape, tokens: int, cache_bytes: int) -> list[Contender]:
    """Every dense form of PyTorch over tensors of its own, in every kind of memory pages."""
    size = shape.cache_bytes(tokens)
    states = states_for(size, cache_bytes)
    query = shape.sample(tokens - 1)[0]
    drawn = torch.randn(1, shape.kv_heads, min(tokens, 4096), shape.dim).to(shape.dtype)
    drawn = drawn.repeat(1, 1, -(-tokens // drawn.shape[2]), 1)[:, :, :tokens]
    found = []
    for form in FORMS:
        for kind in buffers.KINDS:
            cache = [(buffers.copy(drawn, kind), buffers.copy(drawn, kind)) for _ in range(states)]
            found.append(
                Contender(
                    f"{form} {kind}",
                    partial(_dense_call, form, query, cache, shape.scale),
                    states,
                    size,
                )
            )
    return found


@dataclass
class Ours:
    """dense or scout at one context."""

    name: str
    step: MemoryStep
    inputs: list[tuple[Tensor, ...]]
    floor: int
    read: str

    @property
    def contender(self) -> Contender:
        run, inputs = self.step.run, self.inputs
        return Contender(self.name, lambda i: run(*inputs[i]), len(inputs), self.floor)

    def pages(self) -> float | None:
        """The part of the key pool that lies in huge pages."""
        return buffers.huge_share(self.inputs[0][6])

    def phases(self, rounds: int) -> dict[str, float]:
        """Median milliseconds of each kernel, over all states `rounds` times."""
        every = [self.step.phases(*given) for _ in range(rounds) for given in self.inputs]
        return {
            name: 1e3 * Timing(tuple(seconds[name] for seconds in every)).median
            for name in every[0]
        }


def ours(
    name: str, shape: Shape, tokens: int, load: Load | None, cache_bytes: int, **options: Any
) -> Ours:
    """The policy `name` on memories that hold almost `tokens` tokens; each step writes the next.

    State s stands s tokens before the context is full, so that one of them fills a page, whose
    record is then written, as one step in `page_size` does.
    """
    memory = preset(name, page_size=shape.page_size, **options).memory(0, 0)
    layout, position = shape.layout(memory), tokens - 1
    read = "dense" if reads_dense(memory, position) else "policy"
    floor = floor_bytes(memory, layout, position)
    inputs = [
        (*shape.sample(at, seed), *one_site(layout, at, seed).tensors())
        for seed in range(states_for(floor, cache_bytes))
        for at in (position - seed % shape.page_size,)
    ]
    step = MemoryStep(layout, read, inputs[0][:5], inputs[0][5:], load, shape.scale)
    return Ours(name, step, inputs, floor, read)


def run(settings: Settings) -> Outcome:
    shape = Shape(8, 2, 64, 16) if settings.quick else Shape()
    scout = {**SCOUT, "min_context": settings.min_context}
    if settings.quick:
        scout |= {"budget": 128, "sinks": 16, "window": 32}
    contexts = settings.contexts or ((128, 512) if settings.quick else CONTEXTS)
    load = settings.load()
    rows, left_out = [], []
    probes = bandwidth.probes(settings.cache)
    for tokens in contexts:
        needed, free = needed_bytes(shape, tokens, scout, settings.cache), buffers.free_memory()
        if free is not None and needed > free:
            left_out.append(f"{tokens}: {needed >> 20} MiB are needed, {free >> 20} are free")
            continue
        rows.append(at_context(shape, tokens, scout, load, settings, probes))
    return Outcome(
        rows,
        COLUMNS,
        bars(rows),
        {
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "key_dim": shape.dim,
            "page_size": shape.page_size,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "scout": scout,
        },
        left_out,
    )


def needed_bytes(shape: Shape, tokens: int, scout: dict[str, Any], cache: int) -> int:
    """Bytes of all contenders' states at one context, with an eighth to spare for records."""
    memory = preset("scout", page_size=shape.page_size, **scout).memory(0, 0)
    size = shape.cache_bytes(tokens)
    floor = floor_bytes(memory, shape.layout(memory), tokens - 1)
    baseline = len(FORMS) * len(buffers.KINDS) + 1
    total = size * (baseline * states_for(size, cache) + states_for(floor, cache))
    return total + total // 8


def at_context(
    shape: Shape,
    tokens: int,
    scout: dict[str, Any],
    load: Load | None,
    settings: Settings,
    probes: list[Contender],
) -> dict[str, Any]:
    """All contenders at one context: the row that the table and the bars are made of."""
    mine = [
        ours("dense", shape, tokens, load, settings.cache),
        ours("scout", shape, tokens, load, settings.cache, **scout),
    ]
    theirs, behind = near_the_best(baselines(shape, tokens, settings.cache))
    contenders = [*(policy.contender for policy in mine), *theirs, *probes]
    timings = measure(contenders, settings.rounds)
    speed = bandwidth.bandwidths(timings, {probe.name: probe.floor for probe in probes})
    best = min(theirs, key=lambda contender: timings[contender.name].median).name
    row: dict[str, Any] = {
        "context": tokens,
        "bandwidth": {kind: figure(value / 1e9) for kind, value in speed.items()},
        "baseline": best,
        "far_behind_ms": {name: 1e3 * seconds for name, seconds in behind.items()},
        "baseline_ms": 1e3 * timings[best].median,
        "timings": {
            contender.name: timings[contender.name].to_json()
            | {"states": contender.states, "floor_bytes": contender.floor}
            for contender in contenders
        },
    }
    for policy in mine:
        share = policy.pages()
        held_to = bandwidth.kind_of(share)
        low, median, high = timings[policy.name].quartiles
        row[policy.name] = {
            "ms": 1e3 * median,
            "ms_quartiles": [1e3 * low, 1e3 * high],
            "read": policy.read,
            "states": len(policy.inputs),
            "floor_bytes": policy.floor,
            "huge_pages": share,
            "held_to": held_to,
            "times_baseline": timings[best].median / median,
            "bandwidth_share": policy.floor / median / speed[held_to],
            "times_floor": median * speed[held_to] / policy.floor,
            "phases_ms": policy.phases(2 if settings.quick else 5),
            "kernels": [spec.name for spec in policy.step.specs],
        }
    return row


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What issue 3 asks of the step, on what was measured."""
    at = {row["context"]: row for row in rows}

    def value(tokens: int, policy: str, name: str) -> float | None:
        return at[tokens][policy][name] if tokens in at else None

    found = [
        Bar(f"dense × baseline at {tokens}", value(tokens, "dense", "times_baseline"), bound)
        for tokens, bound in ((8192, 1.8), (32768, 1.8), (131072, 2.2))
    ]
    found += [
        Bar(f"dense, part of bandwidth at {n}", value(n, "dense", "bandwidth_share"), 0.5)
        for n in (32768, 65536, 131072)
    ]
    found += [
        Bar(f"scout × baseline at {tokens}", value(tokens, "scout", "times_baseline"), bound)
        for tokens, bound in ((32768, 13.0), (131072, 40.0))
    ]
    found.append(
        Bar("scout × floor at 131072", value(131072, "scout", "times_floor"), 2.0, at_least=False)
    )
    for tokens in (1024, 2048, 4096, 8192, 16384):
        # Not slower: by no more than the run itself tells apart, dense's own upper quartile.
        ratio = None
        if tokens in at:
            ratio = at[tokens]["scout"]["ms"] / at[tokens]["dense"]["ms_quartiles"][1]
        found.append(Bar(f"scout ÷ dense (upper quartile) at {tokens}", ratio, 1.0, at_least=False))
    return found


def _policy(name: str, key: str, form: str = "{:.2f}") -> Any:
    return lambda row: form.format(row[name][key])


def _phases(row: dict[str, Any]) -> str:
    parts = row["scout"]["phases_ms"].items()
    return " · ".join(f"{name} {ms:.3f}" for name, ms in parts)


def verdict(row: dict[str, Any]) -> str:
    """How the row stands to the bars that are set at its context."""
    found = [bar.met for bar in bars([row]) if bar.met is not None]
    if not found:
        return "-"
    return "met" if all(found) else f"{found.count(False)} of {len(found)} MISSED"


COLUMNS = (
    Column("context", lambda row: f"{row['context']}"),
    Column("read GB/s", lambda row: " / ".join(f"{v:.0f}" for v in row["bandwidth"].values())),
    Column("baseline", lambda row: f"{row['baseline']}"),
    Column("ms", lambda row: f"{row['baseline_ms']:.3f}"),
    Column("dense ms", _policy("dense", "ms", "{:.3f}")),
    Column("×", _policy("dense", "times_baseline")),
    Column("% bw", lambda row: f"{100 * row['dense']['bandwidth_share']:.0f}"),
    Column("scout ms", _policy("scout", "ms", "{:.3f}")),
    Column("×", _policy("scout", "times_baseline", "{:.1f}")),
    Column("× floor", _policy("scout", "times_floor")),
    Column("bars", verdict),
    Column("scout's parts, ms", _phases),
)
