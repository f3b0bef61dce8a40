"""Paths that a user gives or leaves to be named, and the text in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..arguments import BadInput


def absolute(path: Path) -> Path:
    """`path` from the root, with the name that was given: links (a hub's are digests) stay."""
    return Path(os.path.abspath(path))


def default_name(model: Path, policy: str) -> str:
    """`model.pt` -> `model.scout`; a folder keeps its whole name, dots included. A policy file
    gives its name without the suffix."""
    from ..policy_file import policy_name

    path = absolute(model)
    known = (".pt", ".pt2", ".pth", ".bin", ".ckpt", ".safetensors")
    stem = path.stem if path.suffix in known and not path.is_dir() else path.name
    return f"{stem}.{policy_name(policy)}"


def read_text(path: Path) -> str:
    """The text in a file.

    Raises:
        BadInput: it is not UTF-8.
        OSError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise BadInput(f"{path}: expected UTF-8 text, found {found}") from None


def tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` that lies in a folder.

    Raises:
        BadInput: there is none, or the library is missing.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder} holds no tokenizer.json; give token ids, with --ids")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise BadInput(
            "text needs the package `tokenizers` (pip install 'memcompile[hf]'); or give --ids"
        ) from None
    return Tokenizer.from_file(str(path))
