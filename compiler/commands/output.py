"""What commands print: tables for people, JSON for machines."""

from __future__ import annotations

import sys
from typing import Any

import click


def show(table: Any) -> None:
    """A table to stdout: as wide as the terminal, or as a page where there is none."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(table, soft_wrap=True)


def show_json(data: Any) -> None:
    import json

    click.echo(json.dumps(data, indent=2))
