"""Runs `numerics_*.py` in processes of their own: on a GPU, or interpreted where there is none."""

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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_kernels_compute_what_the_references_do(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "MEMCOMPILE_CACHE": str(tmp_path)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    file = Path(__file__).with_name(name)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", str(file)],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
