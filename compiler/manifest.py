"""The manifest of a folder that memcompile wrote: which files are in it, and whether they still
are what was written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .archive import one_line
from .arguments import nearest_path

if TYPE_CHECKING:
    from .export.formats import Artefact

FORMAT = "memcompile"
VERSION = 1
MANIFEST, REPORT, PAGE = "manifest.json", "report.json", "report.html"
PROGRAM, WEIGHTS = "program.pt2", "weights.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, once every file has been found to be the one it describes.

    Raises:
        FileNotFoundError: there is no such folder, or a file of it is missing.
        ValueError: a file was changed or cut off, another version wrote it, or it holds the report
            of a refused model alone.
    """
    path = manifest_path(folder)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged JSON: {one_line(error)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not the manifest of a folder that memcompile wrote")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {manifest.get('version')!r}, written by memcompile "
            f"{manifest.get('memcompile')}; memcompile {own_version()} reads version {VERSION}: "
            "compile the model again, or use that version"
        )
    if manifest.get("refused") is True:
        raise ValueError(f"{folder}: holds no engine: the model was refused; {PAGE} in it says why")
    expected: dict[str, type | tuple[type, ...]] = {
        "memcompile": str,
        "model": str,
        "takes_position_ids": bool,
        "policy": dict,
        "max_context": (int, type(None)),
        "sites": list,
        "weights": dict,
        "files": dict,
    }
    for key, kind in expected.items():
        if not isinstance(manifest.get(key), kind) or key not in manifest:
            raise ValueError(f"{path}: damaged: its {key!r} is {manifest.get(key)!r}")
    for key in ("aliases", "strides"):
        if not isinstance(manifest["weights"].get(key), dict):
            raise ValueError(f"{path}: damaged: its 'weights' lack {key!r}")
    for name in (PROGRAM, WEIGHTS):
        if name not in manifest["files"]:
            raise ValueError(f"{path}: damaged: it does not list {name}")
    exported = [f"{a.folder}/" for a in artefacts(manifest, path)]
    for name, told in manifest["files"].items():
        # Those of exported engines are checked when they are opened: `check_artefact`.
        if not name.startswith(tuple(exported)):
            _check_file(folder, name, told)
    return manifest


def artefacts(manifest: dict[str, Any], path: Path) -> list[Artefact]:
    """The exported engines that a manifest lists; none in those of older versions.

    Raises:
        ValueError: it is damaged.
    """
    from .export.formats import Artefact

    listed = manifest.get("artefacts", [])
    if not isinstance(listed, list):
        raise ValueError(f"{path}: damaged: its 'artefacts' are {listed!r:.80}")
    try:
        return [Artefact.from_json(entry) for entry in listed]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def listed(folder: Path) -> list[Artefact]:
    """The exported engines that the manifest of a folder lists, as it was just written."""
    path = manifest_path(folder)
    return artefacts(json.loads(path.read_text(encoding="utf-8")), path)


def check_artefact(folder: Path, manifest: dict[str, Any], artefact: Artefact) -> None:
    """Finds every file of an exported engine to be the one that the manifest describes, and none
    beside them: some are loaded because they are there.

    Raises:
        FileNotFoundError, ValueError: as `read_manifest`; a file that it does not list.
    """
    inside = f"{artefact.folder}/"
    for name, told in manifest["files"].items():
        if name.startswith(inside):
            _check_file(folder, name, told)
    there = [file for file in (folder / artefact.folder).rglob("*") if not file.is_dir()]
    names = [file.relative_to(folder).as_posix() for file in there]
    for name in (*sorted(names), inside + artefact.main):
        if name not in manifest["files"]:
            raise ValueError(f"{folder / name}: {MANIFEST} does not list it, and it may be loaded")


def _check_file(folder: Path, name: str, told: Any) -> None:
    file = folder / name
    # Names are relative and lead nowhere else, whatever the system makes of a backslash or a link.
    plain = name == PurePosixPath(name).as_posix() and not {*"\\:\0"} & {*name}
    inside = plain and name[0] not in "/." and ".." not in PurePosixPath(name).parts
    if not inside or not isinstance(told, dict):
        raise ValueError(f"{folder / MANIFEST}: damaged: it lists the file {name!r}")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; {MANIFEST} lists it")
    # A link could lead anywhere, and what it leads to change after it was checked.
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{file}: leads out of the folder: damaged")
    size = file.stat().st_size
    if size != told.get("bytes"):
        raise ValueError(
            f"{file}: {size} bytes where {MANIFEST} says {told.get('bytes')}: cut off or changed"
        )
    if _sha256(file) != told.get("sha256"):
        raise ValueError(f"{file}: not the file that was written (its sha256 differs)")


def manifest_path(folder: Path) -> Path:
    """The manifest in a folder that memcompile wrote; nothing is read yet.

    Raises:
        FileNotFoundError: there is none; the message says what is there.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else f"nothing there{nearest_path(folder)}"
        raise FileNotFoundError(f"{folder}: {found}; expected a folder that memcompile wrote")
    path = folder / MANIFEST
    if not path.is_file():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST} in it (it holds {names}); expected a folder that memcompile "
            "wrote"
        )
    return path


def is_package(folder: Path) -> bool:
    """Whether memcompile wrote the folder, damaged or not."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def all_facts(folder: Path) -> dict[str, Any]:
    """`facts` of every file in a folder and its folders, by its path inside, with slashes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): facts(file) for file in files}


def facts(file: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def own_version() -> str:
    """The installed version of memcompile."""
    try:
        return importlib.metadata.version("memcompile")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"
