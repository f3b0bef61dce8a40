"""`python -m memcompile.benchmarks [NAME ...]`: runs benchmarks, writes what they found."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import results
from .registry import BENCHMARKS, KERNELS, Settings, find


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    listing = "\n".join(f"  {b.name:16} {b.what}" for b in BENCHMARKS.values())
    parser = argparse.ArgumentParser(
        prog="python -m memcompile.benchmarks",
        description=f"Side-by-side measurements. Without a name all of them run:\n{listing}",
        epilog="On a GPU: python -m memcompile.benchmarks.gpu",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run")
    parser.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    parser.add_argument("--quick", action="store_true", help="small sizes: that it runs, no proof")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--contexts", type=int, nargs="+", help="lengths to measure at")
    parser.add_argument("--rounds", type=int, help="turns of each contender (9; quick: 2)")
    parser.add_argument("--threads", type=int, help="threads (torch's own choice)")
    parser.add_argument("--kernels", choices=KERNELS, default=KERNELS[0])
    parser.add_argument("--min-context", type=int, help="scout's min_context (its budget)")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="where results go")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    if given.list:
        for benchmark in BENCHMARKS.values():
            print(f"{benchmark.name:16} {benchmark.what}")
        return 0
    try:
        chosen = [find(name) for name in given.names] or list(BENCHMARKS.values())
        if given.contexts is not None and min(given.contexts) < 1:
            raise ValueError(f"--contexts {given.contexts}: give lengths of at least 1")
        if given.rounds is not None and given.rounds < 1:
            raise ValueError(f"--rounds {given.rounds}: give at least 1")
        if given.threads is not None and given.threads < 1:
            raise ValueError(f"--threads {given.threads}: give at least 1")
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    settings = Settings(
        quick=given.quick,
        contexts=tuple(given.contexts) if given.contexts else None,
        rounds=given.rounds or (2 if given.quick else 9),
        kernels=given.kernels,
        min_context=given.min_context,
    )
    missed = 0
    for benchmark in chosen:
        with torch.no_grad():
            outcome = benchmark.run(settings)
        setting = {"quick": settings.quick, "kernels": settings.kernels, **outcome.setting}
        result = results.record(benchmark.name, outcome.rows, setting, outcome.bars)
        result["left_out"] = outcome.left_out
        path = results.write(result, given.out, results.processor())
        results.show(
            f"{benchmark.name}: {benchmark.what}, {torch.get_num_threads()} threads"
            + (" (quick)" if settings.quick else ""),
            [column.head for column in outcome.columns],
            [[column.text(row) for column in outcome.columns] for row in outcome.rows],
            outcome.bars,
        )
        for reason in outcome.left_out:
            print(f"  left out: {reason}")
        print(f"  {path}")
        missed += sum(bar.met is False for bar in outcome.bars)
    return 1 if given.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
