"""Runs the commands of a page as a shell would, and puts what they say into the page's terms."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# What differs between machines and runs, and what a page has in its place.
WILDCARDS = (
    (r"\d+\.\d+ tokens/s", "… tokens/s"),
    (r"read in \d+\.\d+ s\b", "read in … s"),
    (r"^seconds: .*$", "seconds: …"),
    (r"largest difference [\d.e-]+, allowed [\d.e-]+", "largest difference …, allowed …"),
    (r"error over eager [\d.e-]+", "error over eager …"),
    (r'^( *"(?:prompt_)?seconds": |  "tokens_per_second": )[\d.e+-]+', r"\1…"),
)
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = ("memcompile", "python")


def commands(block: str) -> list[tuple[str, str]]:
    """The commands of a block, without `$ `, and what the page shows of each.

    A command whose line ends within a here-document takes the lines up to its end with it.
    """
    found: list[tuple[str, str]] = []
    for line in block.splitlines():
        inside = found and not found[-1][1] and _is_open(found[-1][0])
        if inside:
            found[-1] = (f"{found[-1][0]}\n{line}", "")
        elif line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            command, shown = found[-1]
            found[-1] = (command, f"{shown}{line}\n")
    return found


def _is_open(command: str) -> bool:
    """Whether a here-document, `<<'END'`, has begun and not ended."""
    begun = re.search(r"<<'(\w+)'", command)
    return begun is not None and command.splitlines()[-1] != begun[1]


class Shell:
    """A shell in one folder, where `memcompile` and `python` run in this process.

    Every other command is bash's, and so is what stands before the last `|`. `export NAME=VALUE`
    and `echo $?` are known.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.code = folder, patch, 0

    def run(self, line: str) -> str:
        """What a line says, on stdout and stderr alike, in the page's terms."""
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            self.patch.setenv(name, value)
            return ""
        before, _, last = line.rpartition(" | ")
        if line == "echo $?":
            said = f"{self.code}\n"
        elif last.split()[0] in OURS:
            command, _, target = last.partition(" > ")
            stdin = self._bash(before).encode() if before else b""
            said, out = self._here(shlex.split(command), stdin, bool(target))
            if target:
                (self.folder / target).write_bytes(out)
        else:
            said = self._bash(line)
        return self._plain(said)

    def _bash(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.code = done.returncode
        return done.stdout

    def _here(self, words: list[str], stdin: bytes, apart: bool) -> tuple[str, bytes]:
        """Runs `memcompile …` or `python FILE`; with `apart`, stdout is given by itself."""
        from memcompile.compiler.cli import main

        said, out = io.BytesIO(), io.BytesIO()
        with self._streams(said, out if apart else said, stdin):
            if words[0] == "memcompile":
                self.code = main(words[1:])
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", words[1:])
                    runpy.run_path(words[1], run_name="__main__")
                self.code = 0
        return said.getvalue().decode(), out.getvalue()

    @contextmanager
    def _streams(self, err: io.BytesIO, out: io.BytesIO, stdin: bytes):
        def text(raw: io.BytesIO) -> io.TextIOWrapper:
            return io.TextIOWrapper(raw, encoding="utf-8", write_through=True)

        streams = {"stdin": text(io.BytesIO(stdin)), "stdout": text(out), "stderr": text(err)}
        with pytest.MonkeyPatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            yield
            for stream in streams.values():
                stream.detach()

    def _plain(self, said: str) -> str:
        for pattern, instead in WILDCARDS:
            said = re.sub(pattern, instead, said, flags=re.MULTILINE)
        lines = said.replace(f"{self.folder}{os.sep}", "…/").splitlines()
        return "".join(f"{line.rstrip()}\n" for line in lines)


def replay(page: str, shell: Shell) -> str:
    """The page with what its commands say now."""

    def again(block: re.Match[str]) -> str:
        said = [(command, shell.run(command)) for command, _ in commands(block[1])]
        return "```console\n" + "".join(f"$ {c}\n{out}" for c, out in said) + "```"

    return BLOCK.sub(again, page)
