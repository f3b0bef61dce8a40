"""One flushed JSON line a prompt and policy: what an interrupted run has, and resumes from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SETTINGS, RECORDS = "settings.json", "records.jsonl"
KEY = ("task", "length", "depth", "sample", "policy")

Key = tuple[Any, ...]


def key_of(record: Mapping[str, Any]) -> Key:
    """What tells a record from the others of its run."""
    return tuple(record[name] for name in KEY)


class Records:
    """The records of one run in a folder; `open_records` gives it.

    Attributes:
        done: the records so far, by key.
    """

    def __init__(self, stream: IO[str], run: str, done: dict[Key, dict[str, Any]]) -> None:
        self._stream, self._run, self.done = stream, run, done

    def add(self, record: dict[str, Any]) -> None:
        """Write one record; it is on its way to the disk when this returns."""
        record = {**record, "run": self._run}
        self._stream.write(json.dumps(record, allow_nan=False) + "\n")
        self._stream.flush()
        self.done[key_of(record)] = record


@contextmanager
def open_records(folder: Path, settings: Mapping[str, Any]) -> Iterator[Records]:
    """The records in `folder`, which is made if need be; nobody else writes there meanwhile.

    A last line that was cut off is dropped, and its prompt asked again.

    Args:
        settings: everything that the figures depend on, as JSON values.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: it holds another run (the text says what differs), or a line is damaged.
        BlockingIOError: another process writes there.
    """
    settings = _plain(settings)
    run = fingerprint(settings)
    check_folder(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    path, about = folder / RECORDS, folder / SETTINGS
    if not about.exists():
        write_whole(about, json.dumps(settings, indent=1) + "\n")
    with path.open("a+", encoding="utf-8") as stream:
        _lock(stream, folder)
        yield Records(stream, run, dict(_read(stream, path, run)))


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a folder that holds something else than this run; writes nothing.

    Raises:
        FileExistsError, ValueError: as `open_records`.
        NotADirectoryError: it is no folder.
    """
    path, about = folder / RECORDS, folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "not a folder; give another --out", str(folder))
    if about.exists():
        _check_settings(about, _plain(settings))
    elif path.exists():
        raise FileExistsError(
            f"{path}: records without {SETTINGS}, so it is not known what they hold for; give "
            "another --out"
        )
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder}: holds files, and none of an evaluation; nothing of yours is overwritten: "
            "give a new or an empty folder as --out"
        )


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from JSON: tuples are lists there."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A short name for settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there complete or as it was before."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
    ) as beside:
        beside.write(data)
    try:
        os.chmod(beside.name, 0o644)
        os.replace(beside.name, path)
    except OSError:
        os.unlink(beside.name)
        raise


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged JSON: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{path}: not the settings of an evaluation")
    told = differences(held, settings)
    if told:
        raise ValueError(
            f"{path.parent}: holds another evaluation ({told}); give another --out, or the same "
            "command to go on with that one"
        )


def differences(held: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What differs between settings that were kept and those at hand, or nothing."""
    was, now = _flat(held), _flat(_plain(settings))
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return "; ".join(
        f"{name} was {_short(was.get(name))}, is {_short(now.get(name))}" for name in names
    )


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values of nested settings under one dotted name each."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lock(stream: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # a system without it: two runs at once are the user's affair there
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, "another evaluation is writing here", str(folder)
        ) from error


def _read(stream: IO[str], path: Path, run: str) -> Iterator[tuple[Key, dict[str, Any]]]:
    stream.seek(0)
    text = stream.read()
    whole, _, rest = text.rpartition("\n")
    if rest:
        # Killed in the middle of a line.
        kept = len((whole + "\n").encode()) if whole else 0
        stream.truncate(kept)
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            if record["run"] != run:
                raise ValueError(f"of another run ({record['run']!r})")
            yield key_of(record), record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: no record of this run ({error}); remove the line, and its "
                "prompt is asked again"
            ) from error
