"""Fixtures of the command line: a way to call it, a network, and a folder built from that."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from command_case import SMALL, Said


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in an empty folder, without a terminal."""
    from memcompile.compiler.cli import main

    monkeypatch.delenv("MEMCOMPILE_DEBUG", raising=False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The induction network, as a transformers folder."""
    from memcompile.models.networks import induction

    return induction.save(tmp_path_factory.mktemp("models") / "induction.v1")


@pytest.fixture(scope="session")
def engine_folder(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `build` makes of it."""
    from memcompile.compiler.cli import main

    folder = tmp_path_factory.mktemp("built") / "engine"
    assert main([str(network), *SMALL, "--out", str(folder), "--quiet"]) == 0
    return folder
