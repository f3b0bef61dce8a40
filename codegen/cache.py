"""Where generated sources and what is built from them are kept, between runs and processes."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


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
    """Makes `folder` by `write`, unless it is there: it appears whole or not at all.

    `write` fills a folder beside it, which is then renamed. Of several processes that write the
    same one at once, one wins and the others drop their copy.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent / f".{folder.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    beside.mkdir()
    try:
        write(beside)
        os.rename(beside, folder)
    except OSError:
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder
