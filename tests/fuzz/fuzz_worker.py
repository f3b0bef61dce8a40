"""Runs fuzzed cases one after another in a process of their own, and says what each did wrong.

`python fuzz_worker.py ZOO SEED` reads a case a line (``KIND INDEX``), answers with a line of JSON.
Its parent watches the clock and the process; what a case does is watched here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

CODES = {0, 2, 3, 4}
# What a command that only reads models has no business with, whatever the model says.
_EVENTS = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "pty.spawn"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "socket.getaddrinfo", "webbrowser.open"),
    *("code.__new__", "cpython.run_command", "cpython.run_file", "sys.setprofile", "sys.settrace"),
}
_MEMORY = 6 << 30
# `eval` and `distill` keep what they have for the same command to go on with.
_RESUMABLE = {"eval", "distill"}


@dataclass
class Outcome:
    """What became of one case; `wrong` is empty if all is well."""

    kind: str
    index: int
    arguments: list[str]
    code: int = -1
    wrong: list[str] = field(default_factory=list)
    error: str = ""


class Watch:
    """An audit hook, deaf except while a case runs."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.inside: Path | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in _EVENTS:
            self.heard.append(f"{event}{arguments!r}"[:200])
        elif event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR) if mode is None else set("wax+") & set(mode)
            if writes and not isinstance(path, int) and str(path) != os.devnull:
                where = Path(os.path.abspath(os.fsdecode(path)))
                if not where.is_relative_to(self.inside):
                    self.heard.append(f"writes {where}")


def case(kind: str, index: int, seed: int, zoo: Path, here: Path, marker: Path) -> list[str]:
    """Lays out the files of a case in `here`; the same for the same kind, index and seed."""
    import fuzz_files
    import fuzz_lines
    import fuzz_zoo

    random = Random(f"{seed} {kind} {index}")
    if kind == "line":
        fuzz_zoo.copy(zoo, here)
        return fuzz_lines.line(random)
    return fuzz_files.MUTATORS[kind](random, zoo, here, marker)


def run(kind: str, index: int, seed: int, zoo: Path, watch: Watch) -> Outcome:
    """One case in a new folder, which is gone afterwards."""
    from memcompile.compiler.cli import main

    root = Path(tempfile.mkdtemp(prefix="case-", dir=zoo.parent))
    here, scratch, marker = root / "here", root / "tmp", root / "marker"
    here.mkdir()
    scratch.mkdir()
    outcome = Outcome(kind, index, [])
    home = os.getcwd()
    try:
        os.chdir(here)
        tempfile.tempdir = str(scratch)
        outcome.arguments = case(kind, index, seed, zoo, here, marker)
        before = _state(root)
        watch.heard, watch.inside = [], root
        with _captured() as (out, err):
            try:
                outcome.code = main(outcome.arguments)
            except SystemExit as left:  # standalone commands of a library
                outcome.code = left.code if isinstance(left.code, int) else -1
                outcome.wrong.append(f"SystemExit {left.code!r}")
            except BaseException as error:
                outcome.wrong.append(f"raised {type(error).__name__}")
                outcome.error = traceback.format_exc()
        watch.inside = None
        said, noise = out.getvalue().decode("utf-8"), err.getvalue().decode("utf-8", "replace")
        outcome.wrong += watch.heard
        outcome.wrong += _words(outcome, said, noise)
        outcome.wrong += _files(outcome, before, _state(root), here)
        if outcome.wrong:
            outcome.error = outcome.error or noise[-6000:]
    finally:
        watch.inside = None
        tempfile.tempdir = None
        os.chdir(home)
        shutil.rmtree(root, ignore_errors=True)
    return outcome


def _words(outcome: Outcome, said: str, noise: str) -> Iterator[str]:
    if outcome.code not in CODES:
        yield f"exit code {outcome.code}"
    if "Traceback" in noise:
        yield "a traceback"
    lines = noise.strip().splitlines()
    if outcome.code == 2 and not noise.startswith("Usage: ") and len(lines) != 1:
        yield f"{len(lines)} lines on stderr for a refusal"
    quiet = outcome.code == 3 and "--quiet" in outcome.arguments  # the code says it
    if outcome.code not in (0, -1) and not quiet and not noise.strip() and not said.strip():
        yield "no word of why"
    if any((ord(c) < 32 and c not in "\n\t") or c == "\x7f" for c in noise):
        yield "control characters on stderr"


