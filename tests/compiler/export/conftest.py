"""A folder with kernels for two GPUs that are not there, and the C++ example, built."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from target_case import TARGETS

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "cpp"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, built as its README says."""
    folder = tmp_path_factory.mktemp("cpp") / "build"
    torch_is = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["-S", str(EXAMPLE), "-B", str(folder), torch_is], ["--build", str(folder)]):
        ran = subprocess.run(["cmake", *command], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "generate"


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are kept: nothing is in it at the start."""
    return tmp_path_factory.mktemp("kernel_cache")


@pytest.fixture(scope="session")
def targeted(network: Path, kernel_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `memcompile MODEL --policy dense --target ...` wrote."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from memcompile.compiler.cli import main

    folder = tmp_path_factory.mktemp("targeted") / "engine"
    arguments = [str(network), "--policy", "dense", "--target", ",".join(TARGETS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMCOMPILE_CACHE", str(kernel_cache))
        assert main([*arguments, "--out", str(folder), "--quiet"]) == 0
    return folder
