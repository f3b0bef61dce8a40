"""Runs `numerics_*.py` in processes of their own: on a GPU, or interpreted where there is none.

The interpreter is slow: what is marked long in them is interpreted in the long suite alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
FILES = (
    "numerics_attend.py",
    "numerics_index.py",
    "numerics_levels.py",
    "numerics_state.py",
    "numerics_plugin.py",
    "numerics_step.py",
)
WITH_LONG = ("numerics_attend.py", "numerics_index.py")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "long"),
    [
        *((name, False) for name in FILES),
        *(pytest.param(name, True, marks=pytest.mark.long) for name in WITH_LONG),
    ],
)
def test_kernels_compute_what_the_references_do(name: str, long: bool, tmp_path: Path) -> None:
    environment = {**os.environ, "MEMCOMPILE_CACHE": str(tmp_path)}
    options = ["-q", "-x", "-p", "no:cacheprovider"]
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    if long or torch.cuda.is_available():
        options.append("--long")
    file = Path(__file__).with_name(name)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
