"""A folder with kernels for two GPUs that are not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from target_case import TARGETS


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
