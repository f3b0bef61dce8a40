"""Completion: commands, options, values and paths, as a shell gets them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_for_this_program(say: Any, shell: str) -> None:
    said = say("completion", shell)
    assert (said.code, said.err) == (0, "")
    assert f"_MEMCOMPILE_COMPLETE={shell}_complete" in said.out and "%(" not in said.out


def test_an_unknown_shell_is_refused(say: Any) -> None:
    said = say("completion", "zhs")
    assert said.code == 2 and "Did you mean 'zsh'?" in said.err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "inspect run eval distill cache completion model.pt"),
        ("in", "inspect 'in it'"),
        ("mo", "model.pt"),
        ("--pol", "--policy"),
        ("--budget 3 --pol", "--policy"),
        ("inspect mo", "model.pt"),
        ("model.pt --kernels ", "auto required off"),
        ("cache ", "show clear"),
        ("run --top", "--top-k --top-p"),
        ("run --prompt-file mo", "model.pt"),
    ],
)
def test_zsh_and_fish_get_commands_and_paths(
    say: Any, monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    """What click's scripts for them read; files are completed by the shell itself."""
    for shell in ("zsh", "fish"):
        word = line.rpartition(" ")[2]
        monkeypatch.setenv("_MEMCOMPILE_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", f"memcompile {line}")
        # zsh counts words, fish gives the one that is being written.
        monkeypatch.setenv("COMP_CWORD", str(line.count(" ") + 1) if shell == "zsh" else word)
        said = say()
        plain = [name for name in shlex.split(expected) if name not in ("model.pt", "in it")]
        assert said.code == 0, said.err
        for name in plain:
            assert name in said.out
        assert ("file" in said.out.split("plain")[0]) == ("model.pt" in expected or word == "in")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_paths(tmp_path: Path) -> None:
    """The script in a real bash, which is asked what it would offer."""
    for name in ("model.pt", "in it"):
        (tmp_path / name).touch()
    program = tmp_path / "bin" / "memcompile"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m memcompile.compiler.cli "$@"\n')
    program.chmod(0o755)
    # compopt speaks to readline, which is not there.
    script = """
    PATH=$PWD/bin:$PATH
    source <(memcompile completion bash)
    compopt() { :; }
    offer() {
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        _memcompile_completion memcompile memcompile
        printf '%s|' "${COMPREPLY[@]}"; echo
    }
    complete -p memcompile
    offer memcompile in
    offer memcompile model.pt --ker
    """
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    told, command_or_path, option = done.stdout.splitlines()
    assert told == "complete -o nosort -F _memcompile_completion memcompile"
    assert command_or_path == "in it|inspect|"
    assert option == "--kernels|"
