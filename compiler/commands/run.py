"""`memcompile run DIR`: generate from a folder that memcompile wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import settings
from ..arguments import BadInput, parse_ids
from ..progress import doing, note
from . import options
from .files import end_tokens, read_stdin, read_text, tokenizer
from .generation import generate
from .output import show_json
from .text_stream import TextStream, continue_text

if TYPE_CHECKING:
    from ...runtime.generate import Runner
    from ...runtime.stats import Stats

RUNTIMES = ("engine", "onnxruntime")


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
@click.option(
    "--runtime",
    type=options.Choice(RUNTIMES),
    default=RUNTIMES[0],
    show_default=True,
    help="What runs it: our own engine, or the exported ONNX model under onnxruntime.",
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
    runtime: str,
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

    drawn = {name: value for name, value in sampling.items() if value is not None}
    Sampling.of(**drawn)  # before anything slow
    if ids and stop:
        raise BadInput("--stop: is looked for in text, and --ids prints none")
    if runtime != "engine" and kernels is not None:
        raise BadInput(f"--kernels: are our engine's, and --runtime {runtime} runs none of them")
    if not all(stop):
        raise BadInput("--stop: give a text, not an empty one")
    ends = _ends(eos)
    text = _prompt(prompt, prompt_file)
    manifest_path(folder)
    words = None if ids else tokenizer(folder)
    tokens = parse_ids(text) if words is None else words.encode(text).ids
    if not tokens:
        raise BadInput("run: the prompt holds no token")
    runner: Runner
    count: Callable[[], Stats] | None = None
    if runtime == "engine":
        runner, count = _engine(folder, kernels)
    else:
        runner = _onnx(folder, read)
    if ends is None:
        # What lies beside a model may name tokens that this one does not have.
        ends = [end for end in end_tokens(folder, words) if end < runner.vocabulary]
    texts = None if words is None else TextStream(continue_text(words, tokens), stop)
    show = _nothing if no_stream or as_json else _show
    how: dict[str, Any] = {"read": read, **drawn}
    made = generate(runner, count, tokens, max_new_tokens, texts, ends, show, **how)
    if as_json:
        show_json(made.to_json())
        return
    click.echo(made.shown if no_stream else "")
    if not quiet:
        click.echo(made.figures(), err=True)


def _engine(folder: Path, kernels: str | None) -> tuple[Runner, Callable[[], Stats]]:
    from ..package import open_compiled

    with doing("read"):
        compiled = open_compiled(folder, kernels=kernels)
    engine = compiled.engine()
    if settings.kernels(kernels) != "off":
        for reason in compiled.report.lowered.references:
            note(f"not generated: {reason}")
    return engine, engine.stats


def _onnx(folder: Path, read: str) -> Runner:
    from ..export.onnx_session import PREFILL, open_session

    with doing("read"):
        session = open_session(folder)
    if read == "dense" and not session.reads_densely:
        raise BadInput(
            f"--read dense: this engine was exported without {PREFILL}, a model that reads "
            "densely; leave it out, or give --runtime engine"
        )
    return session


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


def _show(text: str) -> None:
    if text:
        click.echo(text, nl=False)


def _nothing(text: str) -> None:
    pass