def _files(
    outcome: Outcome, before: dict[str, str], after: dict[str, str], here: Path
) -> Iterator[str]:
    words = outcome.arguments
    command = words[0] if words else ""
    done = outcome.code == 0 or (outcome.code == 4 and command in _RESUMABLE)
    target = _target(words) if done else None
    for name in before.keys() - after.keys():
        if not _within(name, target):
            yield f"{name} is gone"
    for name in before.keys() & after.keys():
        if before[name] != after[name] and not _within(name, target):
            yield f"{name} was changed"
    new = after.keys() - before.keys()
    for name in new:
        last = Path(name).name
        if name == "marker" or last.startswith("canary"):
            yield f"code was executed: {name}"
        elif name.startswith("tmp/"):
            yield f"{name} was left behind"
        elif last.startswith(".") or ".tmp" in last or last.endswith("~"):
            yield f"{name}: a partial file"
        elif not done and command not in _RESUMABLE:
            yield f"{name} was written by a command that failed"
    for name in new:
        folder = here.parent / name
        if done and name.startswith("here/") and (folder / "manifest.json").is_file():
            yield from _whole(folder)


def _whole(folder: Path) -> Iterator[str]:
    """A folder of ours holds what its manifest lists, to the byte."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest.get("files", {}).items():
        data = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            yield f"{folder.name}/{name} is not whole"


def _target(words: list[str]) -> str | None:
    """Where the line asked to write, which may replace what was there."""
    for at, word in enumerate(words):
        if word == "--out" and at + 1 < len(words):
            return os.path.normpath(f"here/{words[at + 1]}")
        if word.startswith("--out="):
            return os.path.normpath(f"here/{word[6:]}")
    return None


def _within(name: str, target: str | None) -> bool:
    return target is not None and (name == target or name.startswith(target + "/"))


def _state(root: Path) -> dict[str, str]:
    """Every path below `root`, with a digest of each file."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            found[os.path.relpath(os.path.join(folder, name), root)] = "folder"
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found[os.path.relpath(path, root)] = digest
    return found


@contextlib.contextmanager
def _captured() -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Streams as a terminal's: strict UTF-8 out, escapes on the other, nothing to read."""
    out, err = io.BytesIO(), io.BytesIO()
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    sys.stdout = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(err, "utf-8", "backslashreplace", write_through=True)
    ours = sys.stdout, sys.stderr
    try:
        yield out, err
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
        for stream in ours:
            with contextlib.suppress(ValueError):
                stream.detach()


def _limit_memory() -> None:
    """So that a case which asks for the moon fails here, and alone."""
    with open("/proc/self/statm") as facts:
        taken = int(facts.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))


def warm(zoo: Path, seed: int, watch: Watch) -> None:
    """Loads what the commands load, so that no case pays for it and none is blamed for it."""
    from memcompile.compiler.cli import main

    with _captured():
        main([str(zoo / "llama"), "--dry-run", "--kernels", "off"])
        main(["run", str(zoo / "engine"), "--ids", "--prompt", "1", "--kernels", "off"])
    for kind in ("line", "archive", "transformers"):
        for index in range(-3, 0):
            run(kind, index, seed, zoo, watch)


def serve(zoo: Path, seed: int) -> None:
    """Answers on the stdout it was started with; nothing else may write there."""
    # Only an empty environment is the same everywhere.
    for name in [name for name in os.environ if name.startswith(("MEMCOMPILE_", "HF_"))]:
        del os.environ[name]
    os.environ["MEMCOMPILE_CACHE"] = str(zoo.parent / "cache")
    os.environ["HF_HOME"] = str(zoo.parent / "hub")
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    if not zoo.exists():
        import fuzz_zoo

        fuzz_zoo.make(zoo)
    watch = Watch()
    warm(zoo, seed, watch)
    _limit_memory()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        kind, _, index = line.rstrip("\n").rpartition(" ")
        outcome = run(kind, int(index), seed, zoo, watch)
        print(json.dumps(asdict(outcome)), file=answers, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
