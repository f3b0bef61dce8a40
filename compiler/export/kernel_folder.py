"""The folder of kernels: binaries, assembly, a description in JSON and the same as a C header."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...codegen.triton.blocks import architecture
from ..manifest import own_version
from .c_header import TYPES, header, target_list
from .targets import Binaries

VERSION = 1
INDEX, HEADER, ALL = "kernels.json", "kernels.h", "targets.h"
_TYPES_FILE = Path(__file__).with_name(TYPES)


def write_kernels(folder: Path, binaries: Iterable[Binaries]) -> None:
    """Writes `folder`, which must not be there: one folder a target, and headers for C.

    Raises:
        OSError: it cannot be written; whoever gave a scratch folder drops it then.
    """
    folder.mkdir()
    shutil.copyfile(_TYPES_FILE, folder / TYPES)
    names = []
    for made in binaries:
        place = folder / made.target.replace(":", "-")
        place.mkdir()
        names.append(place.name)
        for name, content in made.files.items():
            (place / name).write_bytes(content)
        for name, kernel in made.kernels.items():
            _write_json(place / f"{name}.json", kernel)
        index = index_of(made)
        _write_json(place / INDEX, index)
        (place / HEADER).write_text(header(index), encoding="utf-8")
    (folder / ALL).write_text(target_list(names), encoding="utf-8")


def index_of(made: Binaries) -> dict[str, Any]:
    """What kernels.json holds."""
    vendor, arch = made.target.split(":")
    number = int(arch.removeprefix("sm_")) if vendor == "cuda" else 0
    return {
        "format": "memcompile kernels",
        "version": VERSION,
        "memcompile": own_version(),
        "target": made.target,
        "capability": [*divmod(number, 10)] if number else None,
        "warp": architecture(made.target).warp,
        "verified_on_gpu": False,
        "operators": made.operators,
        "kernels": made.kernels,
        "uncovered": made.uncovered,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
