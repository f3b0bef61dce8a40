"""Writing, selecting and linear layers on the other instruction sets this machine runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memcompile.codegen.cpp import build

FORCED = """
import sys
sys.path += {paths!r}
import hypothesis, torch
from kernel_case import Shape
import test_cpp_append_index as a, test_cpp_linear as l, test_cpp_score_select as s

appending, choosing = a.cpp.load(a.SPECS), s.cpp.load(s.SPECS)
for spec in a.SPECS:
    for seed in range(2):
        laid = a.lay_out(spec, Shape((137, 20), (5, 0), rows=5, seed=seed))
        a.check(laid, a.ends(laid, [1, 70]), appending)
for spec in s.SPECS:
    for seed in range(3):
        shape = Shape((spec.page_size * 40, 137), (6, 5), rows=6, holes=10, seed=seed)
        for choice in (s.Choice(), s.Choice(2, 2, 9)):
            s.check_exact(s.lay_out(spec, shape, s.whole), choice, choosing)
            s.check_exact(s.lay_out(spec, shape, s.whole, 0.3 / spec.key_dim), choice, choosing)
            s.check_close(s.lay_out(spec, shape), choice, choosing)
operator = l.linear.load()
for dtype in l.DTYPES:
    for rows in l.ROWS:
        l.check(operator, dtype, rows, 50 + rows, 77, rows % 2 == 0, rows)
print("right")
"""


@pytest.mark.parametrize("isa", build.isas()[1:])
def test_right_on(isa: str) -> None:
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    answer = subprocess.run(
        [sys.executable, "-c", FORCED.format(paths=paths)],
        env={**os.environ, "MEMCOMPILE_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "is not an instruction set" in answer.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert answer.stdout == "right\n", answer.stderr
