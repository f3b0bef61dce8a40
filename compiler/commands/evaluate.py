"""`memcompile eval`: what policies cost in quality, against dense on the same prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..arguments import BadInput, nearest, parse_numbers, parse_policies
from ..progress import doing, note
from . import options
from .files import default_name
from .options import Source
from .output import show, show_json

if TYPE_CHECKING:
    from ..evaluate import Outcome, Subject


@click.command("eval")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME[:FIELD=VALUE,...]",
    help="A policy to compare with dense; may be repeated. [default: the one DIR was built with]",
)
@click.option("--tasks", metavar="NAME,...", help="[default: all that the wording has]")
@click.option("--lengths", metavar="N,...", default="4096", show_default=True)
@click.option("--depths", metavar="SHARE,...", default="0.1,0.3,0.5,0.7,0.9", show_default=True)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Prompts for each task, length and depth.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Tokens scored at the end of each window of the text loss.",
)
@click.option(
    "--text",
    multiple=True,
    metavar="FILE",
    type=options.PATH,
    help="Text for filler and text loss; may be repeated.",
)
@click.option("--wording", metavar="NAME", help="bytes or natural. [default: by the tokenizer]")
@click.option(
    "--start", type=int, metavar="ID", help="First token, for models without a tokenizer.json."
)
@click.option(
    "--out",
    type=options.PATH,
    metavar="DIR",
    help="Folder to write, or to go on with; MODEL.eval in the current one if not given.",
)
@options.kernels
@options.source("MODEL_OR_DIR")
@options.as_json
@options.quiet
def evaluate(
    source: Source,
    policies: tuple[str, ...],
    tasks: str | None,
    lengths: str,
    depths: str,
    samples: int,
    seed: int,
    stride: int,
    text: tuple[Path, ...],
    wording: str | None,
    start: int | None,
    out: Path | None,
    kernels: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure what policies cost in quality, against dense on the same prompts.

    The context is read densely, question and answer through the policy. An interrupted run is
    taken up again by the same command.
    """
    from ...evaluation.tasks import TASKS
    from ...evaluation.text_loss import NAME as TEXT_LOSS
    from ...evaluation.wordings import PROFILES

    chosen = parse_policies(policies)
    known = [*TASKS, TEXT_LOSS]
    wanted = [task.strip() for task in tasks.split(",")] if tasks is not None else None
    for task in wanted or ():
        if task not in known:
            raise BadInput(f"--tasks: unknown task {task!r}{nearest(task, known)}")
    if wording is not None and wording not in PROFILES:
        raise BadInput(f"--wording: unknown wording {wording!r}{nearest(wording, PROFILES)}")
    from ..evaluate import Given, check_libraries, package_subject, report, subject_of
    from ..evaluate import evaluate as run_evaluation
    from ..manifest import is_package

    given = Given(
        chosen,
        None if wanted is None else tuple(wanted),
        parse_numbers("--lengths", lengths, int),
        parse_numbers("--depths", depths, float),
        samples,
        seed,
        stride,
        text,
        wording,
        start,
        kernels,
    )
    check_libraries()
    folder = out or Path(default_name(source.path, "eval"))
    packaged = is_package(source.path)
    if packaged:
        unused = {
            "--arch": source.arch,
            "--arch-config": source.arch_config,
            "--dtype": source.dtype,
            "--max-context": source.max_context,
        }
        for flag, value in unused.items():
            if value is not None:
                raise BadInput(f"{flag} goes with a model; {source.path} was compiled already")
        subject = package_subject(source.path)
    else:
        with doing("load"):
            loaded = source.load()
        subject = subject_of(loaded, source.name, source.max_context)
    outcome = run_evaluation(subject, given, folder)
    if packaged:
        _keep(source.path, outcome, subject, folder)
    if as_json:
        show_json(outcome.to_json())
        return
    if quiet:
        return
    show(report(outcome))
    click.echo(f"wrote {', '.join(sorted(path.name for path in outcome.files))} to {folder}/")


def _keep(package: Path, outcome: Outcome, subject: Subject, folder: Path) -> None:
    """The rows go into the model's own report, too; where that cannot be written they are only in
    `folder`, and it is said."""
    from ..results import Quality, keep

    assert subject.preset is not None
    try:
        keep(package, Quality.of(outcome, subject.preset.to_json(), folder))
    except OSError as error:
        note(f"{package}/report.html stays as it was: {error.strerror or error}")
