"""`memcompile verify DIR`: exported engines against eager."""

from __future__ import annotations

from pathlib import Path

import click

from ..exit_codes import DIFFERS
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
    """
    from ..export.verify import table, verify

    formats = known_formats([name.strip() for name in only.split(",")] if only is not None else [])
    verdicts = verify(folder, formats, prompt=prompt_tokens, steps=steps, trust_native=trust_native)
    if as_json:
        show_json({"engines": [verdict.to_json() for verdict in verdicts]})
    elif not quiet:
        show(table(verdicts))
    if any(verdict.outcome == "differs" for verdict in verdicts):
        raise click.exceptions.Exit(DIFFERS)
