"""`memcompile distill MODEL`: fit the states of a policy to the attention they replace."""

from __future__ import annotations

from pathlib import Path

import click

from ..arguments import BadInput, parse_ids, policy_options, split_spec
from ..progress import doing
from . import options
from .files import default_name, read_text
from .options import Source
from .output import show, show_json


@click.command("distill")
@click.option(
    "--policy",
    default="hybrid",
    show_default=True,
    metavar="NAME[:FIELD=VALUE,...]",
    help="A policy that gives layers a state.",
)
@options.settings
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="FILE",
    type=options.PATH,
    help="Text to learn from; may be repeated.",
)
@click.option("--ids", is_flag=True, help="The text is token ids.")
@click.option(
    "--length",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens of a sequence.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=2, show_default=True, help="Sequences a step."
)
@click.option("--steps", type=click.IntRange(min=1), default=400, show_default=True)
@click.option(
    "--lr",
    type=click.FloatRange(min=0, min_open=True),
    default=0.02,
    show_default=True,
    help="Highest learning rate.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=25,
    show_default=True,
    metavar="N",
    help="Steps that a run which is killed loses at most.",
)
@click.option(
    "--out",
    type=options.PATH,
    metavar="FILE",
    help="Policy file to write; MODEL.POLICY.safetensors in the current folder if not given.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it is a policy file.")
@options.kernels
@options.source()
@options.as_json
@options.quiet
def distill(
    source: Source,
    policy: str,
    settings: tuple[str, ...],
    data: tuple[Path, ...],
    ids: bool,
    length: int,
    batch: int,
    steps: int,
    lr: float,
    seed: int,
    checkpoint_every: int,
    out: Path | None,
    force: bool,
    kernels: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit the states that a policy gives MODEL's layers to the attention they replace.

    The result is a policy file, which every --policy takes. An interrupted run is taken up again
    by the same command.
    """
    from ...models.memory import preset
    from ..policy_file import is_file

    policy, fields = split_spec(policy)
    if is_file(policy):
        raise BadInput(f"--policy {policy}: fitted already; give a policy by its name")
    chosen = policy_options(policy, [*fields, *settings], budget=None, max_context=None)
    if "max_context" in chosen:
        raise BadInput("distill: max_context is no field of a policy; give --max-context")
    from ..distill import Given, check_libraries, check_out, report
    from ..distill import distill as run_distillation

    target = out or Path(f"{default_name(source.path, policy)}.safetensors")
    check_libraries()
    check_out(target, force)
    text = "\n".join(read_text(path) for path in data)
    given = Given(
        preset(policy, **chosen),
        parse_ids(text) if ids else text,
        length,
        batch,
        steps,
        lr,
        seed,
        checkpoint_every,
        kernels,
    )
    with doing("load"):
        loaded = source.load()
    outcome = run_distillation(loaded, source.name, source.max_context, given, target)
    if as_json:
        show_json(outcome.to_json())
        return
    if quiet:
        return
    show(report(outcome))
    for operation, why in outcome.references.items():
        click.echo(f"not generated: {operation}: {why}")
    click.echo(f"wrote {', '.join(str(path) for path in outcome.files)}")
