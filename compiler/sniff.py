"""What a file is, told by its first bytes and never by its name; nothing of it is executed."""

from __future__ import annotations

import itertools
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GGUF", "a GGUF file"),
    (0, b"lmgg", "a GGML file"),
    (0, b"\x89PNG\r\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x7fELF", "a program or shared library (ELF)"),
    (0, b"MZ", "a Windows program or library"),
    (0, b"\xcf\xfa\xed\xfe", "a program or shared library (Mach-O)"),
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras?)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\x00", "an xz archive"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (4, b"TFL3", "a TensorFlow Lite file"),
    (257, b"ustar", "a tar archive"),
)
_SAFETENSORS_HEADER_LIMIT = 100_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        kind: "export", "torch-save" (a zip or a legacy stream that torch.save wrote), "pickle",
            "safetensors", or "foreign".
        words: a noun phrase for messages, such as "a GGUF file".
    """

    kind: str
    words: str


def sniff(path: Path) -> Found:
    """Says what the file at `path` is.

    Raises:
        OSError: it cannot be opened or read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
        if not head:
            return Found("foreign", "an empty file")
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return _zip(file)
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return _pickle(file)
    for offset, magic, words in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return Found("foreign", words)
    if head[8:9] == b"{":
        (length,) = struct.unpack("<Q", head[:8])
        if 2 <= length <= _SAFETENSORS_HEADER_LIMIT:
            if length + 8 <= size:
                return Found("safetensors", "a safetensors file")
            return Found("foreign", "a truncated safetensors file (it ends inside its header)")
    return Found("foreign", _text(head) or _protobuf(head) or _unknown(head))


def pickled_names(stream: IO[bytes], limit: int = 4) -> list[str]:
    """The classes and functions a pickle names, read from its opcodes without running any.

    Returns:
        At most `limit` dotted names, those of torch's own tensor machinery left out.
    """
    names: dict[str, None] = {}
    strings: list[str] = []
    memo: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("GLOBAL", "INST"):
                names[str(argument).replace(" ", ".")] = None
            elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                names[f"{strings[-2]}.{strings[-1]}"] = None
            elif opcode.name == "MEMOIZE":
                memo.append(strings[-1] if strings else "")
            elif opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
                strings.append(memo[argument] if argument < len(memo) else "")
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, EOFError, IndexError, UnicodeDecodeError):
        pass  # a damaged pickle still names what came before the damage
    machinery = ("torch._utils.", "torch.Float", "torch.Half", "torch.Long", "collections.Ordered")
    return [name for name in names if not name.startswith(machinery)][:limit]


def _zip(file: IO[bytes]) -> Found:
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [entry for entry in archive.namelist() if not entry.endswith("/")]
            # Cut off, the directory that is found may be that of an archive inside this one.
            whole = not entries or min(entry.header_offset for entry in archive.infolist()) == 0
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError):
        return Found("foreign", "a truncated or damaged zip archive (its directory is missing)")
    if not whole:
        return Found("foreign", "a truncated or damaged zip archive (its directory is missing)")
    if not entries:
        return Found("foreign", "an empty zip archive")
    root = entries[0].split("/")[0] + "/"
    inside = {entry.removeprefix(root) for entry in entries}
    if "archive_format" in inside:
        return Found("export", "a torch.export archive")
    if "serialized_exported_program.json" in inside | set(entries):
        words = "a torch.export archive of the format before torch 2.8, which is made of pickles"
        return Found("foreign", words)
    if "constants.pkl" in inside and any(entry.startswith("code/") for entry in inside):
        return Found("foreign", "a TorchScript archive")
    if "data.pkl" in inside:
        return Found("torch-save", "a file written by torch.save")
    if all(entry.endswith(".npy") for entry in entries):
        return Found("foreign", "an archive of NumPy arrays (npz)")
    shown = ", ".join(repr(entry) for entry in entries[:3])
    more = ", ..." if len(entries) > 3 else ""
    return Found("foreign", f"a zip archive without a model (it holds {shown}{more})")


def _pickle(file: IO[bytes]) -> Found:
    """torch.save before zip archives began with a pickled magic number."""
    file.seek(0)
    try:
        opening = [argument for _, argument, _ in itertools.islice(pickletools.genops(file), 3)]
    except (ValueError, EOFError):
        return Found("foreign", "a truncated or damaged Python pickle")
    if _LEGACY_MAGIC in opening:
        return Found("torch-save", "a file written by torch.save (legacy format)")
    return Found("pickle", "a Python pickle")


def _text(head: bytes) -> str:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # a character cut at the end of what was read is no fault
            return ""
        text = head[: error.start].decode("utf-8")
    if any(character < " " and character not in "\t\n\r\f" for character in text):
        return ""
    start = text.lstrip()[:64].lower()
    if start.startswith("version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull` to get the file itself)"
    if start.startswith(("<!doctype html", "<html")):
        return "an HTML page (a failed download?)"
    if start.startswith(("{", "[")):
        return "a JSON text"
    return "a text file"


def _protobuf(head: bytes) -> str:
    """ONNX has no magic: field 1 (ir_version) is a small varint, then a field of ModelProto."""
    if len(head) > 3 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] in b"\x12\x1a\x3a\x42":
        return "an ONNX protobuf"
    return ""


def _unknown(head: bytes) -> str:
    return f"an unknown binary format (it begins with {head[:8].hex(' ')})"
