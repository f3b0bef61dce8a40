"""Export archives: read as plain data, rewritten without anything that executes, then loaded."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .vet import vet_payloads, vet_program
from .vet_texts import Refused, json_list

_ROOT = "archive"
_MODEL = "models/model.json"
_LARGEST_JSON = 1 << 30
_MOST_ENTRIES = 1_000_000
_CHUNK = 1 << 20
_NATIVE = re.compile(r"\.(so(\.\d+)*|dll|dylib|pyd|o|a|obj|lib|cpp|cc|cu|cubin|ptx|hsaco|py|pyc)$")
# Code of torch's serialised ScalarType -> bytes of one element.
_ITEM_SIZE = (
    {code: 1 for code in (1, 2, 12, 29, 30, 31, 32, 33)}
    | {code: 2 for code in (3, 6, 13, 28)}
    | {code: 4 for code in (4, 7, 9, 34)}
    | {code: 8 for code in (5, 8, 10, 35)}
    | {11: 16}
)
_STRIDED = 7


def read_program(path: Path) -> ExportedProgram:
    """Loads the exported program of an archive without executing anything of it.

    The archive is rewritten to a temporary file first: sample inputs are dropped, every field of
    the graph is checked, weights are copied byte by byte.

    Raises:
        ValueError: the archive is damaged or holds something that would be executed; the message
            names the entry.
        OSError: it cannot be read.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="memcompile-") as folder:
            clean = Path(folder) / "program.pt2"
            rewrite(path, clean)
            return load_program(clean)
    except Refused as refused:
        raise ValueError(
            f"{path}: this export archive is not loaded: {refused}. If you made the file yourself, "
            "pass --trust-pickle (trust_pickle=True); otherwise ask for one saved by "
            "torch.export.save"
        ) from refused
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def rewrite(source: Path, target: Path, *, traces: bool = True) -> None:
    """Writes to `target` what is plain data in the archive `source`, if nothing in it can run.

    Args:
        traces: keep the nodes' stack traces, which name files of the machine that exported it.

    Raises:
        Refused: an entry that would be executed on loading.
        ValueError: the archive is damaged, or it holds no exported program.
    """
    with open_zip(source) as archive:
        entries = _relative(archive)
        _refuse_code(entries)
        program = _json(archive, entries, _MODEL)
        payloads = []
        for folder, config in (
            ("data/weights/", "data/weights/model_weights_config.json"),
            ("data/constants/", "data/constants/model_constants_config.json"),
        ):
            checked = vet_payloads(_json(archive, entries, config), config)
            payloads.append((folder, config, checked))
            for name, entry in checked.items():
                _check_record(name, entry, entries, folder)
        cleaned = vet_program(program, traces=traces)
        # Stored, not deflated: torch reads records in place.
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
            out.writestr(f"{_ROOT}/archive_format", b"pt2")
            out.writestr(f"{_ROOT}/archive_version", b"0")
            out.writestr(f"{_ROOT}/.data/version", b"6\n")
            out.writestr(f"{_ROOT}/byteorder", sys.byteorder.encode())
            out.writestr(f"{_ROOT}/data/sample_inputs/model.pt", b"")
            out.writestr(f"{_ROOT}/{_MODEL}", json.dumps(cleaned))
            for folder, config, checked in payloads:
                out.writestr(f"{_ROOT}/{config}", json.dumps({"config": checked}))
                for record in dict.fromkeys(entry["path_name"] for entry in checked.values()):
                    _copy(archive, entries[folder + record], out, f"{_ROOT}/{folder}{record}")


def load_program(path: Path) -> ExportedProgram:
    """torch.export.load on a file that is trusted, with its reason where it fails.

    Raises:
        ValueError: torch cannot read it; the message says why in one line.
    """
    with _heard() as heard:
        try:
            return torch.export.load(path)
        except Exception as error:  # torch raises every type here; each means "not readable"
            reason = heard[-1] if heard else error
            raise ValueError(
                f"torch {torch.__version__} cannot read this exported program: "
                f"{one_line(reason)}; export it again with this version of torch"
            ) from error


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive of stored entries with plain, unique names.

    Raises:
        ValueError: it is damaged, or made so that readers disagree about it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_ENTRIES:
                raise ValueError(f"{len(entries)} entries are no model")
            seen: set[str] = set()
            for entry in entries:
                parts = entry.filename.split("/")
                plain = entry.filename.isprintable() and "\\" not in entry.filename
                if not plain or entry.filename.startswith("/") or ".." in parts:
                    raise ValueError(f"the entry name {entry.filename!r} is not a plain path")
                if entry.filename in seen:
                    raise ValueError(f"the entry {entry.filename!r} is in there twice")
                seen.add(entry.filename)
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise ValueError(
                        f"the entry {entry.filename!r} is compressed or encrypted; torch "
                        "stores entries as they are: repack the archive with `zip -0`"
                    )
            total, size = sum(entry.file_size for entry in entries), path.stat().st_size
            if total > size:
                raise ValueError(
                    f"its entries claim {total} bytes in a file of {size}: truncated, or "
                    "made to look larger than it is"
                )
            yield archive
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError) as error:
        raise ValueError(f"a damaged zip archive: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The last telling line of an error, cut to a readable length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    if len(lines) > 1 and "Original exception" not in str(error):
        text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= 300 else text[:297] + "..."


def _relative(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Entries by their path inside the archive's one root folder."""
    roots = {name.split("/")[0] for name in archive.namelist()}
    if len(roots) != 1:
        raise ValueError(f"an export archive has one root folder, not {sorted(roots)}")
    (root,) = roots
    return {
        entry.filename.removeprefix(root + "/"): entry
        for entry in archive.infolist()
        if not entry.is_dir()
    }


def _refuse_code(entries: dict[str, zipfile.ZipInfo]) -> None:
    """Refuses entries that run on loading; entries that nothing refers to are simply not copied."""
    for name in entries:
        folder, _, file = name.rpartition("/")
        if name.startswith("data/aotinductor/") or _NATIVE.search(name.lower()):
            raise Refused(
                f"entry {name!r} is compiled code (an AOTInductor package?); memcompile takes the "
                "exported program it was built from"
            )
        if folder == "data/constants" and file.startswith("custom_obj"):
            raise Refused(f"entry {name!r} is a script object, whose unpickling can run code")
        if folder == "data/constants" and file.startswith("opaque_obj"):
            raise Refused(f"entry {name!r} is an opaque object, whose unpickling can run code")
        if folder in ("data/weights", "data/constants") and file.endswith(".pt"):
            raise Refused(f"entry {name!r} holds tensors as a pickle, which can run code")
        if name.startswith("models/") and name != _MODEL:
            raise ValueError(f"the archive holds the program {name!r} too; one 'model' is expected")
    if "byteorder" in entries and entries["byteorder"].file_size != len(sys.byteorder):
        raise ValueError(f"the archive was not written on a {sys.byteorder}-endian machine")
    if _MODEL not in entries:
        raise ValueError("the archive holds no exported program (models/model.json)")


def _json(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], name: str) -> Any:
    if name not in entries:
        raise ValueError(f"the archive has no entry {name!r}")
    if entries[name].file_size > _LARGEST_JSON:
        raise ValueError(f"the entry {name!r} of {entries[name].file_size} bytes is no model")
    try:
        return json.loads(archive.read(entries[name]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the entry {name!r} is damaged: {one_line(error)}") from error


def _check_record(
    name: str, entry: dict[str, Any], entries: dict[str, zipfile.ZipInfo], folder: str
) -> None:
    """The record must hold what the metadata says; torch fills in zeros where it holds nothing."""
    meta, record = entry["tensor_meta"], folder + entry["path_name"]
    if record not in entries:
        raise ValueError(f"the archive has no entry {record!r}, where {name!r} should be")
    sizes, strides = ([_whole(x) for x in json_list(meta.get(key))] for key in ("sizes", "strides"))
    offset, item = _whole(meta.get("storage_offset")), _ITEM_SIZE.get(meta.get("dtype"))
    if item is None or meta.get("layout") != _STRIDED or len(sizes) != len(strides):
        raise ValueError(f"{name!r} has a data type or layout that is not known")
    held = entries[record].file_size
    last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
    needed = (last + 1) * item if math.prod(sizes) else 0
    if needed > held or held % item:
        raise ValueError(f"the entry {record!r} holds {held} bytes where {name!r} needs {needed}")


def _whole(data: Any) -> int:
    number = data.get("as_int") if isinstance(data, dict) else None
    if isinstance(number, int) and 0 <= number < 1 << 48:
        return number
    raise ValueError(f"a weight has the size or stride {data!r}, not a whole number")


def _copy(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, out: zipfile.ZipFile, name: str
) -> None:
    with archive.open(entry) as source, out.open(name, "w", force_zip64=True) as target:
        while chunk := source.read(_CHUNK):
            target.write(chunk)


@contextmanager
def _heard() -> Iterator[list[BaseException]]:
    """Catches the error that torch.export.load logs and hides behind a general one."""
    heard: list[BaseException] = []

    def listen(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1] is not None:
            heard.append(record.exc_info[1])
        return False

    loggers = [logging.getLogger(n) for n in ("torch.export", "torch.export.pt2_archive._package")]
    for logger in loggers:
        logger.addFilter(listen)
    try:
        yield heard
    finally:
        for logger in loggers:
            logger.removeFilter(listen)
