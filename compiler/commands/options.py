"""Options that several commands share, and what reading MODEL needs as one value."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import progress
from ..arguments import closest
from ..settings import KERNELS
from .files import absolute

if TYPE_CHECKING:
    from ..load import Loaded

    _Choice = click.Choice[str]
else:
    _Choice = click.Choice  # generic since click 8.2


@dataclass(frozen=True)
class Source:
    """MODEL, and the options that say how it is read.

    Attributes:
        path: what the user gave.
        arch, arch_config, trust_pickle, dtype: as for `compiler.load.load`.
        max_context: as for `pipeline.build`.
    """

    path: Path
    arch: str | None
    arch_config: Path | None
    trust_pickle: bool
    max_context: int | None
    dtype: str | None = None

    @property
    def name(self) -> str:
        """What reports call the model: the last part of its path."""
        return absolute(self.path).name

    def load(self) -> Loaded:
        """The model."""
        from ..load import load

        return load(
            self.path,
            arch=self.arch,
            arch_config=self.arch_config,
            dtype=self.dtype,
            trust_pickle=self.trust_pickle,
        )


def source(metavar: str = "MODEL") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The argument MODEL and the options that go with it, given to the command as `source`."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_source(
            model: Path,
            arch: str | None,
            arch_config: Path | None,
            trust_pickle: bool,
            max_context: int | None,
            dtype: str | None,
            **rest: Any,
        ) -> Any:
            given = Source(model, arch, arch_config, trust_pickle, max_context, dtype)
            return command(source=given, **rest)

        decorated: Callable[..., Any] = with_source
        for option in reversed((click.argument("model", metavar=metavar, type=PATH), *_READING)):
            decorated = option(decorated)
        return decorated

    return decorate


PATH = click.Path(path_type=Path)


class Choice(_Choice):
    """click's, which also names the nearest value for a wrong one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return str(super().convert(value, param, ctx))
        except click.BadParameter as error:
            near = closest(str(value), map(str, self.choices))
            guess = f" Did you mean {near!r}?" if near is not None else ""
            raise click.BadParameter(f"{error.message}{guess}", ctx, param) from None


_READING = (
    click.option(
        "--arch",
        metavar="MODULE:CLASS",
        help="Class to load a state dict into. Its module is imported.",
    ),
    click.option(
        "--arch-config",
        metavar="FILE",
        type=PATH,
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
    click.option(
        "--dtype",
        type=Choice(["float32", "float16", "bfloat16"]),
        help="Convert the weights. [default: as they are]",
    ),
)


kernels = click.option(
    "--kernels",
    type=Choice(KERNELS),
    help="auto: generate kernels, and say so where that fails; required: fail then; off: run "
    "reference operations. [default: $MEMCOMPILE_KERNELS, or auto]",
)

settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a field of the policy; may be repeated.",
)

as_json = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")


def _show_progress(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Progress is for as long as the command runs."""
    if not context.resilient_parsing:
        context.with_resource(progress.shown(quiet=value))
    return value


quiet = click.option(
    "--quiet",
    is_flag=True,
    callback=_show_progress,
    help="Print nothing but errors, and what --json asks for.",
)
