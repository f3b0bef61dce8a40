"""The sections of the page that are drawn: tiers, curves, times, scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..passes.result import Site
from .bench_result import Bench, Point, Seconds, milliseconds, threads_of
from .charts import Chart, Series, chart
from .report import CONTEXTS, Report, bytes_of, describe, layout_of, size_of
from .tiers import KINDS, Tier, held, tiers

if TYPE_CHECKING:
    from .results import Quality

# Contexts of the curves: 1K to 1M.
CURVE = tuple(1 << power for power in range(10, 21))
DRAWN = CONTEXTS[0]
NONE = "-"


@dataclass(frozen=True)
class Group:
    """Layers that are alike: same shape, mask and memory."""

    sites: list[Site]

    @property
    def layers(self) -> str:
        """0-3, 5"""
        runs: list[list[int]] = []
        for layer in sorted(site.layer for site in self.sites):
            if runs and layer == runs[-1][-1] + 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _groups(report: Report) -> list[Group]:
    """Layers that are alike, in the order of their first."""
    found: dict[Any, list[Site]] = {}
    for site in report.sites:
        shape = (site.heads, site.kv_heads, site.key_dim, site.value_dim, site.dtype, site.rule)
        found.setdefault((shape, report.memories.get(site.name)), []).append(site)
    return [Group(sites) for sites in found.values()]


def _tiers(report: Report, site: Site, context: int) -> list[Tier]:
    memory = report.memories.get(site.name)
    if memory is not None:
        return tiers(memory, site, context, site.rule.window)
    seen = min(context, site.rule.window or context)
    found = [Tier("pages" if seen == context else "window", seen, site.dense_bytes(context))]
    return found if seen == context else [Tier("freed", context - seen, 0), *found]


def memory_section(report: Report) -> dict[str, Any]:
    """The layers at one context, in tokens and in bytes: as bars, and in figures."""
    drawn = {site.name: _tiers(report, site, DRAWN) for site in report.sites}
    longest = max(
        max(site.dense_bytes(DRAWN), sum(tier.bytes for tier in drawn[site.name]))
        for site in report.sites
    )
    rows = []
    for site in report.sites:
        found, memory = drawn[site.name], report.memories.get(site.name)
        read, dense = sum(tier.bytes for tier in found), site.dense_bytes(DRAWN)
        exact = sum(t.tokens for t in found if t.kind in ("sinks", "pages", "window"))
        rows.append(
            {
                "layer": site.layer,
                "name": site.name,
                "memory": memory.name if memory else "untouched",
                "tokens": [(t.kind, t.tokens) for t in found if t.tokens],
                "bytes": [(t.kind, t.bytes) for t in found if t.bytes],
                "read": round(100 * read / longest, 2),
                "dense": round(100 * dense / longest, 2),
                "exact": f"{exact} of {DRAWN} tokens exactly",
                "figures": f"{bytes_of(read)} of {bytes_of(dense)}",
                "text": "; ".join(_said(tier) for tier in found),
            }
        )
    present = {tier.kind for found in drawn.values() for tier in found}
    return {
        "context": size_of(DRAWN),
        "rows": rows,
        "legend": [(kind, label) for kind, label in KINDS.items() if kind in present],
        "groups": [_figures(report, group) for group in _groups(report)],
        "far": size_of(CONTEXTS[-1]),
        "kinds": [*dict.fromkeys(describe(memory) for memory in report.memories.values())],
    }


def _said(tier: Tier) -> str:
    tokens = f"{tier.tokens} tokens, " if tier.tokens else ""
    return f"{tier.label}: {tokens}{bytes_of(tier.bytes)}"


def _figures(report: Report, group: Group) -> dict[str, Any]:
    """The tiers of one layer of a group, at both contexts, and its budget."""
    site = group.sites[0]
    memory = report.memories.get(site.name)
    near, far = (
        {(tier.kind, tier.level): tier for tier in _tiers(report, site, context)}
        for context in CONTEXTS
    )
    order = [*KINDS]
    lines = []
    for key in sorted({*near, *far}, key=lambda key: (order.index(key[0]), -key[1])):
        pair = [found.get(key) for found in (near, far)]
        label = next(tier.label for tier in pair if tier is not None)
        cells = []
        for tier in pair:
            cells += [f"{tier.tokens:,}" if tier and tier.tokens else NONE]
            cells += [bytes_of(tier.bytes) if tier and tier.bytes else NONE]
        lines.append((key[0], label, cells))
    budget = ""
    if memory is not None and memory.budget_pages:
        tokens = memory.budget_pages * memory.page_size
        width = site.kv_heads * (site.key_dim + site.value_dim) * site.dtype.itemsize
        budget = f"Budget: {tokens:,} tokens, {bytes_of(tokens * width)} of keys and values a layer"
    return {
        "layers": group.layers,
        "count": len(group.sites),
        "memory": describe(memory) if memory else "untouched: reads everything it sees",
        "shape": f"{site.heads} query heads on {site.kv_heads}, {site.key_dim} wide; {site.rule}",
        "budget": budget,
        "lines": lines,
    }


def steps_section(report: Report) -> dict[str, Any]:
    """Bytes a step from 1K to 1M: the curves, and each context's share of dense by tier."""
    counted: list[tuple[int, dict[str, int], int]] = []
    for context in CURVE:
        by_kind = dict.fromkeys(KINDS, 0)
        for site in report.sites:
            for tier in _tiers(report, site, context):
                by_kind[tier.kind] += tier.bytes
        dense = sum(site.dense_bytes(context) for site in report.sites)
        counted.append((context, by_kind, dense))
    present = [kind for kind in KINDS if any(by_kind[kind] for _, by_kind, _ in counted)]
    rows = []
    for context, by_kind, dense in counted:
        ours = sum(by_kind.values())
        rows.append(
            {
                "context": _size(context),
                "parts": [(kind, by_kind[kind]) for kind in present if by_kind[kind]],
                "share": min(100.0, round(100 * ours / dense, 2)),
                "percent": f"{ours / dense:.1%}" if ours < dense else f"{ours / dense:.0%}",
                "cells": [bytes_of(by_kind[kind]) if by_kind[kind] else NONE for kind in present],
                "ours": bytes_of(ours),
                "dense": bytes_of(dense),
            }
        )
    totals = [(context, sum(by_kind.values())) for context, by_kind, _ in counted]
    return {
        "chart": chart(
            "bytes",
            "Bytes that a step reads of the memory, all layers, against the context",
            [
                Series(report.policy, "ours", [(at, n, n, n) for at, n in totals]),
                Series("dense", "dense", [(at, n, n, n) for at, _, n in counted]),
            ],
            size_of=_size,
            value_of=bytes_of,
            limit=report.max_context,
        ),
        "rows": rows,
        "heads": [KINDS[kind] for kind in present],
        "legend": [(kind, KINDS[kind]) for kind in present],
    }


