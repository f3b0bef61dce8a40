"""The entry of a PTX text: its parameters, and the target it is written for."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# What Triton adds behind a kernel's own parameters.
HIDDEN = ("global_scratch", "profile_scratch")
_KINDS = {".u64": "pointer", ".u32": "i32", ".f32": "fp32", ".b64": "pointer", ".b32": "i32"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of an entry: "pointer", "i32" or "fp32", and its name in the text."""

    kind: str
    name: str


@dataclass(frozen=True)
class Entry:
    """The one entry of a text.

    Attributes:
        version, target: of the text, as "8.7" and "sm_90a".
        start, stop: where the list of parameters lies in the text, brackets left out.
    """

    name: str
    version: str
    target: str
    parameters: tuple[Parameter, ...]
    start: int
    stop: int

    @property
    def forward_compatible(self) -> bool:
        """Whether drivers translate the text for later architectures, too."""
        return self.target[-1].isdigit()


def entry(text: str) -> Entry:
    """The entry of a PTX text that has one.

    Raises:
        ValueError: it has none or several, or a parameter of another kind.
    """
    heads = [*re.finditer(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)", text)]
    version = re.search(r"^\s*\.version\s+([\d.]+)", text, re.M)
    target = re.search(r"^\s*\.target\s+(\w+)", text, re.M)
    if len(heads) != 1 or version is None or target is None:
        raise ValueError(
            f"a PTX text with {len(heads)} entries, .version {version and version[1]}, .target "
            f"{target and target[1]}; expected one of each"
        )
    parameters = []
    for told in heads[0][2].split(","):
        words = told.split()
        if not words:
            continue
        kind = next((_KINDS[word] for word in words if word in _KINDS), None)
        if words[0] != ".param" or kind is None:
            raise ValueError(f"{heads[0][1]}: a parameter {' '.join(words)!r} of unknown kind")
        parameters.append(Parameter(kind, words[-1]))
    start, stop = heads[0].span(2)
    return Entry(heads[0][1], version[1], target[1], tuple(parameters), start, stop)


def drop_hidden(text: str) -> str:
    """The text without Triton's own parameters, which are its last and must not be used.

    Raises:
        ValueError: there are none, or the code reads one.
    """
    found = entry(text)
    hidden = found.parameters[-len(HIDDEN) :]
    if len(found.parameters) < len(HIDDEN) or any(p.kind != "pointer" for p in hidden):
        raise ValueError(
            f"{found.name} ends with {[p.kind for p in hidden]}; expected Triton's "
            f"{' and '.join(HIDDEN)}, two pointers"
        )
    rest = text[: found.start] + text[found.stop :]
    for parameter in hidden:
        if re.search(rf"{re.escape(parameter.name)}(?![\w$])", rest):
            raise ValueError(f"{found.name} reads {parameter.name}, which would be left out")
    kept = text[found.start : found.stop].split(",")[: -len(HIDDEN)]
    return text[: found.start] + ",".join(kept).rstrip() + "\n" + text[found.stop :]


def assemble(text: str) -> bytes:
    """The cubin of a text, by the ptxas that comes with triton, for the target it names.

    Raises:
        ImportError: triton is not installed.
        ValueError: ptxas refuses it.
    """
    import triton

    target = entry(text).target
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = tools / "ptxas"
    # Later architectures have a ptxas of their own, where one does not know all.
    later = tools / "ptxas-blackwell"
    if later.is_file() and int(re.sub(r"\D", "", target)) >= 100:
        tool = later
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(text, encoding="utf-8")
        command = [str(tool), f"--gpu-name={target}", str(source), "-o", str(binary)]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise ValueError(f"ptxas refuses the text: {' '.join(ran.stderr.split())[:500]}")
        return binary.read_bytes()
