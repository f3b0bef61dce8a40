"""`memcompile run DIR`: generate from a folder that memcompile wrote."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..arguments import BadInput, parse_ids
from . import options
from .files import read_text, tokenizer

if TYPE_CHECKING:
    from ...runtime.engine import Engine


@click.command()
@click.argument("folder", metavar="DIR", type=options.PATH)
@click.option("--prompt", metavar="TEXT", help="Text to go on from.")
@click.option("--prompt-file", metavar="FILE", type=options.PATH, help="Read it from FILE.")
@click.option("--ids", is_flag=True, help="The prompt is token ids, and so is what is printed.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--read",
    type=click.Choice(["policy", "dense"]),
    default="policy",
    show_default=True,
    help="Read the new tokens through the policy, or every page.",
)
@options.kernels
def run(
    folder: Path,
    prompt: str | None,
    prompt_file: Path | None,
    ids: bool,
    max_new_tokens: int,
    read: str,
    kernels: str | None,
) -> None:
    """Generate from a folder that `memcompile MODEL` wrote.

    The prompt is read densely, what is generated through the policy. The text goes to stdout, the
    figures to stderr.
    """
    if prompt is not None and prompt_file is None:
        text = prompt
    elif prompt_file is not None and prompt is None:
        text = read_text(prompt_file)
    else:
        raise BadInput("run: give one of --prompt TEXT and --prompt-file FILE")

    from ..package import open_engine

    engine = open_engine(folder, kernels=kernels)
    text_of = None if ids else tokenizer(folder)
    tokens = parse_ids(text) if text_of is None else text_of.encode(text).ids
    if not tokens:
        raise BadInput("run: the prompt holds no token")
    new, figures = _generate(engine, tokens, max_new_tokens, read)
    click.echo(" ".join(map(str, new)) if text_of is None else text_of.decode(new))
    click.echo(figures, err=True)


def _generate(
    engine: Engine, tokens: list[int], max_new_tokens: int, read: str
) -> tuple[list[int], str]:
    """The greedy continuation, and one line of figures about it."""
    import torch

    from ..report import bytes_of

    # The last token written is not read again.
    longest = len(tokens) + max_new_tokens - 1
    if engine.limit is not None and longest > engine.limit:
        raise BadInput(
            f"run: a prompt of {len(tokens)} tokens and {max_new_tokens} new ones exceed the "
            f"context of {engine.limit}; give a shorter prompt or fewer --max-new-tokens"
        )
    started = time.perf_counter()
    following = engine.prefill(torch.tensor([tokens]))[:, -1].argmax(-1, keepdim=True)
    prefilled = time.perf_counter()
    before = replace(engine.stats())
    step = engine if read == "policy" else engine.prefill
    new = [int(following)]
    while len(new) < max_new_tokens:
        following = step(following)[:, -1].argmax(-1, keepdim=True)
        new.append(int(following))
    seconds = time.perf_counter() - prefilled
    after = engine.stats()
    rate = f"{(len(new) - 1) / seconds:.1f} tokens/s, " if len(new) > 1 else ""
    pages, dense = after.pages_read - before.pages_read, after.pages_dense - before.pages_dense
    return new, (
        f"{len(tokens)} tokens read in {prefilled - started:.1f} s; {len(new)} written, {rate}"
        f"{pages} of {dense} pages and {bytes_of(after.bytes_read - before.bytes_read)} of "
        f"{bytes_of(after.bytes_dense - before.bytes_dense)} read"
    )
