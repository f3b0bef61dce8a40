"""The command line as a whole: exit codes, names that are meant, signals, help."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from memcompile.compiler import cli


def test_a_mistake_of_ours_is_code_1_with_a_traceback(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        {}["never"]

    monkeypatch.setattr("memcompile.compiler.pipeline.build", broken)
    said = say(network)
    assert said.code == 1
    assert "Traceback" in said.err and "internal error: KeyError" in said.err


def test_a_value_error_of_a_library_is_no_bad_input() -> None:
    def raised_by(code: str, file: str) -> Exception:
        try:
            exec(compile(code, file, "exec"))
        except Exception as error:
            return error
        raise AssertionError

    ours = str(Path(cli.__file__).parent / "load.py")
    assert cli._is_bad_input(raised_by("raise ValueError('x')", ours))
    assert not cli._is_bad_input(raised_by("raise ValueError('x')", "/usr/lib/else.py"))
    assert not cli._is_bad_input(raised_by("raise KeyError('x')", ours))
    assert cli._is_bad_input(raised_by("open('/no/such/file')", "/usr/lib/else.py"))


def test_debug_adds_the_traceback(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCOMPILE_DEBUG", "1")
    said = say("missing.pt")
    assert said.code == 2 and "Traceback" in said.err


@pytest.mark.parametrize("arguments", [["--help"], [], ["inspect", "--help"], ["run", "-h"]])
def test_help_names_the_options(say: Any, arguments: list[str]) -> None:
    said = say(*arguments)
    assert (said.out + said.err).startswith("Usage: memcompile")


def test_help_shows_how_to_build(say: Any) -> None:
    said = say("--help")
    assert "memcompile MODEL" in said.out
    for part in ("--policy", "--budget", "--set", "--out", "inspect", "run"):
        assert part in said.out


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            ["inspct", "model"],
            "'inspct' is neither a command nor a file or folder; did you",
        ),
        (["inspct", "model"], "the command 'inspect'? known: inspect, explain, run, bench"),
        (
            ["cache", "shwo"],
            "cache: unknown command 'shwo'; did you mean 'show'? known: show",
        ),
        (["decodre.pt2"], "there is no such file or folder (did you mean decoder.pt2?)"),
        (["inspect", "DECODER.PT"], "(did you mean decoder.pt2?)"),
        (["eval", "decodre.pt2", "--policy", "scout"], "(did you mean decoder.pt2?)"),
        (["no/such/model.pt"], "(its folder no is not there)"),
        (["decoder.pt2", "--polcy", "scout"], "Did you mean '--policy'?"),
        (["decoder.pt2", "--policy", "scuot"], "did you mean 'scout'?"),
        (["inspect", "decoder.pt2", "--policy", "scout:budgte=3"], "did you mean 'budget'?"),
        (["decoder.pt2", "--set", "score=mean-sdt"], "did you mean 'mean-std'?"),
        (["decoder.pt2", "--kernels", "of"], "Did you mean 'off'?"),
        (["eval", "decoder.pt2", "--tasks", "sinlge"], "did you mean 'single'?"),
        (["eval", "decoder.pt2", "--wording", "byte"], "did you mean 'bytes'?"),
        (["distill", "decoder.pt2", "--data", "decoder.pt"], "(did you mean decoder.pt2?)"),
        (["run", "decodre.pt2", "--prompt", "a"], "nothing there (did you mean decoder.pt2?)"),
    ],
)
def test_a_wrong_name_gets_the_nearest(say: Any, arguments: list[str], found: str) -> None:
    Path("decoder.pt2").touch()
    said = say(*arguments)
    assert (said.code, said.out) == (2, "")
    assert found in said.err and len(said.err.strip().splitlines()) == 1


def test_a_model_called_like_a_command_is_a_model(say: Any) -> None:
    Path("inspct").write_bytes(b"%PDF-1.7 not a model at all")
    said = say("inspct")
    assert said.code == 2 and "inspct: " in said.err and "did you mean" not in said.err


def test_every_exit_code_is_documented() -> None:
    from memcompile.compiler import exit_codes

    documented = Path(__file__).parents[2].joinpath("docs/cli.md").read_text()
    table = documented.partition("## Exit codes")[2].partition("\n## ")[0]
    codes = {name: code for name, code in vars(exit_codes).items() if name.isupper()}
    assert len(codes) == 10
    for name, code in codes.items():
        assert f"\n| {code} |" in table, name


def test_a_reader_that_goes_away_is_code_141_and_no_traceback() -> None:
    program = [sys.executable, "-m", "memcompile.compiler.cli", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_encoding_without_a_letter_gets_escapes(tmp_path: Path) -> None:
    kept = tmp_path / "tuned" / "cuda_90" / "attend_ü.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    done = subprocess.run(
        [sys.executable, "-m", "memcompile.compiler.cli", "cache", "show"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "MEMCOMPILE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"attend_\xfc" in done.stdout and "1 entry, 0 B in " in done.stdout


def test_an_interrupt_is_code_130(say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memcompile.codegen.cache.entries", interrupted)
    said = say("cache", "show")
    assert (said.code, said.out, said.err) == (130, "", "\n")


def test_sigterm_at_a_question_is_code_143(
    say: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int = -1, /) -> str:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the signal is on its way
            return "y"

    kept = tmp_path / "tuned" / "cuda_90" / "attend.json"
    kept.parent.mkdir(parents=True)
    kept.touch()
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", Terminal())
    said = say("cache", "clear")
    assert said.code == 143 and kept.exists() and "Traceback" not in said.err


def test_the_command_line_runs_beside_the_main_thread(say: Any) -> None:
    """Where Python lets nobody set a signal's handler."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
