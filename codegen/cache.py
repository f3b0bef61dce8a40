"""Where generated sources and what is built from them are kept, between runs and processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

SUMS = "sums.json"  # of every file in a published folder


def root() -> Path:
    """$MEMCOMPILE_CACHE, or ~/.cache/memcompile."""
    given = os.environ.get("MEMCOMPILE_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "memcompile"


def key(*parts: str) -> str:
    """A content hash of the parts in their order, short enough for a folder's name."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:24]


def publish(folder: Path, write: Callable[[Path], None]) -> Path:
    """Makes `folder` by `write`, unless it is there, whole: it appears whole or not at all.

    `write` fills a folder beside it, which is then renamed. Of several processes that write the
    same one at once, one wins and the others drop their copy. A folder that was changed or cut off
    since is made again.

    Raises:
        OSError: the cache cannot be written; the message says how to choose another.
    """
    if intact(folder):
        return folder
    beside = folder.parent / f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise OSError(
            f"the cache {root()} cannot be written: {error}; point $MEMCOMPILE_CACHE at a folder "
            "that can"
        ) from error
    try:
        write(beside)
        (beside / SUMS).write_text(json.dumps(_sums(beside)), encoding="utf-8")
        if folder.exists() and not intact(folder):
            os.rename(folder, f"{beside}.damaged")
        os.rename(beside, folder)
    except OSError:
        if not intact(folder):
            raise
    finally:
        for left in (beside, Path(f"{beside}.damaged")):
            shutil.rmtree(left, ignore_errors=True)
    return folder


def intact(folder: Path) -> bool:
    """Whether a published folder is there and holds what was written into it."""
    try:
        recorded = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        return bool(recorded == _sums(folder))
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != SUMS
    }
