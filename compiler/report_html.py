"""The report as one page that needs nothing else: what is drawn, what is listed, what is open.

Every name in it may come from a model that nobody vouches for: the template escapes all of them,
and a link is made only to a file that is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .bench_result import FILLS, Bench, milliseconds
from .report import CONTEXTS, Report, bytes_of, size_of
from .report_sections import (
    CURVE,
    memory_section,
    resident_section,
    score_tables,
    steps_section,
    time_section,
)

if TYPE_CHECKING:
    from .results import Quality, Results

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(report: Report, results: Results | None = None, version: str = "") -> str:
    """The page.

    Args:
        report: of a build, also of one that was refused.
        results: what was measured of its result since.
        version: of the memcompile that built it.
    """
    bench = results.bench if results else None
    quality = results.quality if results else None
    faults = results.faults if results else []
    kernels = [_kernel(kernel) for kernel in report.lowered.kernels]
    page: str = (
        _environment()
        .get_template(TEMPLATE.name)
        .render(
            report=report,
            version=version,
            rewritten=len(report.memories),
            tiles=_tiles(report, bench),
            options=[(name, _plain(value)) for name, value in report.options.items()],
            unverified=_unverified(report, bench, quality, kernels, faults),
            memory=memory_section(report) if report.sites else None,
            steps=steps_section(report) if report.sites else None,
            resident=resident_section(report) if report.memories else None,
            bench=bench,
            time=time_section(bench) if bench else None,
            quality=quality,
            scores=score_tables(quality) if quality else [],
            kernels=kernels,
            targets=_targets(report),
            eager=sorted({why for why in report.lowered.inductor.values() if why != "lowered"}),
            self_check=[(k.replace("_", " "), _plain(v)) for k, v in report.self_check.items()],
            timings=_timings(report),
        )
    )
    return page


@cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _tiles(report: Report, bench: Bench | None) -> list[dict[str, str]]:
    """The figures that stand first, each with dense's beside it."""
    found = []
    for context in CONTEXTS if report.sites else ():
        ours = sum(report.step_bytes(site, context) for site in report.sites)
        dense = sum(site.dense_bytes(context) for site in report.sites)
        found.append(
            {
                "label": f"read a step at {size_of(context)}",
                "value": bytes_of(ours),
                "beside": f"dense {bytes_of(dense)}",
                "note": _times(dense, ours, "less"),
            }
        )
    if report.memories:
        context = CONTEXTS[-1]
        ours = sum(report.held_bytes(site, context) for site in report.sites)
        dense = sum(site.dense_bytes(context) for site in report.sites)
        found.append(
            {
                "label": f"held of a sequence of {size_of(context)}",
                "value": bytes_of(ours),
                "beside": f"dense {bytes_of(dense)}",
                "note": _times(dense, ours, "less"),
            }
        )
    if bench is not None and bench.points:
        point = bench.points[-1]
        found.append(
            {
                "label": f"a step at {size_of(point.context)}, measured",
                "value": milliseconds(point.policy.median),
                "beside": f"dense {milliseconds(point.dense.median)}",
                "note": _times(point.dense.median, point.policy.median, "faster", "slower"),
            }
        )
    return found


def _times(dense: float, ours: float, less: str, more: str = "more") -> str:
    """How two figures compare, in words."""
    ratio = dense / ours if ours else 1.0
    if abs(ratio - 1) < 0.005:
        return "the same"
    return f"{ratio:.3g} × {less}" if ratio > 1 else f"{1 / ratio:.3g} × {more}"


