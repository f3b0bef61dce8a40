"""Writing, selecting and linear layers on every instruction set, up to the end of their memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memcompile.codegen.cpp import build


def fenced(tensor: Tensor) -> Tensor:
    """A copy that ends where memory does: whoever reads on ends the process."""
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole
    libc = ctypes.CDLL(None)
    assert not libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(mmap.PAGESIZE), 0)
    raw = torch.frombuffer(memory, dtype=torch.uint8, offset=whole - size, count=size)
    return raw.view(tensor.dtype).view(tensor.shape).copy_(tensor)


FORCED = """
import sys
sys.path += PATHS
import hypothesis, torch
from kernel_case import Shape
import test_cpp_append_index as a, test_cpp_linear as l, test_cpp_score_select as s
import test_cpp_among as m, test_cpp_fold as f
from test_cpp_variants import fenced

def pools(laid, dtype=None, made=a.empty):
    keys, values, index = made(laid, dtype)
    keys, index = fenced(keys), [fenced(pool) for pool in index]
    shared = laid.spec.shared_kv
    return keys, keys[..., : laid.spec.value_dim] if shared else fenced(values), index

a.empty, a.tokens = pools, lambda *given, made=a.tokens: fenced(made(*given))
operators = a.cpp.load(a.SPECS)
for spec in a.SPECS:
    for seed in range(2):
        laid = a.lay_out(spec, Shape((137, 20), (5, 0), rows=5, seed=seed))
        a.check(laid, a.ends(laid, [1, 70]), operators)

def case(*given):
    made = s.lay_out(*given)
    made.query, made.table = fenced(made.query), fenced(made.table)
    made.records = [fenced(record) for record in made.records]
    return made

operators = s.cpp.load(s.SPECS)
for spec in s.SPECS:
    for seed in range(3):
        shape = Shape((spec.page_size * 40, 137), (6, 5), rows=6, holes=10, seed=seed)
        for choice in (s.Choice(), s.Choice(2, 2, 9)):
            s.check_exact(case(spec, shape, s.whole), choice, operators)
            s.check_exact(case(spec, shape, s.whole, 0.3 / spec.key_dim), choice, operators)
            s.check_close(case(spec, shape), choice, operators)

def folded(spec, position, lengths, seed):
    made = f.lay_out_fold(spec, position, lengths, 4, 5, seed=seed)
    made.given = {k: fenced(v) if hasattr(v, "numel") else v for k, v in made.given.items()}
    return f.run(made, operators)

operators = f.cpp.load(f.FOLDS)
for spec in f.FOLDS:
    for seed in range(3):
        folded(spec, (7, 90), (133, 20), seed).check()

operators = m.cpp.load(m.SPECS)
for spec in m.SPECS:
    for seed in range(3):
        made = case(spec, Shape((spec.page_size * 40, 137), (6, 5), rows=6, seed=seed), s.whole)
        lists = fenced(m.candidates(made.table, 6, 33, seed))
        m.check(made, lists, (1, 1, 9), operators)

linear = l.linear.load()
def operator(input, weight, bias):
    return linear(fenced(input), fenced(weight), None if bias is None else fenced(bias))
for dtype in l.DTYPES:
    for rows in l.ROWS:
        l.check(operator, dtype, rows, 50 + rows, 77, rows % 2 == 0, rows)
print("right")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fences are made by mprotect")
@pytest.mark.parametrize("isa", build.isas())
def test_right_on(isa: str) -> None:
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    answer = subprocess.run(
        [sys.executable, "-c", FORCED.replace("PATHS", repr(paths))],
        env={**os.environ, "MEMCOMPILE_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "is not an instruction set" in answer.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert answer.stdout == "right\n", f"exit {answer.returncode}: {answer.stderr}"
