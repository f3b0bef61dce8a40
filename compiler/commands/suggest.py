"""Groups of commands that know what was meant by a word that is none of them."""

from __future__ import annotations

import os

import click

from ..arguments import BadInput, closest, nearest


class SuggestingGroup(click.Group):
    """A group that names the nearest command for an unknown one; commands as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if not ctx.resilient_parsing and args and args[0] not in known and args[0][:1] != "-":
            raise BadInput(f"{ctx.info_name}: unknown command {args[0]!r}{nearest(args[0], known)}")
        return super().resolve_command(ctx, args)


def check_word(word: str, known: list[str]) -> None:
    """Refuses a first argument that is no path, but close to a command.

    Raises:
        BadInput: it is.
    """
    if os.path.lexists(word) or os.sep in word or "." in word:
        return
    near = closest(word, known)
    if near is not None:
        raise BadInput(
            f"{word!r} is neither a command nor a file or folder; did you mean the command "
            f"{near!r}? known: {', '.join(known)}"
        )
