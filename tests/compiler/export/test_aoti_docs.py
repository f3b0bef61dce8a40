"""What docs/shipping/aoti.md and examples/cpp/README.md say works by copy and paste."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


@pytest.mark.long
def test_the_pages_work_by_copy_and_paste(tmp_path: Path) -> None:
    for name in ("models", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    script = f'#!/bin/sh\nexec {sys.executable} -m memcompile.compiler.cli "$@"\n'
    (tools / "memcompile").write_text(script)
    (tools / "memcompile").chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "MEMCOMPILE_KERNELS": "auto"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

    def run(*command: str) -> str:
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    (build,) = blocks("docs/shipping/aoti.md", "bash")
    (code,) = blocks("docs/shipping/aoti.md", "python")
    (program,) = blocks("examples/cpp/README.md", "bash")
    run("bash", "-ec", build)
    text = run(sys.executable, "-I", "-c", code)
    assert len(text.strip()) > 8
    export, *rest = program.splitlines()
    assert export.partition(" --emit ")[0] == build.partition(" --emit ")[0].strip()
    said = run("bash", "-ec", "\n".join(rest))  # the engine is there already
    assert len(said.splitlines()[-1].split()) == 32  # below what cmake says
