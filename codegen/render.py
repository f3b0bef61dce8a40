"""Renders kernel templates, and holds what they print to the rules of generated source."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

LONGEST_LINE = 100


@cache
def _environment(folder: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(template: Path, **names: Any) -> str:
    """The text that `template` prints for `names`.

    Raises:
        jinja2.UndefinedError: the template reads a name that was not given.
        ValueError: the text is not fit to be read: a long line, trailing blanks, or two empty
            lines in a row in the place of a block that was left out.
    """
    text = _environment(template.parent).get_template(template.name).render(**names)
    check_readable(template.name, text)
    return text


def check_readable(name: str, text: str) -> None:
    blank = 0
    for number, line in enumerate(text.split("\n"), 1):
        blank = 0 if line else blank + 1
        fault = ""
        if len(line) > LONGEST_LINE:
            fault = f"{len(line)} columns, at most {LONGEST_LINE} are allowed"
        elif line != line.rstrip():
            fault = "trailing blanks"
        elif blank > 2 or (blank > 1 and name.endswith((".h", ".cpp", ".cpp.jinja"))):
            fault = "more than one empty line in a row"
        if fault:
            raise ValueError(f"{name} printed an unreadable line {number}: {fault}: {line!r}")
    if not text.endswith("\n") or text.endswith("\n\n"):
        raise ValueError(f"{name} must print a text that ends with one line break")
