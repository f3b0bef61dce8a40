"""What a run leaves behind: a file with the figures and all that they depend on, and a table."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .rules import Bar, cache_sizes

FOLDER = Path(__file__).parent / "results"
REQUIRED = ("benchmark", "date", "command", "machine", "versions", "commit", "setting", "rows")


def machine() -> dict[str, Any]:
    """The processor, its caches, memory and memory pages, and the threads that torch uses."""
    return {
        "name": platform.node(),
        "processor": processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": {f"L{level}": size for level, size in cache_sizes().items()},
        "isa": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def processor() -> str:
    """The processor's name as it gives it, with its families of instructions left out."""
    text = _read("/proc/cpuinfo") or ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return "{model name} (family {cpu family}, model {model})".format(
        **{"cpu family": "?", "model": "?", **fields}
    )


def versions() -> dict[str, str | None]:
    """What the figures were made with."""
    from .bandwidth import compiler

    found: dict[str, str | None] = {
        "memcompile": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for library in ("triton", "transformers", "numpy"):
        try:
            found[library] = __import__("importlib.metadata").metadata.version(library)
        except ImportError:
            found[library] = None
    path = compiler()
    told = _output(path, "--version") if path else None
    found["compiler"] = told.splitlines()[0] if told else None
    return found


def commit(root: Path = Path(__file__).parents[1]) -> dict[str, Any]:
    """The revision of the checkout, and whether files differ from it; None outside of one."""
    revision = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return {
        "revision": revision.strip() if revision else None,
        "dirty": bool(changes.strip()) if changes is not None else None,
    }


def portable(arguments: list[str]) -> list[str]:
    """Arguments without `--out PATH`: where a result was put is one machine's own affair."""
    kept: list[str] = []
    for i, argument in enumerate(arguments):
        value_of_out = i > 0 and arguments[i - 1] == "--out"
        if not (value_of_out or argument == "--out" or argument.startswith("--out=")):
            kept.append(argument)
    return kept


def record(
    name: str, rows: list[dict[str, Any]], setting: dict[str, Any], bars: list[Bar]
) -> dict[str, Any]:
    """A run's whole result, ready to be written."""
    return {
        "benchmark": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *portable(sys.argv[1:])],
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "setting": setting,
        "bars": [bar.to_json() for bar in bars],
        "rows": rows,
    }


def write(result: dict[str, Any], folder: Path, label: str) -> Path:
    """Writes a result as NAME-DATE-LABEL.json, whole or not at all; returns where.

    Raises:
        ValueError: a figure that is no number.
    """
    text = json.dumps(result, indent=1, allow_nan=False, default=str) + "\n"
    when = result["date"].replace(":", "").replace("+0000", "Z").replace("-", "")
    plain = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower()[:40]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}-{when}-{plain}.json"
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, prefix=f".{path.stem}-", suffix=".tmp", delete=False
    ) as beside:
        beside.write(text)
    os.chmod(beside.name, 0o644)
    os.replace(beside.name, path)
    return path


def show(
    title: str,
    heads: list[str],
    cells: list[list[str]],
    bars: list[Bar],
    echo: Callable[[str], None] = print,
) -> None:
    """The table and the bars, as plain text where no terminal is."""
    from rich.console import Console
    from rich.table import Table

    wide = None if sys.stdout.isatty() else 200
    console = Console(width=wide)
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="right")
    for row in cells:
        table.add_row(*row)
    with console.capture() as captured:
        console.print(table)
        for bar in bars:
            style = {None: "dim", True: "green", False: "bold red"}[bar.met]
            console.print(f"  {bar}", style=style, highlight=False)
    echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
