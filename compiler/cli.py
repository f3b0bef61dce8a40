"""The command line: `memcompile MODEL` builds, and what else there is to do with a model."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
from click.shell_completion import CompletionItem, shell_complete

from .. import __version__
from .arguments import BadInput, nearest_path
from .commands.bench import bench
from .commands.build import build
from .commands.cache import cache
from .commands.completion import VARIABLE, completion
from .commands.distill import distill
from .commands.evaluate import evaluate
from .commands.explain import explain
from .commands.inspect import inspect
from .commands.run import run
from .commands.suggest import SuggestingGroup, check_word
from .commands.verify import verify
from .exit_codes import (
    BAD_INPUT,
    BROKEN_PIPE,
    INTERNAL,
    INTERRUPTED,
    NOT_REWRITTEN,
    OK,
    READ_TOO_MUCH,
    TERMINATED,
)

# In the order of the help; each stands in a file of its own in commands/.
COMMANDS: tuple[tuple[click.Command, str], ...] = (
    (build, "MODEL [OPTIONS]"),
    (inspect, "inspect MODEL [OPTIONS]"),
    (explain, "explain MODEL [OPTIONS]"),
    (run, "run DIR [OPTIONS]"),
    (bench, "bench DIR [OPTIONS]"),
    (verify, "verify DIR [OPTIONS]"),
    (evaluate, "eval MODEL_OR_DIR [OPTIONS]"),
    (distill, "distill MODEL --data FILE"),
    (cache, "cache show|clear"),
    (completion, "completion bash|zsh|fish"),
)


class Commands(SuggestingGroup):
    """A group whose first argument, when it is no command, is the model that `build` builds."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            if not ctx.resilient_parsing and not args[0].startswith("-"):
                check_word(args[0], [name for name, c in self.commands.items() if not c.hidden])
            args = ["build", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands, and what `build` takes: the first word may be a model or an option of it."""
        build = self.commands["build"]
        with build.make_context("build", [], parent=ctx, resilient_parsing=True) as own:
            options = build.shell_complete(own, incomplete)
        known = super().shell_complete(ctx, incomplete)
        told = {item.value for item in known}
        known += [item for item in options if item.value not in told]
        return known if incomplete[:1] == "-" else [CompletionItem(incomplete, "file"), *known]

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
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks is shown in escapes, and is no reason to stop.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings(), _terminable():
        # Libraries warn about their own affairs; stderr is for what the user has to know.
        if not _debugging():
            warnings.simplefilter("ignore")
        return _run(arguments)


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what is under way ends as it does after Ctrl-C, and leaves as little."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM interrupt as SIGINT does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _run(arguments: list[str] | None) -> int:
    instruction = os.environ.get(VARIABLE)
    if instruction:
        return shell_complete(commands, {}, "memcompile", VARIABLE, instruction)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with commands.make_context("memcompile", [*given]) as context:
            commands.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
        return OK
    except click.exceptions.Exit as end:
        return end.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo(err=True)  # what follows does not stand behind the terminal's ^C
        # An interrupted question hides what interrupted it.
        ended = isinstance(error, Terminated) or isinstance(error.__context__, Terminated)
        return TERMINATED if ended else INTERRUPTED
    except BrokenPipeError:
        # Whoever read has had enough; what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
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
        if _out_of_memory(error):
            return _fail(f"not enough memory for this: {_one_line(error)}", BAD_INPUT)
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


def _out_of_memory(error: Exception) -> bool:
    """Whether more memory was asked for than there is; torch has no type of its own for the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _one_line(error: Exception | str) -> str:
    """The text of a refusal; what the system says of a file, without its error number."""
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror[:1].lower() + error.strerror[1:]
        if error.filename is None:
            return reason
        near = nearest_path(Path(error.filename)) if error.errno == errno.ENOENT else ""
        return f"{error.filename}: {reason}{near}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
