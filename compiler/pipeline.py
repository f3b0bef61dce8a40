"""The road from a model to an engine, top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..models.memory import Policy, Preset
from ..models.memory.spec import Memory, Pages
from ..models.memory.state import Weights
from ..passes.classify_tokens import Classified, classify_tokens
from ..passes.find_branches import find_branches, keeps_guards
from ..passes.find_sites import find_sites
from ..passes.fold_attention import fold_attention
from ..passes.graph_tools import argument
from ..passes.join_pieces import join_pieces
from ..passes.remember import StepGraph, decline_step, remember
from ..passes.result import Declined, NotRewritten, PassResult, Site
from ..passes.strip_asserts import strip_asserts
from ..passes.token_axes import Kind, Value
from ..passes.undo_repeat_kv import undo_repeat_kv
from ..passes.unlift import unlift
from ..passes.verify import verify
from ..runtime.engine import Engine, Program
from .capture import Captured, capture
from .lower import lower
from .policy_file import FittedPolicy, choose
from .report import Report, layout_of, stage
from .self_check import check_splits, self_check
from .settings import debug
from .settings import kernels as kernels_setting

# Graph to graph, in order; each leaves a graph that `verify` accepts.
NORMALISE: tuple[Callable[[fx.GraphModule], PassResult], ...] = (
    strip_asserts,
    join_pieces,
    fold_attention,
    undo_repeat_kv,
)


# What `build` takes beside the fields of a policy.
OPTIONS = (
    *("max_context", "strict", "check", "kernels", "name"),
    *("trust_pickle", "arch", "arch_config", "dtype"),
)


@dataclass
class Compiled:
    """A model whose attentions have been given memories.

    Attributes:
        captured: the program that was compiled; None if the model could not be captured.
        preset: the policy with its options.
        sites: the attentions, in graph order.
        memories: what each site remembers, by site name.
        declined: what was looked at and left alone.
        report: all of it for people.
        program: what engines run, or None when nothing could be rewritten (``strict=False``).
        step: the step graphs before they were lowered, for engines that leave Python behind.
    """

    captured: Captured | None
    preset: Preset
    sites: list[Site]
    memories: dict[str, Memory]
    declined: list[Declined]
    report: Report
    program: Program | None
    step: StepGraph | None = None

    def engine(self) -> Engine:
        """A new, empty engine.

        Raises:
            NotRewritten: there is no step graph; the declines say why.
        """
        if self.program is None:
            raise NotRewritten(f"{self.report.model} has no step graph", self.declined)
        return Engine(self.program)


def build(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    policy: Policy | str | os.PathLike[str] = "scout",
    *,
    max_context: int | None = None,
    strict: bool = True,
    check: bool = True,
    kernels: str | None = None,
    name: str | None = None,
    trust_pickle: bool = False,
    arch: str | None = None,
    arch_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Compiled:
    """Capture `model` and compile it; see `build_captured`.

    Args:
        model: a module, an exported program, or the path of one (see `compiler.load`).
        policy: name of a policy, or a policy file; `options` are its fields. Or a `Policy`, which
            has its fields already.
        max_context: longest context the engine will hold; preallocates the memory and resolves
            length-dependent rotary tables. None: grows.
        strict: raise when no site, or not every site, could be rewritten.
        check: run the self-check.
        kernels: "auto" generates kernels and lowers the step through Inductor, and says so where it
            cannot; "required" raises then; "off" runs the references. None: MEMCOMPILE_KERNELS,
            or "auto".
        name: what reports and errors call the model; its path's last part or its class if None.
        trust_pickle, arch, arch_config, dtype: how a path is read; see `compiler.load.load`.
    """
    chosen = choose(policy, options, OPTIONS)
    kernels = kernels_setting(kernels)
    check_context(max_context)
    if isinstance(model, str | os.PathLike):
        from .load import load

        path = Path(model)
        how: dict[str, Any] = {"arch": arch, "arch_config": arch_config, "dtype": dtype}
        loaded = load(path, trust_pickle=trust_pickle, **how)
        model, name = loaded.model, name or path.name
    elif trust_pickle or any(x is not None for x in (arch, arch_config, dtype)):
        raise ValueError(
            "trust_pickle, arch, arch_config and dtype say how a path is read; the model given is "
            f"a {type(model).__name__}"
        )
    timings: dict[str, float] = {}
    try:
        with stage(timings, "capture"):
            captured = capture(model, max_context=max_context)
    except NotRewritten as refused:
        if strict:
            raise
        report = _report(name or type(model).__name__, chosen, max_context)
        report.declined = refused.declined
        return Compiled(None, chosen, [], {}, refused.declined, report, None)
    if name is not None:
        captured.name = name
    compiled = build_captured(
        captured, chosen, max_context=max_context, strict=strict, check=check, kernels=kernels
    )
    compiled.report.timings = {**timings, **compiled.report.timings}
    return compiled


def build_captured(
    captured: Captured,
    chosen: Preset,
    *,
    max_context: int | None = None,
    strict: bool = True,
    check: bool = True,
    kernels: str | None = None,
) -> Compiled:
    """Normalise, find, plan, remember, lower: from a captured program to a checked engine.

    Raises:
        NotRewritten: with `strict`, when there is no attention, a site's mask is not understood, or
            no step can be derived; every decline is listed with its node and source line.
    """
    check_context(max_context)
    name = captured.name
    report = _report(name, chosen, max_context)
    timings = report.timings
    with stage(timings, "normalise"):
        try:
            module, declined = normalise(captured.program)
        except NotRewritten as refused:
            if strict:
                raise
            report.declined = refused.declined
            return Compiled(captured, chosen, [], {}, refused.declined, report, None)
    with stage(timings, "find"):
        classified = classify_tokens(module)
        sites, unread = find_sites(module, classified)
        # Sites that one value stops carry the same decline.
        blocking = list(dict.fromkeys([*unread, *_stops(captured, module, classified)]))
        declined = list(dict.fromkeys([*declined, *blocking]))
    debug(2, lambda: module.print_readable(print_output=False))
    report.sites, report.declined = sites, declined
    if not keeps_guards(captured.program):
        report.notes.append(
            "this torch leaves no guards with a program: branches on sizes were not looked for"
        )
    step: StepGraph | None = None
    memories: dict[str, Memory] = {}
    if sites and not blocking:
        with stage(timings, "plan"):
            chosen = chosen.for_layers([s.name for s in sites])
            fitted: Mapping[str, Weights] = {}
            if isinstance(chosen, FittedPolicy):
                chosen.check(sites)
                fitted = chosen.fitted
                report.notes += chosen.notes(captured.program)
            memories = {s.name: chosen.memory_at(s.layer, s.rule.window) for s in sites}
            for memory in memories.values():
                memory.check_lowered()
        with stage(timings, "remember"):
            step = remember(module, classified, sites, memories, fitted)
        debug(2, lambda: step.policy.print_readable(print_output=False) if step else "")
    report.memories = memories
    if step is None:
        if strict:
            raise NotRewritten(_refusal(name, sites), list(dict.fromkeys([*blocking, *declined])))
        return Compiled(captured, chosen, sites, memories, declined, report, None)
    report.ragged = step.ragged
    limit, limited_by = _limit(captured, classified, max_context)
    if limit is not None and max_context is None:
        report.notes.append(f"contexts up to {limit} tokens: {limited_by}")
    unfitted = [s.name for s in sites if memories[s.name].state and s.name not in fitted]
    if unfitted:
        report.notes.append(
            f"the states of {', '.join(unfitted)} are not fitted: what they read is not this "
            "model's attention; `memcompile distill` fits them"
        )
    layouts = tuple(layout_of(site, memories[site.name]) for site in sites)
    steps, report.lowered = lower(
        {"dense": step.dense, "policy": step.policy},
        layouts,
        _device(module),
        kernels_setting(kernels),
        timings,
    )
    program = Program(
        steps["dense"],
        steps["policy"],
        layouts,
        report.ragged,
        limit,
        limited_by,
        max_context,
        vocabulary(module, classified),
        _device(module),
        captured.origin,
    )
    if check:
        with stage(timings, "self-check"):
            forward = captured.forward or _graph_forward(captured.program)
            takes_ids = captured.takes_position_ids
            if all(memory.exact for memory in memories.values()):
                report.self_check = self_check(program, forward, takes_ids)
            else:
                # A state answers otherwise than the forward: the step is held against it with
                # pages in the states' place, and the states against themselves.
                plain = _with_pages(program, module, classified, sites, memories)
                report.self_check = self_check(plain, forward, takes_ids)
                report.self_check["states_differ"] = check_splits(
                    program, replace(program, dense=step.dense, policy=step.policy)
                )
    compiled = Compiled(captured, chosen, sites, memories, declined, report, program, step)
    debug(1, lambda: str(report))
    return compiled


def check_context(max_context: int | None) -> None:
    """Refuses a context that no engine can hold.

    Raises:
        ValueError: it is no positive whole number, or beyond the positions, which are 32 bit.
    """
    if max_context is None:
        return
    if type(max_context) is not int or max_context < 1:
        raise ValueError(f"max_context is {max_context!r}; give a positive number of tokens")
    if max_context >= 1 << 31:
        raise ValueError(
            f"max_context is {max_context}; positions are 32 bit, so give less than {1 << 31}"
        )


def _report(name: str, chosen: Preset, max_context: int | None) -> Report:
    options = dict(chosen.to_json())
    return Report(name, options.pop("preset"), options, max_context=max_context)


def normalise(program: ExportedProgram) -> tuple[fx.GraphModule, list[Declined]]:
    """The normal form of a program: weights as attributes, one node an attention."""
    result = unlift(program)
    module, declined = result.graph, list(result.declined)
    if declined:
        raise NotRewritten("the program keeps state of its own", declined)
    verify(module, "unlift")
    for run in NORMALISE:
        result = run(module)
        module = result.graph
        declined += result.declined
        verify(module, run.__name__)
        debug(2, lambda r=run, m=module: f"# after {r.__name__}\n{m.code}")  # type: ignore[misc]
    return module, declined


def _stops(captured: Captured, module: fx.GraphModule, classified: Classified) -> list[Declined]:
    """What stops a step besides masks: mixed tokens on the way to the logits, fixed lengths."""
    stops = [*find_branches(captured.program), *decline_step(module, classified)]
    token = classified.extents.token
    if token.is_Integer or classified.extents.batch.is_Integer:
        stops.append(
            Declined("the batch or the token axis has a fixed size", str(token), "capture")
        )
    for symbol, bounds in captured.program.range_constraints.items():
        # torch.export assumes sizes of at least 2; the self-check covers single tokens and rows.
        if symbol in (token, classified.extents.batch) and bounds.lower > 2:
            stops.append(
                Declined(
                    f"the forward branches on its sizes: it was traced for at least {bounds.lower} "
                    "tokens or rows only",
                    str(symbol),
                    "capture",
                )
            )
    return stops


def _limit(
    captured: Captured, classified: Classified, max_context: int | None
) -> tuple[int | None, str]:
    """The longest context for which every table the model reads has a row."""
    limits = [(b.limit, f"the table read by {b.node} ends there") for b in classified.bounds]
    bounds = captured.program.range_constraints.get(classified.extents.token)
    if bounds is not None and bounds.upper.is_Integer:
        limits.append((int(bounds.upper), "the forward accepts no more tokens"))
    if max_context is not None:
        limits.append((max_context, "max_context"))
    return min(limits, default=(None, ""), key=lambda pair: pair[0])


def _with_pages(
    program: Program,
    module: fx.GraphModule,
    classified: Classified,
    sites: list[Site],
    memories: Mapping[str, Memory],
) -> Program:
    """The program on references, every state replaced by pages that are all read."""
    plain = {
        name: memory if memory.exact else Memory("dense", Pages(memory.page_size))
        for name, memory in memories.items()
    }
    step = remember(module, classified, sites, plain)
    layouts = tuple(layout_of(site, plain[site.name]) for site in sites)
    return replace(program, dense=step.dense, policy=step.policy, layouts=layouts)


def _refusal(name: str, sites: list[Site]) -> str:
    if sites:
        return f"{name}: {len(sites)} attentions were found, but no step can be derived"
    return (
        f"{name}: no attention was rewritten. Looked for scaled_dot_product_attention calls and "
        "for matmul - scale - mask - softmax - matmul, causal or with a sliding window"
    )


def vocabulary(module: fx.GraphModule, classified: Classified) -> int:
    """Rows of the table that the tokens index."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, given = argument(node, "weight"), argument(node, "indices")
            indices = classified.values.get(given)
            if isinstance(indices, Value) and indices.kind is Kind.LOCAL:
                return int(table.meta["val"].shape[0])
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    return int(output.args[0].meta["val"].shape[-1])


def _graph_forward(program: ExportedProgram) -> Callable[..., Tensor]:
    """The program as it was given, before any pass that the self-check has to answer for."""
    module = unlift(program).graph

    def forward(*inputs: Tensor) -> Tensor:
        result: Tensor = module(*inputs)
        return result

    return forward


def _device(module: fx.GraphModule) -> torch.device:
    device: torch.device = next(iter(module.graph.nodes)).meta["val"].device
    return device
