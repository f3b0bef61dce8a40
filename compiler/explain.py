"""Explain: what a policy would make of a model, and what it reads of given tokens."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from ..models.memory import Policy
from ..passes.classify_tokens import classify_tokens
from ..passes.result import Declined, NotRewritten
from .pipeline import Compiled, build
from .policy_file import check_named
from .report import Report, bytes_of

if TYPE_CHECKING:
    from .region import Graph

_READING = ("trust_pickle", "arch", "arch_config", "dtype")


def explain(
    model: nn.Module | ExportedProgram | str | PathLike[str],
    tokens: Tensor | None = None,
    policy: Policy | str | PathLike[str] = "scout",
    *,
    repro: str | PathLike[str] | None = None,
    dump_graph: str | PathLike[str] | None = None,
    site: str | None = None,
    **options: Any,
) -> Report:
    """What was rewritten, what was not and why; nothing that is declined raises.

    Args:
        tokens: int64 ``[B, n]``. When given they are run twice, densely and through the policy,
            and the report notes what was read and how often both expect the same next token.
        policy: name or file of a policy, with `options` for its fields, or a `Policy`; `options`
            are also those of `build`. With ``check=True`` a self-check that fails is among the
            declines.
        repro: file to write: a script that shows the first decline, or the attention `site`, by
            itself (see `compiler.repro`).
        dump_graph: file to write: a drawing of the graph around it, as SVG (see `compiler.draw`).
        site: name of an attention, as the report has it.

    Raises:
        ValueError: an unknown policy, option or site, tokens of another shape or type, or nothing
            that could be drawn or written.
        FileNotFoundError: `model` is a path, and nothing is there.
    """
    if site is not None and repro is None and dump_graph is None:
        raise ValueError(f"site={site!r} says where repro= or dump_graph= cut; give one of them")
    if repro is not None and isinstance(policy, Policy):
        check_named(policy, "a script", "leave repro= out, or give a policy by its name")
    given: dict[str, Any] = {"strict": False, "check": False, **options}
    if tokens is None and not given["check"]:
        given["kernels"] = "off"  # nothing is run
    if isinstance(model, str | PathLike):  # read once, though it may be built twice
        from .load import load

        path = Path(model)
        reading = {key: given.pop(key) for key in _READING if key in given}
        model = load(path, **reading).model
        given["name"] = given.get("name") or path.name
    mismatch: list[Declined] = []
    try:
        compiled = build(model, policy, **given)
    except NotRewritten as refused:
        if not given["check"]:
            raise
        mismatch = refused.declined
        compiled = build(model, policy, **{**given, "check": False})
        compiled.report.declined += mismatch
    if repro is not None or dump_graph is not None:
        graph = _graph(compiled)
        if repro is not None:
            from .repro import write_repro

            what = write_repro(repro, graph, compiled.preset, site, next(iter(mismatch), None))
            compiled.report.notes.append(f"{repro}: {what}")
        if dump_graph is not None:
            from .draw import write_drawing

            what = write_drawing(dump_graph, graph, site)
            compiled.report.notes.append(f"{dump_graph}: {what}")
    if tokens is not None and compiled.program is not None:
        compiled.report.notes.append(_read(compiled, tokens))
    return compiled.report


def _read(compiled: Compiled, tokens: Tensor) -> str:
    """What the policy read of the tokens, and how often it agrees with dense."""
    dense, through = compiled.engine(), compiled.engine()
    expected = dense.prefill(tokens, all_logits=True).argmax(-1)
    agreed = (through(tokens).argmax(-1) == expected).double().mean().item()
    read = through.stats()
    return (
        f"{tokens.numel()} tokens read {read.pages_read} of {read.pages_dense} pages and "
        f"{bytes_of(read.bytes_read)} of {bytes_of(read.bytes_dense)} (index included); the next "
        f"token is dense's at {agreed:.1%} of them"
    )


def _graph(compiled: Compiled) -> Graph:
    """The normal form that the pipeline worked on, made again: it is not kept."""
    from .pipeline import normalise, vocabulary
    from .region import Graph

    if compiled.captured is None:
        (declined, *_) = compiled.declined
        raise ValueError(
            f"the model was not captured, so there is no graph to cut or draw: {declined.reason}"
        )
    try:
        module, _ = normalise(compiled.captured.program)
    except NotRewritten as refused:
        raise ValueError(f"there is no normal form to cut or draw: {refused}") from refused
    classified = classify_tokens(module)
    rows = vocabulary(module, classified)
    return Graph(module, classified, compiled.sites, compiled.declined, rows)
