"""`memcompile cache`: shows what is kept, and removes that and nothing else."""

from __future__ import annotations

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from memcompile.codegen import cache as store


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two kernels and a tuned choice."""
    root = tmp_path / "cache"
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(root))
    for kind, name in (("cpp", f"attend_f32-{store.key('a')}"), ("triton", store.key("b"))):
        store.publish(root / kind / name, lambda f: (f / "kernel.txt").write_text("x" * 1000))
    tuned = root / "tuned" / "cuda_90" / "attend.json"
    tuned.parent.mkdir(parents=True)
    tuned.write_text("{}")
    return root


def test_show_lists_what_is_kept(say: Any, kept: Path) -> None:
    said = say("cache", "show")
    assert said.code == 0
    for part in ("cpp", "attend_f32 ", "triton", "tuned", f"3 entries, 2.12 KiB in {kept}"):
        assert part in said.out
    shown = json.loads(say("cache", "show", "--json").out)
    assert shown["root"] == str(kept)
    assert [entry["kind"] for entry in shown["entries"]] == ["cpp", "triton", "tuned"]
    assert all(entry["whole"] for entry in shown["entries"])
    assert shown["bytes"] == sum(f.stat().st_size for f in kept.rglob("*") if f.is_file())
    assert say("cache", "show", "--quiet").out == ""


def test_an_empty_cache_is_shown_and_cleared(say: Any, kept: Path) -> None:
    assert say("cache", "clear", "--yes").code == 0
    assert say("cache", "show").out == f"0 entries, 0 B in {kept}\n"
    said = say("cache", "clear")
    assert said.code == 0 and "removed 0 entries" in said.out


def test_clear_says_what_was_freed(say: Any, kept: Path) -> None:
    said = say("cache", "clear", "--yes")
    assert (said.code, said.out) == (0, f"removed 3 entries from {kept}: 2.12 KiB freed\n")
    assert not [*kept.iterdir()]
    assert json.loads(say("cache", "clear", "--json").out)["removed"] == 0


def test_clear_removes_nothing_that_another_put_there(say: Any, kept: Path) -> None:
    (entry,) = (kept / "cpp").iterdir()
    elsewhere = kept.parent / "elsewhere"
    elsewhere.mkdir()
    foreign = [
        kept / "notes.txt",
        kept / "cpp" / "mine" / "a.txt",
        kept / "cpp" / "b.txt",
        entry / "notes.txt",
        kept / "tuned" / "notes.txt",
        elsewhere / "c.txt",
    ]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("irreplaceable")
    (kept / "cpp" / f"linked-{store.key('c')}").symlink_to(elsewhere)
    # A list of files that leads out of its folder.
    sums = json.loads((entry / store.SUMS).read_text())
    (entry / store.SUMS).write_text(json.dumps({**sums, "../b.txt": "", "..": ""}))
    damaged = json.loads(say("cache", "show", "--json").out)["entries"][0]
    assert (damaged["kind"], damaged["whole"]) == ("cpp", False)
    assert say("cache", "clear", "--yes").code == 0
    assert all(file.read_text() == "irreplaceable" for file in foreign)
    assert sorted(path for path in entry.iterdir()) == [entry / "notes.txt"]


def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its(
    say: Any, kept: Path
) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    for process in (child.pid, os.getpid()):
        folder = kept / "triton" / f".{store.key('d')}.{process}.0123abcd"
        folder.mkdir()
        (folder / "kernel.txt").write_text("x")
    kinds = [e["kind"] for e in json.loads(say("cache", "show", "--json").out)["entries"]]
    assert kinds.count("unfinished") == 1
    assert say("cache", "clear", "--yes").code == 0
    assert [path.name.split(".")[2] for path in (kept / "triton").iterdir()] == [str(os.getpid())]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "left"), [("n\n", 3), ("\n", 3), ("y\n", 0)])
def test_clear_asks(
    say: Any, kept: Path, monkeypatch: pytest.MonkeyPatch, answer: str, left: int
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    said = say("cache", "clear")
    assert said.code == 0 and "remove 3 entries, 2.12 KiB from" in said.err
    assert len(store.entries()) == left
    assert ("nothing removed" in said.err) == bool(left)


def test_clear_does_not_ask_where_nobody_can_answer(say: Any, kept: Path) -> None:
    said = say("cache", "clear")
    assert said.code == 2 and "give --yes" in said.err
    assert len(store.entries()) == 3
