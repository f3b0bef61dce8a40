"""The command line: `memcompile MODEL` builds, and what else there is to do with a model."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

import click

from .. import __version__
from .arguments import BadInput
from .commands.build import build
from .commands.distill import distill
from .commands.evaluate import evaluate
from .commands.inspect import inspect
from .commands.run import run
from .exit_codes import BAD_INPUT, INTERNAL, INTERRUPTED, NOT_REWRITTEN, OK, READ_TOO_MUCH

# In the order of the help; each stands in a file of its own in commands/.
COMMANDS: tuple[tuple[click.Command, str], ...] = (
    (build, "MODEL [OPTIONS]"),
    (inspect, "inspect MODEL [OPTIONS]"),
    (run, "run DIR [OPTIONS]"),
    (evaluate, "eval MODEL_OR_DIR [OPTIONS]"),
    (distill, "distill MODEL --data FILE"),
)


class Commands(click.Group):
    """A group whose first argument, when it is no command, is the model that `build` builds."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["build", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for i, (_, usage) in enumerate(COMMANDS):
            formatter.write_usage("memcompile", usage, prefix="       " if i else None)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.commands["build"].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """Give a dense attention model a memory.

    MODEL is a transformers folder, a .pt2 or .pt file. The result is a folder with a manifest, the
    weights and a report.
    """


for _command, _ in COMMANDS:
    commands.add_command(_command)


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
        return INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return BAD_INPUT
    except click.ClickException as error:
        return _fail(_one_line(error.format_message()), BAD_INPUT)
    except BadInput as error:
        return _fail(_one_line(error), BAD_INPUT)
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
    # What a file or a line holds may be quoted in it, and must not command a terminal.
    shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
    click.echo(f"memcompile: {shown}", err=True)
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


def _one_line(error: Exception | str) -> str:
    """The text of a refusal; what the system says of a file, without its error number."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
