"""`memcompile run DIR`: generate from a folder that memcompile wrote."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import settings
from ..arguments import BadInput, parse_ids
from ..progress import doing, note
from . import options
from .files import end_tokens, read_stdin, read_text, tokenizer
from .output import show_json
from .text_stream import TextStream, continue_text

if TYPE_CHECKING:
    from ...runtime.engine import Engine


@click.command()
@click.argument("folder", metavar="DIR", type=options.PATH)
@click.option("--prompt", metavar="TEXT", help="Text to go on from. [default: what stdin holds]")
@click.option(
    "--prompt-file", metavar="FILE", type=options.PATH, help="Read it from FILE; - is stdin."
)
@click.option("--ids", is_flag=True, help="The prompt is token ids, and so is what is printed.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--read",
    type=options.Choice(["policy", "dense"]),
    default="policy",
    show_default=True,
    help="Read the new tokens through the policy, or every page.",
)
@click.option("--temperature", type=float, metavar="T", help="Draw tokens at T. [default: greedy]")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K most probable.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the fewest that sum to P.")
@click.option("--min-p", type=float, metavar="P", help="Leave out what is P times less probable.")
@click.option("--repetition-penalty", type=float, metavar="X", help="Divide logits seen by X.")
@click.option("--seed", type=int, metavar="N", help="What the draws come from. [default: random]")
@click.option(
    "--stop", multiple=True, metavar="TEXT", help="End before this text; may be repeated."
)
@click.option(
    "--eos",
    multiple=True,
    metavar="ID",
    help="End at this token; may be repeated; none: at no token. [default: as DIR's files say]",
)
@click.option("--no-stream", is_flag=True, help="Print the text when it is whole.")
@options.kernels
@click.option("--json", "as_json", is_flag=True, help="Print text, ids and figures as JSON.")
@options.quiet
def run(
    folder: Path,
    prompt: str | None,
    prompt_file: Path | None,
    ids: bool,
    max_new_tokens: int,
    read: str,
    stop: tuple[str, ...],
    eos: tuple[str, ...],
    no_stream: bool,
    kernels: str | None,
    as_json: bool,
    quiet: bool,
    **sampling: float | int | None,
) -> None:
    """Generate from a folder that `memcompile MODEL` wrote.

    The prompt is read densely, what is generated through the policy. The text goes to stdout as it
    comes, the figures to stderr.
    """
    from ...runtime.sampling import Sampling
    from ..manifest import manifest_path
    from ..package import open_compiled

    drawn = {name: value for name, value in sampling.items() if value is not None}
    Sampling.of(**drawn)  # before anything slow
    if ids and stop:
        raise BadInput("--stop: is looked for in text, and --ids prints none")
    if not all(stop):
        raise BadInput("--stop: give a text, not an empty one")
    ends = _ends(eos)
    text = _prompt(prompt, prompt_file)
    manifest_path(folder)
    words = None if ids else tokenizer(folder)
    tokens = parse_ids(text) if words is None else words.encode(text).ids
    if not tokens:
        raise BadInput("run: the prompt holds no token")
    with doing("read"):
        compiled = open_compiled(folder, kernels=kernels)
    engine = compiled.engine()
    if settings.kernels(kernels) != "off":
        for reason in compiled.report.lowered.references:
            note(f"not generated: {reason}")
    if ends is None:
        # What lies beside a model may name tokens that this one does not have.
        ends = [end for end in end_tokens(folder, words) if end < engine.vocabulary]
    texts = None if words is None else TextStream(continue_text(words, tokens), stop)
    show = _nothing if no_stream or as_json else _show
    made = _generate(engine, tokens, max_new_tokens, texts, ends, show, read=read, **drawn)
    if as_json:
        show_json(made.to_json())
        return
    click.echo(made.shown if no_stream else "")
    if not quiet:
        click.echo(made.figures(), err=True)


def _prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise BadInput("run: give one of --prompt TEXT and --prompt-file FILE")
    if prompt is not None:
        return prompt
    if file is not None and str(file) != "-":
        return read_text(file)
    return read_stdin("run: give --prompt TEXT or --prompt-file FILE", wait=file is not None)


def _ends(eos: Sequence[str]) -> list[int] | None:
    """The tokens that --eos names; None if it is not given."""
    if not eos:
        return None
    if [*eos] == ["none"]:
        return []
    wrong = next((word for word in eos if not word.isdecimal()), None)
    if wrong is not None:
        raise BadInput(f"--eos: expected a token id, or none alone, got {wrong!r}")
    return [int(word) for word in eos]


@dataclass
class Made:
    """What was generated, and what that took.

    Attributes:
        prompt_tokens: tokens read before the first new one.
        ids: the new tokens, the one that ended the text included.
        text: of the tokens; None with --ids.
        ended: "eos", "stop", or "length" where --max-new-tokens did.
        prompt_seconds: until the first new token; `seconds`: from there to the last.
        pages_read, pages_dense, bytes_read, bytes_dense: by all new tokens but the last, and what
            dense reads for the same (see `runtime.engine.Stats`).
    """

    prompt_tokens: int
    ids: list[int]
    text: str | None
    ended: str
    prompt_seconds: float
    seconds: float
    pages_read: int
    pages_dense: int
    bytes_read: int
    bytes_dense: int

    @property
    def shown(self) -> str:
        return " ".join(map(str, self.ids)) if self.text is None else self.text

    @property
    def tokens_per_second(self) -> float | None:
        """None where one token was generated: it is the prompt's."""
        steps = len(self.ids) - 1
        return steps / self.seconds if steps and self.seconds else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}

    def figures(self) -> str:
        """One line for people."""
        from ..report import bytes_of

        rate = self.tokens_per_second
        shown = "" if rate is None else f"{rate:.1f} tokens/s, "
        return (
            f"{self.prompt_tokens} tokens read in {self.prompt_seconds:.1f} s; {len(self.ids)} "
            f"written, {shown}{self.pages_read} of {self.pages_dense} pages and "
            f"{bytes_of(self.bytes_read)} of {bytes_of(self.bytes_dense)} read"
        )


