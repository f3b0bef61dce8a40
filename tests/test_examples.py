"""The examples run from anywhere, small, and say what they are there to show.

Each checks what it claims by itself, and ends with an exit code if that does not hold.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUN = {
    "backend.py": ["--context", "504", "--max-new-tokens", "8"],
    "chat.py": [],
    "compile_transformers.py": ["--max-new-tokens", "8"],
    "long_document.py": ["--length", "1024", "--budget", "160", "--facts", "4"],
    "own_memory.py": ["--prompts", "8"],
}


def run(folder: Path, name: str) -> str:
    """What an example prints, run in an empty folder as `python examples/NAME` in a shell."""
    kept = ("PATH", "PYTHONPATH", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "USER")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *RUN[name]],
        cwd=folder,
        env={
            **{variable: os.environ[variable] for variable in kept if variable in os.environ},
            **{"HOME": str(folder), "MEMCOMPILE_CACHE": str(folder / "cache")},
            **{"MEMCOMPILE_KERNELS": "off", "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def pages(text: str) -> tuple[int, int]:
    """The pages that were read, and those of dense."""
    (found,) = re.findall(r"(\d+) of (\d+) pages read", text)
    return int(found[0]), int(found[1])


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*RUN, "demo.py"}


def test_compile_transformers(tmp_path: Path) -> None:
    said = run(tmp_path, "compile_transformers.py")
    # The prompt grows past 88 tokens, 11 pages of 8, and no further page is read.
    read, dense = pages(next(line for line in said.splitlines() if "engine.generate:" in line))
    assert 0 < read < dense
    assert f"transformers, greedy: the same tokens, {read} pages read" in said
    assert "transformers, 3 beams: '" in said


def test_backend(tmp_path: Path) -> None:
    said = run(tmp_path, "backend.py")
    assert "cached: 4 of 4 attentions read their cache through policy 'scout'" in said
    # 7 tokens after the first, 4 layers, 2 KV heads; of the 64 pages that hold 512 tokens, 11.
    assert "calls: 7 through the policy, 0 dense" in said
    read, held = pages(said)
    assert read == 7 * 4 * 2 * 11 and held == 7 * 4 * 2 * 64


def test_own_memory(tmp_path: Path) -> None:
    said = run(tmp_path, "own_memory.py")
    assert "pages of 8 that a query reads, layer by layer: [16, 8, 6, 6]" in said
    dense, policy = (line for line in said.splitlines() if "right, " in line)
    assert dense.startswith("dense: 8 of 8 right")
    assert pages(dense)[0] == pages(dense)[1]
    assert 4 * pages(policy)[0] < pages(policy)[1]


def test_long_document(tmp_path: Path) -> None:
    said = run(tmp_path, "long_document.py")
    dense, scout = (line for line in said.splitlines() if "answers right" in line)
    assert "dense: 4 of 4 answers right" in dense and "scout: 4 of 4 answers right" in scout
    assert 4 * pages(scout)[0] < pages(dense)[0] == pages(dense)[1]


def test_chat(tmp_path: Path) -> None:
    said = run(tmp_path, "chat.py")
    assert said.count("# recall: ") == 4
    assert re.search(r"tomato = 1234\n.*\n.*\n.*# recall: tomato = 9876\n", said)


def test_chat_takes_lines_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str]] = []

    class Branch:
        """Stands in a chat's place and says what it was asked to do."""

        def __init__(self, name: str) -> None:
            self.name = name

        def fork(self) -> Branch:
            return Branch(f"{self.name}, forked")

        def tell(self, line: str) -> None:
            heard.append((self.name, f"told {line}"))

        def ask(self, line: str) -> None:
            heard.append((self.name, f"asked {line}"))

    interact = runpy.run_path(str(EXAMPLES / "chat.py"))["interact"]
    lines = ["# fact: a = 1", "", "/fork", "# fact: b = 2", "# recall: b = ", "/back", "/back", "x"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    interact(Branch("trunk"))
    assert heard == [
        ("trunk", "told # fact: a = 1"),
        ("trunk, forked", "told # fact: b = 2"),
        ("trunk, forked", "asked # recall: b = "),
        ("trunk", "asked x"),
    ]
