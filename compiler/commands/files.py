"""Paths that a user gives or leaves to be named, and the text in them."""

from __future__ import annotations

import json
import os
import sys
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
    return _decoded(path.read_bytes(), str(path))


def read_stdin(refusal: str, *, wait: bool) -> str:
    """The text that stdin holds.

    Args:
        refusal: what to say where there is none to read.
        wait: read what is typed into a terminal, too.

    Raises:
        BadInput: there is no stdin, it is a terminal and not waited for, or it is not UTF-8.
    """
    if sys.stdin is None or (sys.stdin.isatty() and not wait):
        raise BadInput(f"{refusal}, or text on stdin")
    return _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise BadInput(f"{where}: expected UTF-8 text, found {found}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as a file opened for text gives it


def tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` that lies in a folder.

    Raises:
        BadInput: there is none, it is damaged, or the library is missing.
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
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises its base class
        reason = " ".join(str(error).split())
        raise BadInput(f"{path}: no tokenizer that can be read: {reason}") from None
    # Cutting and padding are settings of whoever used it last, not of the model.
    found.no_truncation()
    found.no_padding()
    return found


def end_tokens(folder: Path, words: Any) -> list[int]:
    """The tokens that end a text, as generation_config.json or the tokenizer's config in `folder`
    says; none if neither does.

    Args:
        words: the `tokenizers.Tokenizer`, or None without one.

    Raises:
        BadInput: one of the files is damaged.
    """
    named = _entry(folder / "generation_config.json", "eos_token_id")
    found = named if isinstance(named, list) else [named]
    ends = [end for end in found if type(end) is int and end >= 0]
    if ends or words is None:
        return ends
    named = _entry(folder / "tokenizer_config.json", "eos_token")
    word = named.get("content") if isinstance(named, dict) else named
    end = words.token_to_id(word) if isinstance(word, str) else None
    return [] if end is None else [end]


def _entry(path: Path, key: str) -> Any:
    """What a JSON object in a file has under `key`; None without the file or the key."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: damaged JSON: {' '.join(str(error).split())}") from None
    return data.get(key) if isinstance(data, dict) else None
