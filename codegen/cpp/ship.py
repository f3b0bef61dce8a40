"""Kernels of an engine that leaves Python behind: a folder of libraries, of which one is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from ..spec import KernelSpec
from . import build, linear, loader

NAME = "libmemcompile_engine"


def library(specs: Iterable[KernelSpec], with_linear: bool) -> build.Library:
    """The one to load: it defines the operators and brings the others, from wherever it lies."""
    wanted = sorted(set(specs), key=lambda spec: spec.name)
    text = loader.definitions(wanted, [linear.SCHEMA] if with_linear else [])
    others = [loader.runtime(), *map(loader.library, wanted)]
    return build.Library(
        NAME,
        (build.Unit("definitions.cpp", text, flags=loader.torch_flags()),),
        link=(*loader.torch_link(), "-Wl,-rpath,$ORIGIN"),
        needs=(*others, *([linear.library()] if with_linear else [])),
        versions=loader.versions(),
    )


def ship(specs: Iterable[KernelSpec], with_linear: bool, folder: Path) -> Path:
    """Copies the libraries of these kernels to a folder; what the cache lacks is built.

    Args:
        with_linear: the linear layer with 16-bit weights, too.

    Returns:
        the library to load; it needs the others beside it, and a process that has torch.

    Raises:
        NoCompiler, BuildFailed: as `build.build`.
    """
    engine = library(specs, with_linear)
    for built in build.build([engine, *engine.needs]):
        shutil.copyfile(built, folder / built.name)
    return folder / f"{NAME}.so"