def _size(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens % (1 << 20) == 0 else size_of(tokens)


def resident_section(report: Report) -> dict[str, Any]:
    """What a sequence takes in all layers, by what it is."""
    rows = []
    for context in CONTEXTS:
        parts: dict[str, int] = {}
        for site in report.sites:
            memory = report.memories[site.name]
            for name, count in held(layout_of(site, memory), context).items():
                parts[name] = parts.get(name, 0) + count
        rows.append((context, parts))
    every = ("keys and values", "records", "account", "state")
    heads = [name for name in every if any(name in parts for _, parts in rows)]
    return {
        "heads": heads,
        "rows": [
            (
                size_of(context),
                [bytes_of(parts.get(name, 0)) for name in heads],
                bytes_of(sum(parts.values())),
                bytes_of(sum(site.dense_bytes(context) for site in report.sites)),
            )
            for context, parts in rows
        ],
    }


def time_section(bench: Bench) -> dict[str, Any]:
    drawn: Chart | None = None
    if bench.points:
        ours = [_reach(point.context, point.policy) for point in bench.points]
        dense = [_reach(point.context, point.dense) for point in bench.points]
        drawn = chart(
            "time",
            "Milliseconds that a step takes, the whole model, against the context",
            [Series(bench.policy, "ours", ours), Series("dense", "dense", dense)],
            size_of=_size,
            value_of=lambda value: milliseconds(value / 1000),
        )
    return {
        "chart": drawn,
        "rows": [_timed(point) for point in bench.points],
        "threads": threads_of(bench),
        "prefill": f"{bench.prefill_rate:,.0f}",
        "weights": bytes_of(bench.weight_bytes),
    }


def _reach(context: int, taken: Seconds) -> tuple[int, float, float, float]:
    return context, 1000 * taken.median, 1000 * taken.least, 1000 * taken.most


def _timed(point: Point) -> dict[str, Any]:
    pairs = []
    for taken in (point.policy, point.dense):
        reach = f"{milliseconds(taken.least, '')} to {milliseconds(taken.most)}"
        pairs.append((milliseconds(taken.median), reach))
    pairs.append((f"{point.speedup:.2f} ×", ""))
    for taken, count in ((point.policy, point.policy_bytes), (point.dense, point.dense_bytes)):
        pairs.append((bytes_of(count), f"{count / taken.median / 1e9:.2f} GB/s"))
    return {"context": size_of(point.context), "pairs": pairs}


def score_tables(quality: Quality) -> list[dict[str, Any]]:
    """Scores and losses as tables: intervals below their means, layers below their policy."""
    from ..evaluation.tables import cells, parts

    found = []
    for heads, rows in parts(quality.rows):
        shown = []
        for row in rows:
            *words, dense, state, verdict = cells(row)
            pairs = [_two(word) for word in words]
            layers = [f"{dense} layers dense"] if row.kept_dense else []
            layers += [f"{state} with a state"] if row.stateful else []
            pairs[2] = (row.policy, ", ".join(layers) or "no layer dense")
            shown.append((row.policy == quality.own, pairs, verdict))
        better = "Less" if heads[3] == "nats" else "More"
        found.append({"heads": [*heads[:-2], "verdict"], "rows": shown, "better": better})
    return found


def _two(word: str) -> tuple[str, str]:
    """A mean and its interval apart."""
    mean, bracket, interval = word.partition(" [")
    return (mean, f"[{interval}") if bracket else (word, "")
