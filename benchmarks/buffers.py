"""Memory of a chosen kind of page: ordinary, or huge ones as the engine's pools ask for."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ..runtime import huge_pages

KINDS = ("ordinary", "huge")


def empty(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "ordinary") -> Tensor:
    """An uninitialised CPU tensor in memory pages of `kind`.

    "ordinary" is what torch allocates. "huge" asks for 2 MB pages; whether they came, `huge_share`
    says, once the tensor has been written. Tensors below 2 MB are ordinary in any case.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of memory pages {kind!r}; known: {', '.join(KINDS)}")
    if kind == "ordinary":
        return torch.empty(shape, dtype=dtype)
    return huge_pages.zeros(shape, dtype, torch.device("cpu"))


def copy(tensor: Tensor, kind: str) -> Tensor:
    """The same numbers in memory pages of `kind`."""
    return empty(tuple(tensor.shape), tensor.dtype, kind).copy_(tensor)


def free_memory() -> int | None:
    """Bytes that can be allocated without driving others out; None where it cannot be known."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def huge_share(tensor: Tensor) -> float | None:
    """The part of a CPU tensor's memory that lies in huge pages; None where it cannot be known."""
    smaps = Path("/proc/self/smaps")
    try:
        text = smaps.read_text()
    except OSError:
        return None
    return share_of_mapping(text, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def share_of_mapping(smaps: str, low: int, high: int) -> float | None:
    """Huge pages over resident ones, of the mappings in a smaps text that low .. high touches."""
    resident = huge = 0
    inside = False
    for line in smaps.splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, stop = (int(bound, 16) for bound in found.groups())
            inside = start < high and low < stop
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1])
        elif inside and line.startswith("AnonHugePages:"):
            huge += int(line.split()[1])
    return huge / resident if resident else None
