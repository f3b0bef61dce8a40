"""`memcompile MODEL`: build with a policy, check, write a folder."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..arguments import policy_options, split_spec
from ..export.formats import FORMATS, known_formats
from ..progress import doing
from ..settings import kernels as kernels_setting
from . import options
from .files import default_name
from .options import Source
from .output import show, show_json


@click.command(hidden=True)
@click.option(
    "--policy",
    default="scout",
    show_default=True,
    metavar="POLICY",
    help="A policy's name, as in scout:budget=512, or the file of a fitted one.",
)
@click.option("--budget", type=int, metavar="N", help="Tokens a query reads: --set budget=N.")
@options.settings
@click.option(
    "--target",
    "targets",
    metavar="TARGET,...",
    help="GPUs to compile kernels for, present or not, as in cuda:sm_90,hip:gfx942.",
)
@click.option(
    "--out",
    type=options.PATH,
    metavar="DIR",
    help="Folder to write; MODEL.POLICY in the current one if not given.",
)
@click.option(
    "--emit",
    metavar="FORMATS",
    help=f"Export it as well, as one or several of {', '.join(FORMATS)}.",
)
@click.option("--force", is_flag=True, help="Replace DIR if an earlier build left it.")
@click.option("--dry-run", is_flag=True, help="Build and check, report, write nothing.")
@click.option("--no-strict", is_flag=True, help="Go on although nothing could be rewritten.")
@options.kernels
@options.source()
@options.as_json
@options.quiet
def build(
    source: Source,
    policy: str,
    budget: int | None,
    settings: tuple[str, ...],
    targets: str | None,
    out: Path | None,
    emit: str | None,
    force: bool,
    dry_run: bool,
    no_strict: bool,
    kernels: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build MODEL with a policy and write the result to a folder."""
    policy, fields = split_spec(policy)
    chosen = policy_options(
        policy, [*fields, *settings], budget=budget, max_context=source.max_context
    )
    target = out or Path(default_name(source.path, policy))
    formats = known_formats([name.strip() for name in emit.split(",")] if emit is not None else [])
    from ..manifest import listed
    from ..package import check_target, write, write_refusal
    from ..pipeline import build as build_model
    from ..report import stage

    if targets is not None:
        from ...codegen.triton.workers import check_compiler
        from ..export.targets import compile_targets, figures, parse_targets

        chosen_targets = parse_targets(targets)
        check_compiler()
    if not dry_run:
        check_target(target, force)

    timings: dict[str, float] = {}
    with stage(timings, "load"):
        loaded = source.load()
    compiled = build_model(
        loaded.model, policy, strict=not no_strict, kernels=kernels, name=source.name, **chosen
    )
    report = compiled.report
    report.timings = {**timings, **report.timings}
    refused = compiled.program is None
    binaries = []
    if targets is not None and refused:
        report.notes.append("no kernels were compiled: nothing was rewritten")
    elif targets is not None:
        started = time.perf_counter()
        required = kernels_setting(kernels) == "required"
        binaries = compile_targets(compiled, chosen_targets, required=required)
        report.lowered.targets = figures(binaries)
        report.timings["targets"] = time.perf_counter() - started
    if not dry_run:
        with doing("write"):
            if refused:
                write_refusal(target, report, force=force)
            else:
                write(
                    target,
                    compiled,
                    source=loaded.path,
                    force=force,
                    emit=formats,
                    binaries=binaries,
                )
    if as_json:
        show_json(report.to_json())
        return
    if quiet:
        return
    show(report)
    held = f"wrote the report alone to {target}/" if refused else f"wrote {target}/"
    click.echo("nothing written: --dry-run" if dry_run else held)
    for artefact in [] if dry_run or refused else listed(target):
        click.echo(f"exported {artefact.format}: {target / artefact.folder / artefact.main}")
        for line in artefact.notes:
            click.echo(f"  {line}")
