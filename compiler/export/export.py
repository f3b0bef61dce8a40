"""`memcompile.export`: from a model to a folder of engines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .formats import known_formats

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

    from ...models.memory import Policy


def export(
    model: nn.Module | ExportedProgram | str | os.PathLike[str],
    out: str | os.PathLike[str],
    formats: Sequence[str],
    policy: Policy | str | os.PathLike[str],
    *,
    targets: Sequence[str],
    force: bool,
    **options: Any,
) -> Path:
    """See `memcompile.export`."""
    from ...codegen.triton.workers import check_compiler
    from ..package import check_target, write
    from ..pipeline import build
    from .targets import add_targets, parse_targets

    if isinstance(formats, str):
        raise ValueError(f"formats are {formats!r}; give a list of them, as in [{formats!r}]")
    known = known_formats(formats)
    wanted = parse_targets(targets) if targets else []
    if not known and not wanted:
        raise ValueError("no format is given; give one at least, as in ['onnx'], or targets")
    if wanted:
        check_compiler()
    if options.get("strict") is False:
        raise ValueError("strict=False: a model that is not rewritten cannot be exported")
    place = Path(out)
    check_target(place, force)  # before the work
    compiled = build(model, policy, **options)
    binaries = add_targets(compiled, wanted) if wanted else []
    source = Path(model) if isinstance(model, str | os.PathLike) else None
    return write(place, compiled, source=source, force=force, emit=known, binaries=binaries)
