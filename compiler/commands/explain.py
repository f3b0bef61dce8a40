"""`memcompile explain MODEL`: what was rewritten, what was not and why; a script, a drawing."""

from __future__ import annotations

from pathlib import Path

import click

from ..arguments import BadInput, policy_options, split_spec
from ..exit_codes import NOT_REWRITTEN
from ..progress import doing
from . import options
from .options import Source
from .output import show, show_json


@click.command()
@click.option(
    "--policy",
    default="scout",
    show_default=True,
    metavar="POLICY",
    help="A policy's name, as in scout:budget=512, or the file of a fitted one.",
)
@options.settings
@click.option("--check", is_flag=True, help="Check the step against the model's own forward, too.")
@click.option(
    "--repro",
    type=options.PATH,
    metavar="FILE.py",
    help="Write a script that shows what was declined by itself, with random weights.",
)
@click.option(
    "--dump-graph",
    type=options.PATH,
    metavar="FILE.svg",
    help="Draw the graph around it.",
)
@click.option(
    "--site", metavar="NAME", help="The attention to cut or draw around, instead of a decline."
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@options.source()
@options.as_json
@options.quiet
def explain(
    source: Source,
    policy: str,
    settings: tuple[str, ...],
    check: bool,
    repro: Path | None,
    dump_graph: Path | None,
    site: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what a policy makes of each attention of MODEL, and why not of the others."""
    policy, fields = split_spec(policy)
    chosen = policy_options(
        policy, [*fields, *settings], budget=None, max_context=source.max_context
    )
    if site is not None and repro is None and dump_graph is None:
        raise BadInput("explain: --site says where --repro or --dump-graph cut; give one of them")
    if repro is not None and repro == dump_graph:
        raise BadInput(f"explain: --repro and --dump-graph both name {repro}; give two files")
    for path in (repro, dump_graph):
        if path is not None:
            _check_file(path, force)

    from ..explain import explain as run

    with doing("load"):
        loaded = source.load()
    report = run(
        loaded.model,
        policy=policy,
        repro=repro,
        dump_graph=dump_graph,
        site=site,
        check=check,
        kernels="off",  # nothing is run but the check
        name=source.name,
        **chosen,
    )
    if as_json:
        show_json(report.to_json())
    elif not quiet:
        show(report)
    if not report.memories:
        raise click.exceptions.Exit(NOT_REWRITTEN)


def _check_file(path: Path, force: bool) -> None:
    """Refuses a file that must not be written, before the work.

    Raises:
        FileNotFoundError, FileExistsError, IsADirectoryError: its folder is missing; it is there.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist; make it first")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: already exists and is kept; give --force to replace it")