def _unverified(
    report: Report,
    bench: Bench | None,
    quality: Quality | None,
    kernels: Sequence[dict[str, Any]],
    faults: Iterable[str],
) -> list[tuple[str, str, str]]:
    """What the figures of this page do not show, told from what is there: a name, a sentence, and
    the command that would mend it or nothing."""
    found: list[tuple[str, str, str]] = []

    def add(name: str, text: str, command: str = "") -> None:
        found.append((name, text, command))

    if not report.memories:
        add("No step", "nothing was rewritten, so there is nothing to verify")
    else:
        _unchecked(report, bench, quality, add)
        for why in report.lowered.references:
            add("Kernels", f"references run in their place: {why}")
        eager = {why for why in report.lowered.inductor.values() if why != "lowered"}
        for why in sorted(eager - {*report.lowered.references}):
            add("Kernels", f"the step graph runs operation by operation: {why}")
        gone = sum(kernel["link"] is None for kernel in kernels)
        if gone:
            add("Sources", f"{gone} of {len(kernels)} kernel sources are not where they were")
        if report.max_context is not None and report.max_context < CURVE[-1]:
            add("Context", f"tables hold for {report.max_context} tokens; more is arithmetic")
    for target, made in report.lowered.targets.items():
        if made["kernels"]:
            add("Kernels", f"those for {target} were compiled, and not run")
        for why in made["uncovered"]:
            add("Kernels", f"not compiled for {target}: {why}")
    for fault in faults:
        add("Results", fault)
    return found


def _unchecked(
    report: Report, bench: Bench | None, quality: Quality | None, add: Callable[..., None]
) -> None:
    """What was not checked, evaluated or measured of a step that there is."""
    if not report.self_check:
        add("Correctness", "no self-check: the step was not held against the model's own forward")
    if any(not memory.exact for memory in report.memories.values()):
        add(
            "States",
            "the self-check shows that states are computed as meant, not that they answer as the "
            "attention they stand for",
        )
    own = [row for row in quality.rows if row.policy == quality.own] if quality else []
    if quality is None:
        add("Quality", "what the memory costs in answers is not known", "memcompile eval DIR")
    elif not own:
        add("Quality", "other policies were evaluated, not this one", "memcompile eval DIR")
    else:
        idle = [row for row in own if not row.claim]
        reasons = ", ".join(dict.fromkeys(row.verdict for row in idle))
        if idle:
            add("Quality", f"{len(idle)} of {len(own)} rows are no evidence: {reasons}")
    if bench is None:
        add("Time", "fewer bytes are no promise of less time", "memcompile bench DIR")
    elif bench.fill == FILLS["random"]:
        add("Time", "measured over random keys: a text chooses other pages")
    if bench is None or not bench.device.startswith("cuda"):
        add("GPU", "no figure here comes from a GPU")


def _kernel(kernel: dict[str, Any]) -> dict[str, Any]:
    """A kernel with a link to its source, where that still is."""
    path = Path(str(kernel["source"]))
    calls = kernel["calls"].items()
    return {
        "name": kernel["name"],
        "file": path.name,
        "link": path.as_uri() if path.is_absolute() and os.path.isfile(path) else None,
        "calls": ", ".join(f"{graph} {count}" for graph, count in calls),
    }


def _targets(report: Report) -> list[dict[str, Any]]:
    """Kernels that were compiled for other machines, with links into the folder."""
    return [
        {
            "target": target,
            "size": bytes_of(sum(kernel["bytes"] for kernel in made["kernels"])),
            "rows": [
                {
                    "name": kernel["name"],
                    "link": quote(f"kernels/{target.replace(':', '-')}/{kernel['binary']}"),
                    "cells": [
                        str(kernel["threads"]),
                        str(kernel["registers"]),
                        *(bytes_of(kernel[key]) for key in ("spilled", "shared", "bytes")),
                    ],
                }
                for kernel in made["kernels"]
            ],
        }
        for target, made in report.lowered.targets.items()
    ]


def _timings(report: Report) -> list[tuple[str, str, float]]:
    longest = max(report.timings.values(), default=0.0) or 1.0
    return [(k, f"{v:.2f} s", round(100 * v / longest, 2)) for k, v in report.timings.items()]


def _plain(value: Any) -> str:
    """A value as people write it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value) if isinstance(value, str | int) else json.dumps(value)
