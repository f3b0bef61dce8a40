"""`memcompile cache`: the generated kernels that are kept, shown and cleared."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..arguments import BadInput
from . import options
from .output import show, show_json
from .suggest import SuggestingGroup

if TYPE_CHECKING:
    from rich.table import Table

    from ...codegen.cache import Entry


@click.group(cls=SuggestingGroup)
def cache() -> None:
    """Show or clear the generated kernels that are kept."""


@cache.command("show")
@options.as_json
@options.quiet
def show_cache(as_json: bool, quiet: bool) -> None:
    """Show what is kept, how large it is and where."""
    from ...codegen import cache as store

    entries = store.entries()
    if as_json:
        show_json(_as_json(entries, store.root()))
    elif not quiet:
        if entries:
            show(_table(entries))
        click.echo(f"{_counted(entries)} in {store.root()}")


@cache.command("clear")
@click.option("--yes", is_flag=True, help="Do not ask.")
@options.as_json
@options.quiet
def clear_cache(yes: bool, as_json: bool, quiet: bool) -> None:
    """Remove what is kept. Kernels are generated anew when they are needed."""
    from ...codegen import cache as store

    entries = store.entries()
    if entries and not yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise BadInput("cache clear: stdin is no terminal to ask on; give --yes")
        if not click.confirm(f"remove {_counted(entries)} from {store.root()}?", err=True):
            click.echo("nothing removed", err=True)
            return
    freed = store.remove(entries)
    if as_json:
        show_json({"root": str(store.root()), "removed": len(entries), "bytes": freed})
    elif not quiet:
        from ..report import bytes_of

        click.echo(f"removed {_number(entries)} from {store.root()}: {bytes_of(freed)} freed")


def _table(entries: Sequence[Entry]) -> Table:
    from rich.table import Table

    from ..report import bytes_of

    table = Table()
    table.add_column("kind", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("written", no_wrap=True)
    for entry in entries:
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        damaged = "" if entry.whole or entry.kind == "unfinished" else ", damaged"
        table.add_row(entry.kind + damaged, entry.name, bytes_of(entry.bytes), written)
    return table


def _as_json(entries: Sequence[Entry], root: Path) -> dict[str, Any]:
    return {
        "root": str(root),
        "bytes": sum(entry.bytes for entry in entries),
        "entries": [
            {
                "kind": entry.kind,
                "name": entry.name,
                "path": str(entry.path),
                "bytes": entry.bytes,
                "written": entry.used,
                "whole": entry.whole,
            }
            for entry in entries
        ],
    }


def _counted(entries: Sequence[Entry]) -> str:
    from ..report import bytes_of

    return f"{_number(entries)}, {bytes_of(sum(entry.bytes for entry in entries))}"


def _number(entries: Sequence[Entry]) -> str:
    return f"{len(entries)} {'entry' if len(entries) == 1 else 'entries'}"
