"""`python -m memcompile.benchmarks`: a step on reference operations, dense beside scout."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import compile as compile_model
from ..models.networks import induction

OPTIONS: dict[str, Any] = {"budget": 2048, "dense_layers": 0}


def step_times(contexts: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row a context: median milliseconds of a decoded token, pages and bytes it reads.

    The context is read densely, once, growing from row to row. Dense and scout take turns on the
    same memory, and each step is taken back, so that both see the same tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        engine = compile_model(induction.save(folder), "scout", **OPTIONS)
    tokens, _ = induction.prompt(max(contexts) + 1)
    rows: list[dict[str, Any]] = []
    held = 0
    for context in sorted(contexts):
        engine.prefill(tokens[:, held:context])
        held = context
        ask = tokens[:, -1:]
        reads: dict[str, Callable[[torch.Tensor], torch.Tensor]]
        reads = {"dense": engine.prefill, "scout": engine}
        times: dict[str, list[float]] = {name: [] for name in reads}
        row: dict[str, Any] = {"context": context}
        for turn in range(repeats + 1):
            for name, read in reads.items():
                before = engine.stats().to_json()
                started = time.perf_counter()
                read(ask)
                seconds = time.perf_counter() - started
                after = engine.stats().to_json()
                engine.rewind(1)
                if turn == 0:  # the first one warms up
                    for figure in ("pages_read", "bytes_read"):
                        row[f"{name}_{figure}"] = after[figure] - before[figure]
                else:
                    times[name].append(seconds)
        row.update({f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()})
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m memcompile.benchmarks", description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    result = {
        "what": "one decoded token of the induction network, scout " + json.dumps(OPTIONS),
        "caution": "reference operations in PyTorch: no generated kernel takes part",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "repeats": given.repeats,
        "rows": step_times(given.contexts, given.repeats),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
