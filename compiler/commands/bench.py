"""`memcompile bench`: the time of a decode step, beside the dense read of it."""

from __future__ import annotations

from pathlib import Path

import click

from ..arguments import BadInput, parse_numbers
from . import options
from .files import absolute
from .output import show, show_json


@click.command()
@click.argument("folder", metavar="DIR", type=options.PATH)
@click.option(
    "--contexts",
    metavar="N,...",
    help="Tokens in reach of a step. [default: of 1024,4096,16384,65536 what there is room for]",
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=15,
    show_default=True,
    help="Steps that are timed at each context, policy and dense in turn.",
)
@click.option(
    "--fill",
    type=click.Choice(["random", "prefill"]),
    default="random",
    show_default=True,
    help="Write random keys and values into the memory, or let the model read random tokens.",
)
@click.option(
    "--prefill",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of the prefill that is timed.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Measure and print; write nothing.")
@options.kernels
@options.as_json
@options.quiet
def bench(
    folder: Path,
    contexts: str | None,
    rounds: int,
    fill: str,
    prefill: int,
    seed: int,
    dry_run: bool,
    kernels: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time decode steps of a folder that `memcompile MODEL` wrote.

    Policy and dense steps alternate at each context. The figures go to bench.json and report.html
    in DIR.
    """
    from ..bench import Given, measure
    from ..bench_result import table
    from ..results import check_writable, keep

    wanted = None if contexts is None else parse_numbers("--contexts", contexts, int)
    try:
        given = Given(wanted, rounds, prefill, fill, seed, kernels)
    except ValueError as error:
        raise BadInput(f"--contexts: {error}") from None
    if not dry_run:
        check_writable(folder)
    words = [f"--contexts {contexts}"] if contexts is not None else []
    changed = (("rounds", rounds, 15), ("fill", fill, "random"), ("prefill", prefill, 512))
    for name, value, usual in (*changed, ("seed", seed, 0), ("kernels", kernels, None)):
        words += [f"--{name} {value}"] if value != usual else []
    command = " ".join(["memcompile bench", absolute(folder).name, *words])
    measured = measure(folder, given, command)
    if not dry_run:
        keep(folder, measured)
    if as_json:
        show_json(measured.to_json())
        return
    if quiet:
        return
    show(table(measured))
    written = f"wrote bench.json and report.html in {folder}/"
    click.echo("nothing written: --dry-run" if dry_run else written)
