"""Kernels of a compiled model for GPUs that need not be there: which, for what, in which files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...codegen.spec import KernelSpec, NotCovered
from ...codegen.triton.blocks import ARCHITECTURES
from ...codegen.triton.bundle import DESCRIPTION
from ...codegen.triton.record import fixed_size
from ...codegen.triton.workers import Job, check_compiler, compile_jobs
from ...models.memory.names import known
from ...runtime.site_layout import SiteLayout
from ..lower import example_state, memory_calls, trace, uncovered
from ..progress import bar

if TYPE_CHECKING:
    from ..pipeline import Compiled

# Tensors whose last axis is the width that a spec's kernels are compiled for.
_LISTS = {"list_pages": "pages", "candidates": "candidates"}


@dataclass
class Needed:
    """A kernel that step graphs call.

    Attributes:
        widths: of its lists, where it is compiled for them; else None alone.
        calls: how often each graph calls it.
        numbers: the numbers it is given, once each.
    """

    spec: KernelSpec
    widths: set[int | None] = field(default_factory=set)
    calls: dict[str, int] = field(default_factory=dict)
    numbers: list[dict[str, int | float]] = field(default_factory=list)


@dataclass
class Binaries:
    """What was compiled for one target.

    Attributes:
        operators: their descriptions, kernels left out (docs/kernels.md has the format).
        kernels: by file name without suffix.
        files: contents of binaries and assembly by file name.
        uncovered: what no template covers on this target, a reason each.
    """

    target: str
    operators: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    uncovered: list[str] = field(default_factory=list)


def parse_targets(text: str | Iterable[str]) -> list[str]:
    """`cuda:sm_90,hip:gfx942` -> its targets, each once.

    Raises:
        ValueError: an unknown target, or none; the known ones are listed.
    """
    words = text.split(",") if isinstance(text, str) else [*text]
    found = [word.strip() if isinstance(word, str) else word for word in words]
    found = [word for word in dict.fromkeys(found) if word != ""]
    if not found:
        raise ValueError(f"no target is given; known: {', '.join(ARCHITECTURES)}")
    for word in found:
        known("target", word, ARCHITECTURES)
    return found


def needed(
    graphs: Mapping[str, fx.GraphModule], layouts: Sequence[SiteLayout], device: torch.device
) -> tuple[list[Needed], list[str]]:
    """The kernels that step graphs call, on any device, and what no template covers.

    Args:
        graphs: step graphs by name ("dense", "policy"); one object may have two names.
        layouts, device: as for `lower.lower`.
    """
    why = uncovered(layouts)
    if why:
        return [], [why]
    found: dict[KernelSpec, Needed] = {}
    missing: dict[str, None] = {}
    once = {id(graph): graph for graph in graphs.values()}
    example = partial(example_state, layouts, device)
    traced = {key: trace(graph, example, None) for key, graph in once.items()}
    for name, graph in graphs.items():
        for _, _, spec, given in memory_calls({name: traced[id(graph)]}):
            if isinstance(spec, NotCovered):
                missing[str(spec)] = None
                continue
            need = found.setdefault(spec, Needed(spec))
            need.calls[name] = need.calls.get(name, 0) + 1
            arguments = {
                name: value for (_, name), value in zip(spec.arguments, given, strict=True)
            }
            fixed = fixed_size(spec)
            need.widths.add(int(arguments[_LISTS[fixed]].shape[3]) if fixed else None)
            numbers = {k: v for k, v in arguments.items() if isinstance(v, int | float)}
            if numbers and numbers not in need.numbers:
                need.numbers.append(numbers)
    return sorted(found.values(), key=lambda need: need.spec.name), [*missing]


def compile_targets(
    compiled: Compiled, targets: Sequence[str], *, required: bool = False
) -> list[Binaries]:
    """Every kernel of a compiled model, for every target; what is in the cache is taken from there.

    Both step graphs are looked at: the one that reads densely and the one that reads through the
    policy.

    Args:
        targets: keys of `blocks.ARCHITECTURES`.
        required: raise where no template covers an operation, which otherwise is listed.

    Raises:
        ValueError: an unknown target, a model without step graphs, or none whose memory kernels
            cover at all.
        ImportError: triton is not installed.
        OSError: the cache cannot be written.
        RuntimeError: a kernel cannot be compiled; or, with `required`, is not covered.
    """
    targets = parse_targets(targets)
    check_compiler()
    if compiled.step is None or compiled.program is None:
        raise ValueError("nothing was rewritten, so there are no kernels; see its declines")
    graphs = {"dense": compiled.step.dense, "policy": compiled.step.policy}
    needs, missing = needed(graphs, compiled.program.layouts, compiled.program.device)
    return compile_needed(needs, targets, missing, required=required)


def compile_needed(
    needs: Sequence[Needed],
    targets: Sequence[str],
    missing: Sequence[str] = (),
    *,
    required: bool = False,
) -> list[Binaries]:
    """`compile_targets` of kernels that are known already."""
    jobs = {
        (target, need.spec, width): Job(need.spec, target, width)
        for target in targets
        for need in needs
        for width in sorted(need.widths, key=lambda width: width or 0)
    }
    with bar(len(jobs)) as advance:
        folders = compile_jobs(
            [*jobs.values()], lambda job: advance(f"{job.target} {job.spec.template}")
        )
    found = []
    for target in targets:
        made = Binaries(target, uncovered=[*missing])
        for need in needs:
            parts = [folders[jobs[target, need.spec, w]] for w in need.widths]
            reasons = [str(part) for part in parts if isinstance(part, NotCovered)]
            made.uncovered += dict.fromkeys(reasons)
            if not reasons:
                _add(made, need, [part for part in parts if isinstance(part, Path)])
        if made.uncovered and (required or not made.kernels):
            why = "; ".join(made.uncovered)
            raise (RuntimeError if required else ValueError)(
                f"{target}: no kernel covers what the model needs: {why}"
            )
        found.append(made)
    return found


def _add(made: Binaries, need: Needed, folders: Iterable[Path]) -> None:
    """Joins what was compiled for the widths of a spec's lists."""
    operator: dict[str, Any] = {}
    for folder in folders:
        told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if not operator:
            operator = {
                **{key: told[key] for key in ("name", "spec")},
                "calls": need.calls,
                "numbers": need.numbers,
                **{key: told[key] for key in ("arguments", "returns")},
                "variants": [],
                "kernels": [],
            }
        operator["variants"] += [
            variant for variant in told["variants"] if variant not in operator["variants"]
        ]
        for kernel in told["kernels"]:
            name = f"{told['name']}.{kernel['role']}"
            if name in made.kernels:
                continue
            about = {"operator": told["name"], **kernel}
            for part in ("binary", "assembly"):
                content = (folder / kernel[part]).read_bytes()
                about[part] = name + Path(kernel[part]).suffix
                made.files[about[part]] = content
            made.kernels[name] = about
            operator["kernels"].append(name)
    made.operators.append(operator)


def figures(binaries: Iterable[Binaries]) -> dict[str, dict[str, Any]]:
    """For the report: by target, each kernel's registers and sizes, and what is not covered."""
    keys = ("registers", "spilled", "shared", "bytes", "threads", "binary")
    return {
        made.target: {
            "kernels": [
                {"name": name, **{key: kernel[key] for key in keys}}
                for name, kernel in made.kernels.items()
            ],
            "uncovered": [*made.uncovered],
        }
        for made in binaries
    }
