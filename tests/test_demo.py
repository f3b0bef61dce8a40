"""`make demo` at a small size: every command runs, and what is known in advance comes out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_demo_retrieves_and_counts(tmp_path: Path) -> None:
    small = ("--out", str(tmp_path / "out"), "--induction-length", "4096", "--prompts", "4")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/demo.py"), *small],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "140"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = re.findall(
        r"(induction|bytes-small) +│ +(\d+) +│ (dense|scout)(?:, \d+)? +"
        r"│ +(\d+) of (\d+) +│ +(\d+) ",
        done.stdout,
    )
    assert [row[:3] for row in rows] == [
        (name, length, read)
        for name, length in (("induction", "4096"), ("bytes-small", "493"), ("bytes-small", "749"))
        for read in ("dense", "scout")
    ]
    for name, _, read, right, total, _ in rows:
        # dense, and the scout of the hand-made network, answer everything at these lengths
        if name == "induction" or read == "dense":
            assert right == total, (name, read)
    # 2048 of 4096 tokens, 32 pages of 64; 2 layers and 2 KV heads
    assert [int(pages) for *_, pages in rows[:2]] == [65 * 4, 32 * 4]
    # 88 of 749 tokens, 11 pages of 8; 4 layers and 2 KV heads
    assert int(rows[-1][-1]) == 11 * 8
    assert "tokens/s" in done.stderr
