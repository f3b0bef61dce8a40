"""docs/first_ten_minutes.md is replayed: what its commands say is what the page shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from transcript_case import BLOCK, Shell, commands, replay

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/first_ten_minutes.md"


def test_the_first_ten_minutes_are_as_the_page_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEMCOMPILE_KERNELS", "auto")  # as long as the page says nothing else
    monkeypatch.delenv("MEMCOMPILE_DEBUG", raising=False)
    page = PAGE.read_text()
    now = replay(page, Shell(tmp_path, monkeypatch))
    if request.config.getoption("--update-golden"):
        PAGE.write_text(now)
        return
    for shown, said in zip(BLOCK.findall(page), BLOCK.findall(now), strict=True):
        for (command, expected), (_, got) in zip(commands(shown), commands(said), strict=True):
            assert got == expected, (
                f"$ {command}\nsays something else than the page shows; if on purpose, run "
                "pytest --update-golden tests/test_transcript.py and read the diff"
            )
    assert now == page


def test_a_page_is_read_as_a_shell_reads_it() -> None:
    block = "$ cat > a <<'END'\nb\n\nEND\n$ cat a\nb\n\n$ true\n"
    assert commands(block) == [("cat > a <<'END'\nb\n\nEND", ""), ("cat a", "b\n\n"), ("true", "")]


def test_what_a_command_says_is_not_taken_on_trust(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = Shell(tmp_path, monkeypatch)
    page = "```console\n$ printf 'a\\n' | cat\nwrong\n$ memcompile cache shw\n$ echo $?\n```\n"
    now = replay(page, shell)
    assert "$ printf 'a\\n' | cat\na\n" in now
    assert "unknown command 'shw'; did you mean 'show'?" in now and now.endswith("2\n```\n")


def test_times_and_places_are_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(tmp_path, monkeypatch)
    said = shell.run(f"echo '4 tokens read in 1.5 s; 3.2 tokens/s, {tmp_path}/x, 7 of 9 pages'")
    assert said == "4 tokens read in … s; … tokens/s, …/x, 7 of 9 pages\n"
