"""`python -m memcompile.benchmarks.gpu`: what the generated kernels do on the GPU that is there.

First every kernel against float64, then decode steps against PyTorch's and captured in a graph,
until the time is spent; what was left out is said. Needs torch, triton and numpy.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import results
from .gpu_cases import CASES, TINY, Case
from .gpu_decode import DTYPES, Place, bandwidth, decode, needed_bytes, release, replays
from .gpu_numerics import check
from .gpu_state import timed
from .memory_step import Load
from .rules import last_level_cache

MINUTES = 7.0
NUMERICS_SHARE = 0.45  # of the time, before the first figure of speed is due
BATCHES = (1, 8, 32)
CONTEXTS = (8192, 32768, 131072)
CHUNKS = (512, 4096)  # rows of a chunk that is written into a recurrent state
SCOUT = {"budget": 2048, "sinks": 64, "window": 256, "compensate": True, "dense_layers": 0}
DRY_CACHE = 4 << 10
DRY_KERNELS = ("reference", "cpp", "triton")


@dataclass
class Clock:
    """The time there is, and what it did not suffice for."""

    seconds: float
    now: Callable[[], float] = time.monotonic
    skipped: list[str] = field(default_factory=list)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.started

    def allows(self, what: str, need: float, share: float = 1.0) -> bool:
        """Whether `need` more seconds fit into that share of the time; keeps what was refused."""
        if self.spent + need <= share * self.seconds:
            return True
        self.skipped.append(f"{what}: {self.spent:.0f} of {share * self.seconds:.0f} s were spent")
        return False


def gpu_place() -> Place:
    """The GPU with its Triton kernels.

    Raises:
        RuntimeError: there is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU was found; --dry runs the same lines on the CPU, at small sizes")
    from .. import codegen

    device = torch.device("cuda")
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", 0) or last_level_cache()
    return Place(device, partial(codegen.load, device="cuda"), cache, verified=True)


def dry_place(kernels: str) -> Place:
    """The CPU at small sizes, with one of DRY_KERNELS."""
    device = torch.device("cpu")
    if kernels == "cpp":
        from .. import codegen

        load: Load = partial(codegen.load, device="cpu")
        return Place(device, load, DRY_CACHE, verified=False)
    if kernels == "triton":
        # Read when triton is imported. Products of bfloat16 are wrong in its interpreter.
        os.environ["TRITON_INTERPRET"] = "1"
        from ..codegen import triton

        return Place(device, triton.load, DRY_CACHE, verified=False, dtypes=(torch.float16,))
    return Place(device, None, DRY_CACHE, verified=False)


def gpu(where: Place) -> dict[str, Any]:
    """The GPU's name, driver, clocks and memory."""
    if where.device.type != "cuda":
        return {"name": "none (dry run on the CPU)"}
    properties = torch.cuda.get_device_properties(where.device)
    found: dict[str, Any] = {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "L2_bytes": where.cache,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(where.device))),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
        found |= dict(zip(asked.split(","), told.stdout.splitlines()[0].split(", "), strict=True))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        found["driver_version"] = None
    return found


def numerics(
    where: Place, clock: Clock, cases: Sequence[Case], share: float
) -> tuple[list[dict[str, Any]], list[tuple[Case, torch.dtype]]]:
    """Checks of as many cases as that share of the time allows; and those that remain."""
    done, left = [], []
    for case in cases:
        for dtype in where.dtypes:
            if clock.spent > share * clock.seconds:
                left.append((case, dtype))
                continue
            done.append(one_check(where, case, dtype))
    return done, left