def _show(text: str) -> None:
    if text:
        click.echo(text, nl=False)


def _nothing(text: str) -> None:
    pass


def _generate(
    engine: Engine,
    tokens: list[int],
    max_new_tokens: int,
    texts: TextStream | None,
    ends: list[int],
    show: Callable[[str], None],
    **how: Any,
) -> Made:
    """Generates one sequence, and shows each piece as it comes."""
    import torch

    # The last token written is not read again.
    longest = len(tokens) + max_new_tokens - 1
    if engine.limit is not None and longest > engine.limit:
        raise BadInput(
            f"run: a prompt of {len(tokens)} tokens and {max_new_tokens} new ones exceed the "
            f"context of {engine.limit}; give a shorter prompt or fewer --max-new-tokens"
        )
    stream = engine.stream(torch.tensor([tokens]), max_new_tokens, eos=ends or None, **how)
    started = time.perf_counter()
    with doing(f"prompt of {len(tokens)} tokens"):
        token = int(next(stream))
    prompted = time.perf_counter()
    before = replace(engine.stats())
    new: list[int] = []
    pieces: list[str] = []

    def put(piece: str) -> None:
        pieces.append(piece)
        show(piece)

    while True:
        new.append(token)
        if texts is None:
            put(f" {token}" if pieces else str(token))
        elif token not in ends:
            put(texts.feed(token))
        if texts is not None and texts.stopped:
            break
        following = next(stream, None)
        if following is None:
            break
        token = int(following)
    ended = time.perf_counter()
    why = "eos" if token in ends else "length"
    if texts is not None:
        put(texts.rest())
        why = "stop" if texts.stopped else why
    after = engine.stats()
    return Made(
        len(tokens),
        new,
        None if texts is None else "".join(pieces),
        why,
        prompted - started,
        ended - prompted,
        after.pages_read - before.pages_read,
        after.pages_dense - before.pages_dense,
        after.bytes_read - before.bytes_read,
        after.bytes_dense - before.bytes_dense,
    )
