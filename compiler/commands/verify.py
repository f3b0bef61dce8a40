"""`memcompile verify DIR`: exported engines against eager."""

from __future__ import annotations

from pathlib import Path

import click

from ..exit_codes import DIFFERS, NONE_RAN
from ..export.formats import known_formats
from . import options
from .output import show, show_json


@click.command()
@click.argument("folder", metavar="DIR", type=options.PATH)
@click.option("--only", metavar="FORMATS", help="Run these. [default: every one in DIR]")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1, 1 << 20),
    metavar="N",
    help="Tokens of the random prompt. [default: enough for every memory to leave some out]",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 1 << 20),
    default=64,
    show_default=True,
    metavar="N",
    help="Tokens generated after it.",
)
@click.option(
    "--trust-native",
    is_flag=True,
    help="Run AOTInductor packages although native code can do anything.",
)
@options.as_json
@options.quiet
def verify(
    folder: Path,
    only: str | None,
    prompt_tokens: int | None,
    steps: int,
    trust_native: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the engines that --emit exported to DIR, and compare them with eager.

    What runs on this machine is driven by its state.json alone, one sequence and then three, in odd
    chunks and then token by token. The manifest takes down what was found.

    Ends with 0 if what ran is eager's equal, 5 if an engine is not, and 6 if none of them runs
    here: then nothing was verified.
    """
    from ..export.verify import table, verify

    formats = known_formats([name.strip() for name in only.split(",")] if only is not None else [])
    verdicts = verify(folder, formats, prompt=prompt_tokens, steps=steps, trust_native=trust_native)
    left = [verdict for verdict in verdicts if verdict.outcome == "not run"]
    if as_json:
        show_json({"engines": [verdict.to_json() for verdict in verdicts]})
    elif not quiet:
        show(table(verdicts))
        if left:
            click.echo(f"not verified, since not run here: {', '.join(v.format for v in left)}")
    if any(verdict.outcome == "differs" for verdict in verdicts):
        raise click.exceptions.Exit(DIFFERS)
    if len(left) == len(verdicts):
        why = "; ".join(f"{verdict.format}: {verdict.reason}" for verdict in left)
        click.echo(f"memcompile: nothing was verified, as no engine ran here ({why})", err=True)
        raise click.exceptions.Exit(NONE_RAN)