def one_check(where: Place, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """A check's row; a kernel that breaks is a failure, not the end of the run."""
    try:
        return check(case, dtype, where.device, where.load)
    except Exception as reason:  # compilers and drivers raise anything
        return {
            "case": case.name,
            "dtype": str(dtype).removeprefix("torch."),
            "kernel": None,
            "error": None,
            "allowed": None,
            "passed": False,
            "raised": f"{type(reason).__name__}: {str(reason)[:300]}",
        }


def run(where: Place, clock: Clock, rounds: int) -> dict[str, Any]:
    """All sections, most important first."""
    contexts: tuple[int, ...] = CONTEXTS
    batches: tuple[int, ...] = BATCHES
    cases: tuple[Case, ...] = CASES
    scout = dict(SCOUT)
    if not where.verified:
        contexts, batches, cases = (96,), (1, 2), TINY
        scout |= {"budget": 64, "sinks": 8, "window": 8, "page_size": 8}
    left_out = [str(dtype).removeprefix("torch.") for dtype in DTYPES if dtype not in where.dtypes]
    if left_out:
        clock.skipped.append(f"{', '.join(left_out)}: Triton's interpreter multiplies it wrongly")
    checks, left = numerics(where, clock, cases, NUMERICS_SHARE)
    ceiling = bandwidth(where, rounds)
    rows: list[dict[str, Any]] = []
    # The longest of the middle first; batch 1 is where others lose.
    middle = contexts[len(contexts) // 2]
    ordered = sorted(
        ((batch, tokens) for batch in batches for tokens in contexts),
        key=lambda pair: (pair[1] != middle, pair[0]),
    )
    graph: dict[str, Any] = {}
    for at, (batch, tokens) in enumerate(ordered):
        what = f"decode at batch {batch}, context {tokens}"
        if at == 1 and clock.allows("captured step", 5):
            graph = _guarded(partial(replays, where, where.dtypes[0], scout, middle))
        if where.device.type == "cuda":
            free = torch.cuda.mem_get_info(where.device)[0]
            if 1.15 * needed_bytes(where, batch, tokens, scout) > free:
                clock.skipped.append(f"{what}: {free >> 30} GiB of memory are free")
                continue
        if clock.allows(what, 25 if where.verified else 0):
            flex = tokens == middle or clock.spent < 0.7 * clock.seconds
            row = _guarded(
                partial(decode, where, batch, tokens, where.dtypes[0], scout, rounds, ceiling, flex)
            )
            rows.append({"batch": batch, "context": tokens, **row})
            release(where)
    states: list[dict[str, Any]] = []
    if clock.allows("recurrent states", 20 if where.verified else 0):
        rows_of_chunks = CHUNKS if where.verified else (40,)
        try:
            states = timed(where, batches, rows_of_chunks, rounds, ceiling)
        except Exception as reason:  # as in _guarded
            clock.skipped.append(f"recurrent states: {type(reason).__name__}: {str(reason)[:300]}")
    for case, dtype in left:
        if clock.allows(f"numerics of {case.name} in {dtype}", 5):
            checks.append(one_check(where, case, dtype))
    return {
        "verified": where.verified,
        "gpu": gpu(where),
        "bandwidth": ceiling,
        "scout": scout,
        "numerics": checks,
        "captured_step": graph,
        "decode": rows,
        "states": states,
        "skipped": clock.skipped,
        "seconds": clock.spent,
    }


def _guarded(measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why not."""
    try:
        return measured()
    except Exception as reason:  # out of memory, a kernel that does not compile: go on
        return {"raised": f"{type(reason).__name__}: {str(reason)[:300]}"}


def table(found: dict[str, Any]) -> str:
    """The run as plain text; figures that are not a GPU's are marked."""
    mark = "" if found["verified"] else " (unverified)"
    lines = [f"{found['gpu']['name']}: copy {found['bandwidth'] / 1e9:.0f} GB/s{mark}"]
    passed = sum(checked["passed"] for checked in found["numerics"])
    lines.append(f"numerics: {passed} of {len(found['numerics'])} within bounds{mark}")
    for checked in found["numerics"]:
        if not checked["passed"]:
            why = checked.get("raised")
            why = why or f"error {checked['error']:.2e} > {checked['allowed']:.2e}"
            lines.append(f"  FAILED {checked['case']} {checked['dtype']}: {why}")
    if found["captured_step"]:
        told = (f"{name} {value}" for name, value in found["captured_step"].items())
        lines.append(f"captured step: {', '.join(told)}{mark}")
    heads = (
        *("batch", "context", "best of PyTorch", "µs", "flex µs", "dense µs", "×", "% bw"),
        *("scout µs", "×", "× floor", "score+select µs", "eager µs"),
    )
    cells = [list(heads)]
    for row in found["decode"]:
        if "raised" in row:
            lines.append(
                f"  FAILED batch {row['batch']}, context {row['context']}: {row['raised']}"
            )
            continue
        us, best = row["torch_us"], row["baseline"]
        cells.append(
            [
                str(row["batch"]),
                str(row["context"]),
                best or "none ran",
                f"{us[best]:.1f}" if best else "-",
                f"{us['flex']:.1f}" if "flex" in us else "-",
                f"{row['dense']['us']:.1f}",
                f"{row['dense']['times_baseline']:.2f}" if best else "-",
                f"{100 * row['dense']['bandwidth_share']:.0f}",
                f"{row['scout']['us']:.1f}",
                f"{row['scout']['times_baseline']:.2f}" if best else "-",
                f"{row['scout']['times_floor']:.2f}",
                f"{row['score_select_us']:.1f}",
                f"{row['eager_us']:.1f}",
            ]
        )
    for row in found.get("states", ()):
        lines.append(
            f"{row['case']} batch {row['batch']}: {row['us']:.1f} µs, "
            f"{100 * row['bandwidth_share']:.0f} % bw{mark}"
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        text = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        lines.append("  ".join(text) + (mark if line is not cells[0] else ""))
    lines += [f"left out: {reason}" for reason in found["skipped"]]
    lines.append(f"{found['seconds']:.0f} s{mark}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m memcompile.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, small: that it runs")
    parser.add_argument(
        "--kernels",
        choices=DRY_KERNELS,
        default=DRY_KERNELS[0],
        help="of a dry run: references, C++, or Triton in its interpreter (float16 alone)",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of time to spend at most")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="where the result goes")
    given = parser.parse_args(arguments)
    try:
        if given.minutes <= 0 or given.rounds < 1:
            raise RuntimeError("--minutes must be above 0 and --rounds at least 1")
        where = dry_place(given.kernels) if given.dry else gpu_place()
    except RuntimeError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    with torch.no_grad():
        found = run(where, Clock(60 * given.minutes), given.rounds)
    result = results.record("gpu", found.pop("decode"), {"rounds": given.rounds}, [])
    result |= found
    path = results.write(result, given.out, found["gpu"]["name"])
    print(table({**found, "decode": result["rows"]}))
    print(path)
    return 0 if all(checked["passed"] for checked in found["numerics"]) else 1


if __name__ == "__main__":
    sys.exit(main())
