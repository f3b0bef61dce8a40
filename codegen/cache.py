"""Where generated sources and what is built from them are kept, between runs and processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Entry:
    """Something that was put into the cache.

    Attributes:
        kind: "cpp", "triton", "binaries" (compiled for a GPU), "tuned" (choices for one), or
            "unfinished" (left by a process that was killed).
        path: its folder, or the file of a tuned choice.
        files: what was put there, and nothing else.
        used: when the newest of them was written, in seconds since the epoch.
        whole: whether it is as it was written; only then is it used.
    """

    kind: str
    path: Path
    files: tuple[Path, ...]
    bytes: int
    used: float
    whole: bool

    @property
    def name(self) -> str:
        """Without what tells it from others of its kind."""
        return self.path.stem if self.kind == "tuned" else _HASH.sub("", self.path.name)


_HASH = re.compile(r"(?<=.)-?[0-9a-f]{24}$")
_PUBLISHED = {
    "binaries": re.compile(r"[^.].*-[0-9a-f]{24}"),
    "cpp": re.compile(r"[^.].*-[0-9a-f]{24}"),
    "triton": re.compile(r"[0-9a-f]{24}"),
}
# What `publish` writes into, before it is renamed.
_BESIDE = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}(\.damaged)?")


def entries() -> list[Entry]:
    """What the cache holds, in order of kind and name; nothing that another put beside it."""
    found: list[Entry] = []
    for kind, published in _PUBLISHED.items():
        for folder in _folders(root() / kind):
            beside = _BESIDE.fullmatch(folder.name)
            if published.fullmatch(folder.name):
                names = {*_recorded(folder), SUMS}
                found.append(_entry(kind, folder, names, intact(folder)))
            elif beside is not None and not _alive(int(beside[1])):
                names = {file.name for file in folder.iterdir()}
                found.append(_entry("unfinished", folder, names, False))
    for target in _folders(root() / "tuned"):
        for file in sorted(target.glob("*.json")):
            if file.is_file() and not file.is_symlink():
                facts = file.stat()
                found.append(Entry("tuned", file, (file,), facts.st_size, facts.st_mtime, True))
    return found


def remove(gone: Iterable[Entry]) -> int:
    """Removes entries, and folders that are empty then; returns the bytes that were freed.

    Raises:
        OSError: something cannot be removed.
    """
    freed = 0
    for entry in gone:
        for file in entry.files:
            try:
                size = file.stat().st_size
                file.unlink()
            except FileNotFoundError:  # another process was faster
                continue
            freed += size
        for folder in (entry.path, *entry.path.parents):
            if folder == root() or (folder.is_dir() and any(folder.iterdir())):
                break
            if folder.is_dir():
                folder.rmdir()
    return freed


def _entry(kind: str, folder: Path, names: Iterable[str], whole: bool) -> Entry:
    files = [folder / name for name in sorted(names)]
    files = [file for file in files if file.is_file() and not file.is_symlink()]
    facts = [file.stat() for file in files]
    used = max((fact.st_mtime for fact in facts), default=folder.stat().st_mtime)
    return Entry(kind, folder, tuple(files), sum(fact.st_size for fact in facts), used, whole)


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())


def _recorded(folder: Path) -> list[str]:
    """The files that were put into a folder; names that lead out of it are none."""
    try:
        recorded = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    names = recorded if isinstance(recorded, dict) else {}
    return [name for name in names if Path(name).name == name]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
