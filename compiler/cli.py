"""The command line: `memcompile MODEL` builds, and what else there is to do with a model."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from .arguments import (
    BadInput,
    nearest,
    parse_ids,
    parse_numbers,
    parse_policies,
    policy_options,
    split_spec,
)
from .settings import KERNELS

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from .load import Loaded
    from .report import Report

OK, INTERNAL, BAD_INPUT, NOT_REWRITTEN, READ_TOO_MUCH = 0, 1, 2, 3, 4


class Commands(click.Group):
    """A group whose first argument, when it is no command, is the model that `build` builds."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["build", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage("memcompile", "MODEL [OPTIONS]")
        formatter.write_usage("memcompile", "inspect MODEL [OPTIONS]", prefix="       ")
        formatter.write_usage("memcompile", "run DIR [OPTIONS]", prefix="       ")
        formatter.write_usage("memcompile", "eval MODEL_OR_DIR [OPTIONS]", prefix="       ")
        formatter.write_usage("memcompile", "distill MODEL --data FILE", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands["build"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def _loading(command: Any) -> Any:
    """Options that say how MODEL is read; the same for every command that reads one."""
    options = (
        click.option(
            "--arch",
            metavar="MODULE:CLASS",
            help="Class to load a state dict into. Its module is imported.",
        ),
        click.option(
            "--arch-config",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="JSON file with the keyword arguments of that class.",
        ),
        click.option(
            "--trust-pickle",
            is_flag=True,
            help="Unpickle the file although a pickle can run any code.",
        ),
        click.option(
            "--max-context",
            type=int,
            metavar="N",
            help="Context that length-dependent position tables are resolved for.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
    )
    for option in reversed(options):
        command = option(command)
    return command


_kernels = click.option(
    "--kernels",
    type=click.Choice(KERNELS),
    help="auto: generate kernels, and say so where that fails; required: fail then; off: run "
    "reference operations. [default: $MEMCOMPILE_KERNELS, or auto]",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """Give a dense attention model a memory.

    MODEL is a transformers folder, a .pt2 or .pt file. The result is a folder with a manifest, the
    weights and a report.
    """


_settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a field of the policy; may be repeated.",
)


@commands.command(hidden=True)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    default="scout",
    show_default=True,
    metavar="POLICY",
    help="A policy's name, as in scout:budget=512, or the file of a fitted one.",
)
@click.option("--budget", type=int, metavar="N", help="Tokens a query reads: --set budget=N.")
@_settings
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write; MODEL.POLICY in the current one if not given.",
)
@click.option("--force", is_flag=True, help="Replace DIR if an earlier build left it.")
@click.option("--dry-run", is_flag=True, help="Build and check, report, write nothing.")
@click.option("--no-strict", is_flag=True, help="Go on although nothing could be rewritten.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@_kernels
@_loading
def build(
    model: Path,
    policy: str,
    budget: int | None,
    settings: tuple[str, ...],
    out: Path | None,
    force: bool,
    dry_run: bool,
    no_strict: bool,
    quiet: bool,
    kernels: str | None,
    arch: str | None,
    arch_config: Path | None,
    trust_pickle: bool,
    max_context: int | None,
    as_json: bool,
) -> None:
    """Build MODEL with a policy and write the result to a folder."""
    policy, fields = split_spec(policy)
    options = policy_options(policy, [*fields, *settings], budget=budget, max_context=max_context)
    target = out or Path(default_name(model, policy))
    from .package import check_target, write
    from .pipeline import build as build_model

    if not dry_run:
        check_target(target, force)

    loaded, seconds = _load(model, arch, arch_config, trust_pickle)
    name = _absolute(model).name
    compiled = build_model(
        loaded.model, policy, strict=not no_strict, kernels=kernels, name=name, **options
    )
    report = compiled.report
    report.timings = {"load": seconds, **report.timings}
    written = not dry_run and compiled.program is not None
    if written:
        write(target, compiled, source=loaded.tokenizer, force=force)
    if quiet:
        return
    _show(report, as_json)
    if not as_json:
        why = "--dry-run" if dry_run else "there is no step graph"
        click.echo(f"wrote {target}/" if written else f"nothing written: {why}")


@commands.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="POLICY",
    help="A policy to show; may be repeated. [default: each, without options]",
)
@_loading
def inspect(
    model: Path,
    policies: tuple[str, ...],
    arch: str | None,
    arch_config: Path | None,
    trust_pickle: bool,
    max_context: int | None,
    as_json: bool,
) -> None:
    """Show MODEL's attentions and what each policy would make of them; write nothing."""
    from ..models.memory import PRESETS, Mixture
    from .capture import capture
    from .pipeline import build_captured
    from .policy_file import choose
    from .report import comparison

    wanted = parse_policies(policies) or {
        # A mixture is of other policies: without them it is dense.
        name: (name, {})
        for name, kind in PRESETS.items()
        if kind is not Mixture
    }

    loaded, _ = _load(model, arch, arch_config, trust_pickle)
    captured = capture(loaded.model, max_context=max_context)
    captured.name = _absolute(model).name
    reports: dict[str, Report] = {}
    refused = False
    for name, (kind, options) in wanted.items():
        compiled = build_captured(
            captured,
            choose(kind, options),
            max_context=max_context,
            strict=False,
            check=False,
            kernels="off",  # nothing is run
        )
        reports[name] = compiled.report
        refused |= compiled.program is None
    if as_json:
        _print_json({name: report.to_json() for name, report in reports.items()})
    else:
        _print(comparison(reports))
    if refused:
        raise click.exceptions.Exit(NOT_REWRITTEN)


def default_name(model: Path, policy: str) -> str:
    """`model.pt` -> `model.scout`; a folder keeps its whole name, dots included. A policy file
    gives its name without the suffix."""
    from .policy_file import policy_name

    path = _absolute(model)
    known = (".pt", ".pt2", ".pth", ".bin", ".ckpt", ".safetensors")
    stem = path.stem if path.suffix in known and not path.is_dir() else path.name
    return f"{stem}.{policy_name(policy)}"


def _absolute(path: Path) -> Path:
    """`path` from the root, with the name that was given: links (a hub's are digests) stay."""
    return Path(os.path.abspath(path))


@commands.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEXT", help="Text to go on from.")
@click.option(
    "--prompt-file", metavar="FILE", type=click.Path(path_type=Path), help="Read it from FILE."
)
@click.option("--ids", is_flag=True, help="The prompt is token ids, and so is what is printed.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--read",
    type=click.Choice(["policy", "dense"]),
    default="policy",
    show_default=True,
    help="Read the new tokens through the policy, or every page.",
)
@_kernels
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
        text = _read_text(prompt_file)
    else:
        raise BadInput("run: give one of --prompt TEXT and --prompt-file FILE")

    from .package import open_engine

    engine = open_engine(folder, kernels=kernels)
    tokenizer = None if ids else _tokenizer(folder)
    tokens = parse_ids(text) if tokenizer is None else tokenizer.encode(text).ids
    if not tokens:
        raise BadInput("run: the prompt holds no token")
    new, figures = _generate(engine, tokens, max_new_tokens, read)
    click.echo(" ".join(map(str, new)) if tokenizer is None else tokenizer.decode(new))
    click.echo(figures, err=True)


def _generate(
    engine: Engine, tokens: list[int], max_new_tokens: int, read: str
) -> tuple[list[int], str]:
    """The greedy continuation, and one line of figures about it."""
    import torch

    from .report import bytes_of

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


@commands.command("eval")
@click.argument("model", metavar="MODEL_OR_DIR", type=click.Path(path_type=Path))
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
    type=click.Path(path_type=Path),
    help="Text for filler and text loss; may be repeated.",
)
@click.option("--wording", metavar="NAME", help="bytes or natural. [default: by the tokenizer]")
@click.option(
    "--start", type=int, metavar="ID", help="First token, for models without a tokenizer.json."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to write, or to go on with; MODEL.eval in the current one if not given.",
)
@_kernels
@_loading
def evaluate(
    model: Path,
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
    arch: str | None,
    arch_config: Path | None,
    trust_pickle: bool,
    max_context: int | None,
    as_json: bool,
) -> None:
    """Measure what policies cost in quality, against dense on the same prompts.

    The context is read densely, question and answer through the policy. An interrupted run is
    taken up again by the same command.
    """
    from ..evaluation.tasks import TASKS
    from ..evaluation.text_loss import NAME as TEXT_LOSS
    from ..evaluation.wordings import PROFILES

    chosen = parse_policies(policies)
    known = [*TASKS, TEXT_LOSS]
    wanted = [task.strip() for task in tasks.split(",")] if tasks is not None else None
    for task in wanted or ():
        if task not in known:
            raise BadInput(f"--tasks: unknown task {task!r}{nearest(task, known)}")
    if wording is not None and wording not in PROFILES:
        raise BadInput(f"--wording: unknown wording {wording!r}{nearest(wording, PROFILES)}")
    from .evaluate import Given, check_libraries, package_subject, report, subject_of
    from .evaluate import evaluate as run_evaluation
    from .package import is_package

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
    folder = out or Path(default_name(model, "eval"))
    if is_package(model):
        unused = {"--arch": arch, "--arch-config": arch_config, "--max-context": max_context}
        for flag, value in unused.items():
            if value is not None:
                raise BadInput(f"{flag} goes with a model; {model} was compiled already")
        subject = package_subject(model)
    else:
        loaded, _ = _load(model, arch, arch_config, trust_pickle)
        subject = subject_of(loaded, _absolute(model).name, max_context)
    outcome = run_evaluation(subject, given, folder)
    if as_json:
        _print_json(outcome.to_json())
        return
    _print(report(outcome))
    click.echo(f"wrote {', '.join(sorted(path.name for path in outcome.files))} to {folder}/")


@commands.command("distill")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    default="hybrid",
    show_default=True,
    metavar="NAME[:FIELD=VALUE,...]",
    help="A policy that gives layers a state.",
)
@_settings
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
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
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Policy file to write; MODEL.POLICY.safetensors in the current folder if not given.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it is a policy file.")
@_kernels
@_loading
def distill_(
    model: Path,
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
    arch: str | None,
    arch_config: Path | None,
    trust_pickle: bool,
    max_context: int | None,
    as_json: bool,
) -> None:
    """Fit the states that a policy gives MODEL's layers to the attention they replace.

    The result is a policy file, which every --policy takes. An interrupted run is taken up again
    by the same command.
    """
    from ..models.memory import preset
    from .policy_file import is_file

    policy, fields = split_spec(policy)
    if is_file(policy):
        raise BadInput(f"--policy {policy}: fitted already; give a policy by its name")
    options = policy_options(policy, [*fields, *settings], budget=None, max_context=None)
    if "max_context" in options:
        raise BadInput("distill: max_context is no field of a policy; give --max-context")
    from .distill import Given, check_libraries, check_out, distill, report

    target = out or Path(f"{default_name(model, policy)}.safetensors")
    check_libraries()
    check_out(target, force)
    text = "\n".join(_read_text(path) for path in data)
    given = Given(
        preset(policy, **options),
        parse_ids(text) if ids else text,
        length,
        batch,
        steps,
        lr,
        seed,
        checkpoint_every,
        kernels,
    )
    loaded, _ = _load(model, arch, arch_config, trust_pickle)
    outcome = distill(loaded, _absolute(model).name, max_context, given, target)
    if as_json:
        _print_json(outcome.to_json())
        return
    _print(report(outcome))
    for operation, why in outcome.references.items():
        click.echo(f"not generated: {operation}: {why}")
    click.echo(f"wrote {', '.join(str(path) for path in outcome.files)}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (docs/cli.md lists them)."""
    with warnings.catch_warnings():
        # Libraries warn about their own affairs; stderr is for what the user has to know.
        if not _debugging():
            warnings.simplefilter("ignore")
        return _run(arguments)


def _run(arguments: list[str] | None) -> int:
    try:
        code = commands.main(args=arguments, prog_name="memcompile", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except click.Abort:
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return BAD_INPUT
    except click.ClickException as error:
        return _fail(error.format_message(), BAD_INPUT)
    except BadInput as error:
        return _fail(str(error), BAD_INPUT)
    except Exception as error:
        from ..evaluation.protocol import ReadTooMuch
        from ..passes.result import NotRewritten

        if isinstance(error, NotRewritten):
            return _fail(str(error), NOT_REWRITTEN)
        if isinstance(error, ReadTooMuch):
            return _fail(str(error), READ_TOO_MUCH)
        if _is_bad_input(error):
            return _fail(_one_line(error), BAD_INPUT)
        traceback.print_exc()
        return _fail(f"internal error: {type(error).__name__}", INTERNAL)


def _fail(message: str, code: int) -> int:
    click.echo(f"memcompile: {message}", err=True)
    if _debugging() and code != INTERNAL:
        traceback.print_exc()
    return code


def _debugging() -> bool:
    return os.environ.get("MEMCOMPILE_DEBUG", "0") not in ("", "0")


def _is_bad_input(error: Exception) -> bool:
    """Whether this package refused what it was given, rather than broke on it.

    Files that are missing or unreadable are the user's; a ValueError, TypeError or ImportError
    is a refusal only where this package raises it itself.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, ValueError | TypeError | ImportError):
        return False
    # An import statement that fails names the module; a refusal ("install transformers") does not.
    if isinstance(error, ImportError) and error.name is not None:
        return False
    frames = traceback.extract_tb(error.__traceback__)
    home = Path(__file__).resolve().parents[1]
    return bool(frames) and Path(frames[-1].filename).resolve().is_relative_to(home)


def _one_line(error: Exception) -> str:
    """The text of a refusal; what the system says of a file, without its error number."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    return " ".join(str(error).split())


def _load(
    model: Path, arch: str | None, arch_config: Path | None, trust_pickle: bool
) -> tuple[Loaded, float]:
    """The model, and the seconds that reading it took."""
    from .load import load

    started = time.perf_counter()
    loaded = load(model, arch=arch, arch_config=arch_config, trust_pickle=trust_pickle)
    return loaded, time.perf_counter() - started


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        _print_json(report.to_json())
        return
    _print(report)


def _print(shown: Any) -> None:
    """A table to stdout: as wide as the terminal, or as a page where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(shown, soft_wrap=True)


def _print_json(data: Any) -> None:
    import json

    click.echo(json.dumps(data, indent=2))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise BadInput(f"{path}: expected UTF-8 text, found {found}") from None


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder} holds no tokenizer.json; give token ids, with --ids")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise BadInput(
            "text needs the package `tokenizers` (pip install 'memcompile[hf]'); or give --ids"
        ) from None
    return Tokenizer.from_file(str(path))


if __name__ == "__main__":
    sys.exit(main())
