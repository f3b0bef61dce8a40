"""`memcompile inspect MODEL`: its attentions, and what each policy would make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..arguments import parse_policies
from ..exit_codes import NOT_REWRITTEN
from ..progress import doing
from . import options
from .options import Source
from .output import show, show_json

if TYPE_CHECKING:
    from ..report import Report


@click.command()
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="POLICY",
    help="A policy to show; may be repeated. [default: each, without options]",
)
@options.source()
@options.as_json
@options.quiet
def inspect(source: Source, policies: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Show MODEL's attentions and what each policy would make of them; write nothing."""
    from ...models.memory import PRESETS, Mixture
    from ..capture import capture
    from ..pipeline import build_captured
    from ..policy_file import choose
    from ..report import comparison

    wanted = parse_policies(policies) or {
        # A mixture is of other policies: without them it is dense.
        name: (name, {})
        for name, kind in PRESETS.items()
        if kind is not Mixture
    }

    with doing("load"):
        loaded = source.load()
    with doing("capture"):
        captured = capture(loaded.model, max_context=source.max_context)
    captured.name = source.name
    reports: dict[str, Report] = {}
    refused = False
    for name, (kind, chosen) in wanted.items():
        with doing(name):
            compiled = build_captured(
                captured,
                choose(kind, chosen),
                max_context=source.max_context,
                strict=False,
                check=False,
                kernels="off",  # nothing is run
            )
        reports[name] = compiled.report
        refused |= compiled.program is None
    if as_json:
        show_json({name: report.to_json() for name, report in reports.items()})
    elif not quiet:
        show(comparison(reports))
    if refused:
        raise click.exceptions.Exit(NOT_REWRITTEN)
