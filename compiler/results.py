"""What was measured of a compiled model, kept in its folder beside the report that shows it."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.records import write_whole
from ..evaluation.summary import Row
from .archive import one_line
from .bench_result import Bench
from .manifest import MANIFEST, PAGE, REPORT, facts, read_manifest
from .report import Report

if TYPE_CHECKING:
    from .evaluate import Outcome

BENCH, QUALITY = "bench.json", "quality.json"
_FORMAT, _VERSION = "memcompile-quality", 1


@dataclass(frozen=True)
class Quality:
    """The rows of an evaluation, and where they come from.

    Attributes:
        date, folder: when it ended, and the folder with all of it, as it was given.
        own: the name that the folder's own policy has among the rows; "" if it is not there.
        samples, seed: prompts for each task, length and depth, and what they are drawn from.
    """

    date: str
    folder: str
    title: str
    own: str
    samples: int
    seed: int
    memcompile: str
    torch: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rows = [row.to_json() for row in self.rows]
        return {"format": _FORMAT, "version": _VERSION, **values, "rows": rows}

    @classmethod
    def from_json(cls, data: Any) -> Quality:
        """Rebuilds it from `to_json`.

        Raises:
            ValueError: it is something else, of another version, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise ValueError("not what `memcompile eval` leaves in a folder")
        if data.get("version") != _VERSION:
            raise ValueError(
                f"version {data.get('version')!r}, expected {_VERSION}: evaluate again"
            )
        values = {key: value for key, value in data.items() if key not in ("format", "version")}
        try:
            values["rows"] = [Row.from_json(row) for row in values["rows"]]
            found = cls(**values)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"damaged: {error}") from error
        for name, kind in cls.__annotations__.items():
            value = getattr(found, name)
            if kind in ("str", "int") and type(value).__name__ != kind:
                raise ValueError(f"damaged: its {name!r} is {value!r:.40}")
        if not isinstance(found.notes, list) or not all(isinstance(n, str) for n in found.notes):
            raise ValueError(f"damaged: its 'notes' is {found.notes!r:.40}")
        return found

    @classmethod
    def of(cls, outcome: Outcome, policy: Mapping[str, Any], folder: Path) -> Quality:
        """What an evaluation found of a model that was compiled with `policy`."""
        settings = outcome.settings
        named = settings["policies"].items()
        bare = [(name, {k: v for k, v in told.items() if k != "fitted"}) for name, told in named]
        own = [name for name, told in bare if told == dict(policy)]
        plan = settings["plan"]
        return cls(
            date=now(),
            folder=str(folder),
            title=outcome.title,
            own=own[0] if own else "",
            samples=plan["samples"],
            seed=plan["seed"],
            memcompile=settings["memcompile"],
            torch=settings["torch"],
            rows=outcome.rows,
            notes=outcome.notes,
        )


@dataclass(frozen=True)
class Results:
    """What a folder holds beside its report.

    Attributes:
        bench, quality: None where nothing was measured, or it cannot be read.
        faults: why it cannot.
    """

    bench: Bench | None = None
    quality: Quality | None = None
    faults: list[str] = field(default_factory=list)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def keep(folder: Path, result: Bench | Quality) -> None:
    """Writes a result into the folder of a compiled model, and its page anew.

    The manifest lets go of both files before they change and takes them up again afterwards: the
    folder can be opened whenever this stops.

    Raises:
        FileNotFoundError, ValueError: it is no such folder, or a file of it was changed.
        OSError: nothing can be written there.
    """
    from .report_html import render

    with _alone(folder):
        manifest = read_manifest(folder)
        try:
            report = Report.from_json(_read(folder / REPORT))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / REPORT}: damaged: {one_line(error)}") from error
        held = results(folder)
        name = BENCH if isinstance(result, Bench) else QUALITY
        faults = [fault for fault in held.faults if not fault.startswith(name)]
        if isinstance(result, Bench):
            shown = Results(result, held.quality, faults)
        else:
            shown = Results(held.bench, result, faults)
        page = render(report, shown, manifest["memcompile"])
        text = json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n"
        files = {n: f for n, f in manifest["files"].items() if n not in (name, PAGE)}
        _write_manifest(folder, {**manifest, "files": files})
        write_whole(folder / name, text)
        write_whole(folder / PAGE, page)
        files |= {n: facts(folder / n) for n in (name, PAGE)}
        _write_manifest(folder, {**manifest, "files": dict(sorted(files.items()))})


def results(folder: Path) -> Results:
    """What was measured of the model in `folder`; what cannot be read is said."""
    found: dict[str, Any] = {}
    faults = []
    for name, kind in ((BENCH, Bench), (QUALITY, Quality)):
        if (folder / name).is_file():
            try:
                found[name] = kind.from_json(_read(folder / name))
            except ValueError as error:
                faults.append(f"{name} cannot be shown: {one_line(error)}")
    return Results(found.get(BENCH), found.get(QUALITY), faults)


def check_writable(folder: Path) -> None:
    """Refuses, before the work, a folder that a result could not be kept in.

    Raises:
        PermissionError: nothing may be written there.
    """
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{folder}: not allowed to write there; --dry-run measures and writes nothing"
        )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged JSON: {error}") from error


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else keeps a result there meanwhile."""
    try:
        import fcntl
    except ImportError:  # a system without it: two at once are the user's affair there
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
