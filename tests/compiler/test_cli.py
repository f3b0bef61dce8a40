"""The command line: what it writes, what it refuses, and the exit code of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile import codegen
from memcompile.codegen.cpp import NoCompiler
from memcompile.compiler import cli
from memcompile.compiler.arguments import BadInput, parse_ids, policy_options
from memcompile.compiler.cli import main
from memcompile.compiler.commands.files import default_name
from memcompile.models.memory import PRESETS
from memcompile.models.networks import induction

SMALL = ["--budget", "64", "--set", "page_size=8", "--set", "sinks=8", "--set", "window=16"]
SMALL += ["--set", "dense_layers=0"]


class Said:
    """What a call of the command line said, and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in an empty folder."""
    monkeypatch.delenv("MEMCOMPILE_DEBUG", raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The induction network, as a transformers folder."""
    return induction.save(tmp_path_factory.mktemp("models") / "induction.v1")


@pytest.fixture(scope="module")
def engine_folder(network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "engine"
    assert main([str(network), *SMALL, "--out", str(folder), "--quiet"]) == 0
    return folder


class NoAttention(torch.nn.Module):
    """Each token by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(input_ids))
        return logits


@pytest.fixture
def without_attention(tmp_path: Path) -> Path:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = torch.zeros(2, 5, dtype=torch.int64)
    program = torch.export.export(NoAttention().eval(), (ids,), dynamic_shapes=(free,))
    path = tmp_path / "flat.pt2"
    torch.export.save(program, path)
    return path


def test_build_writes_a_folder(say: Any, network: Path) -> None:
    said = say(network, *SMALL)
    assert (said.code, said.err) == (0, ""), said.err
    folder = Path("induction.v1.scout")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == 1
    report = json.loads((folder / "report.json").read_text())
    assert [site["memory"]["name"] for site in report["sites"]] == ["scout", "scout"]
    assert report["options"]["page_size"] == 8
    for part in ("4/2×64", "causal", "scout", "at 8K", "at 128K", "induction.v1.scout/"):
        assert part in said.out


def test_dry_run_reports_and_writes_nothing(say: Any, network: Path) -> None:
    said = say(network, *SMALL, "--dry-run", "--json")
    assert said.code == 0
    assert json.loads(said.out)["policy"] == "scout"
    assert not list(Path.cwd().iterdir())


def test_kernels_off_is_in_the_report(say: Any, network: Path) -> None:
    assert say(network, *SMALL, "--kernels", "off", "--out", "engine", "--quiet").code == 0
    report = json.loads(Path("engine/report.json").read_text())
    assert report["lowered"]["kernels"] == []
    assert report["lowered"]["references"] == ["kernels=off"]


def test_kernels_required_without_a_compiler_builds_nothing(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*args: object) -> None:
        raise NoCompiler("no C++ compiler: install one")

    monkeypatch.setattr(codegen, "load", none)
    monkeypatch.setattr(codegen, "load_linear", none)
    said = say(network, *SMALL, "--kernels", "required", "--out", "engine", "--quiet")
    assert said.code != 0
    assert "kernels='required', but no C++ compiler: install one" in said.err
    assert not Path("engine").exists()


def test_an_unknown_way_of_kernels_is_refused(say: Any, network: Path) -> None:
    said = say(network, *SMALL, "--kernels", "maybe")
    assert said.code == 2
    assert "'maybe' is not one of 'auto', 'required', 'off'" in said.err


def test_inspect_shows_what_each_policy_would_do(say: Any, network: Path) -> None:
    said = say("inspect", network)
    assert said.code == 0
    for part in ("4/2×64", "causal", "dense", "scout"):
        assert part in said.out
    reports = json.loads(say("inspect", network, "--json").out)
    # A mixture of nothing is no policy of its own.
    assert {*reports} == PRESETS.keys() - {"mixture"}
    for name in reports:
        assert f"policy {name}: " in said.out
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("read", ["policy", "dense"])
def test_run_gives_the_known_answer(say: Any, engine_folder: Path, read: str) -> None:
    tokens, answer = induction.prompt(200, seed=3, depth=0.4, steps=4)
    Path("prompt.txt").write_text(" ".join(map(str, tokens[0].tolist())))
    said = say(
        *("run", engine_folder, "--ids", "--prompt-file", "prompt.txt"),
        *("--max-new-tokens", 4, "--read", read),
    )
    assert said.code == 0, said.err
    assert said.out.split() == [str(token) for token in answer[0].tolist()]
    assert "tokens/s" in said.err and "pages" in said.err


def test_an_earlier_build_is_replaced_only_when_told(say: Any, network: Path) -> None:
    assert say(network, *SMALL, "--out", "out", "--quiet").code == 0
    marker = Path("out/marker")
    marker.touch()
    said = say(network, *SMALL, "--out", "out")
    assert said.code == 2 and "--force" in said.err and marker.exists()
    assert say(network, *SMALL, "--out", "out", "--force", "--quiet").code == 0
    assert not marker.exists()


def test_a_foreign_folder_is_never_replaced(say: Any, network: Path) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("irreplaceable")
    said = say(network, *SMALL, "--out", "mine", "--force")
    assert said.code == 2 and "mine" in said.err
    assert Path("mine/thesis.txt").read_text() == "irreplaceable"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.pt", None),
        ("empty.pt", b""),
        ("foreign.pt", b"%PDF-1.7 not a model at all"),
        ("truncated.pt", b"PK\x03\x04" + b"\0" * 40),
        ("folder", "folder"),
    ],
)
@pytest.mark.parametrize("command", [[], ["inspect"]], ids=["build", "inspect"])
def test_bad_files_are_one_line_and_code_2(
    say: Any, command: list[str], name: str, content: bytes | str | None
) -> None:
    if content == "folder":
        Path(name).mkdir()
    elif isinstance(content, bytes):
        Path(name).write_bytes(content)
    before = sorted(Path.cwd().iterdir())
    said = say(*command, name)
    assert said.code == 2
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1 and name in said.err
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--policy", "scuot"], ["'scuot'", "did you mean 'scout'", "dense, scout"]),
        (["--set", "budgte=3"], ["'budgte'", "did you mean 'budget'", "page_size"]),
        (["--set", "zzz=3"], ["'zzz'", "known: budget"]),
        (["--set", "page_size"], ["FIELD=VALUE"]),
        (["--set", "page_size=big"], ["page_size", "a whole number", "'big'"]),
        (["--set", "page_size=48"], ["page_size", "power of two", "48"]),
        (["--set", "compensate=maybe"], ["true or false", "'maybe'"]),
        (["--set", "score=loud"], ["'loud'", "mean-std"]),
        (["--budget", "64", "--set", "budget=64"], ["'budget'", "twice"]),
        (["--policy", "dense", "--budget", "64"], ["'dense'", "'budget'", "page_size"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["surplus"], ["surplus"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_are_one_line_and_code_2(
    say: Any, network: Path, arguments: list[str], found: list[str]
) -> None:
    said = say(network, *arguments)
    assert said.code == 2
    assert len(said.err.strip().splitlines()) == 1
    for part in found:
        assert part in said.err
    assert not list(Path.cwd().iterdir())


def test_nothing_rewritten_is_code_3_and_says_what_was_looked_for(
    say: Any, without_attention: Path
) -> None:
    said = say(without_attention)
    assert said.code == 3 and said.err.startswith("memcompile: flat.pt2: ")
    assert "scaled_dot_product_attention" in said.err
    looked = say("inspect", without_attention)
    assert looked.code == 3 and "no step can be derived" in looked.out
    loose = say(without_attention, "--no-strict")
    assert loose.code == 0 and "nothing written" in loose.out
    assert not list(Path.cwd().iterdir())


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


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (["budget=512"], {"budget": 512}),
        (["budget=none"], {"budget": None}),
        (["min-context = 4096"], {"min_context": 4096}),
        (["compensate=no", "score=box"], {"compensate": False, "score": "box"}),
        (["max_context=100"], {"max_context": 100}),
    ],
)
def test_settings_have_the_types_of_the_fields(
    settings: list[str], options: dict[str, Any]
) -> None:
    assert policy_options("scout", settings, budget=None, max_context=None) == options


@pytest.mark.parametrize(
    ("text", "message"), [("1 2 x", "'x'"), ("-1", "'-1'"), ("1.5", "whole numbers")]
)
def test_ids_are_whole_numbers(text: str, message: str) -> None:
    assert parse_ids("1, 2\n3") == [1, 2, 3]
    with pytest.raises(BadInput, match=message):
        parse_ids(text)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ([], "--prompt"),
        (["--prompt", "1", "--prompt-file", "x"], "one of"),
        (["--prompt", "text"], "tokenizer.json"),
        (["--ids", "--prompt", ""], "no token"),
        (["--ids", "--prompt", "0 9999"], "9999"),
        (["--ids", "--prompt", f"0 {1 << 63}"], str(1 << 63)),
        (["--prompt-file", "absent.txt"], "absent.txt: no such file"),
        (["--prompt-file", "."], ".: is a directory"),
    ],
)
def test_run_refuses_in_one_line(
    say: Any, engine_folder: Path, arguments: list[str], found: str
) -> None:
    said = say("run", engine_folder, *arguments)
    assert said.code == 2
    assert found in said.err and len(said.err.strip().splitlines()) == 1


def test_run_refuses_more_tokens_than_the_context_holds_before_it_starts(
    say: Any, network: Path
) -> None:
    assert say(network, *SMALL, "--max-context", 20, "--out", "short", "--quiet").code == 0
    prompt = ("--ids", "--prompt", " ".join("3" * 12))
    said = say("run", "short", *prompt, "--max-new-tokens", 10)
    assert (said.code, said.out) == (2, "") and "context of 20" in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert say("run", "short", *prompt, "--max-new-tokens", 9).code == 0


def test_a_prompt_that_is_no_text_is_refused(say: Any, engine_folder: Path) -> None:
    Path("prompt.txt").write_bytes(b"abc\xff")
    said = say("run", engine_folder, "--prompt-file", "prompt.txt")
    assert said.code == 2 and "UTF-8" in said.err and "0xff at 3" in said.err


def test_an_interrupt_is_code_130_and_leaves_nothing(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memcompile.compiler.package._save_program", interrupted)
    said = say(network, *SMALL, "--out", "out")
    assert said.code == 130 and "Traceback" not in said.err
    assert not list(Path.cwd().iterdir())


def test_run_refuses_a_folder_that_is_no_engine(say: Any) -> None:
    Path("empty").mkdir()
    said = say("run", "empty", "--ids", "--prompt", "1")
    assert said.code == 2 and "empty" in said.err


def test_a_model_file_loses_its_suffix_and_a_folder_keeps_its_dots(tmp_path: Path) -> None:
    (tmp_path / "llama-3.1").mkdir()
    assert default_name(tmp_path / "llama-3.1", "scout") == "llama-3.1.scout"
    assert default_name(tmp_path / "model.pt", "dense") == "model.dense"
    assert default_name(tmp_path / "model.v2", "dense") == "model.v2.dense"


@pytest.mark.parametrize("arguments", [["--help"], [], ["inspect", "--help"], ["run", "-h"]])
def test_help_names_the_options(say: Any, arguments: list[str]) -> None:
    said = say(*arguments)
    assert (said.out + said.err).startswith("Usage: memcompile")


def test_help_shows_how_to_build(say: Any) -> None:
    said = say("--help")
    assert "memcompile MODEL" in said.out
    for part in ("--policy", "--budget", "--set", "--out", "inspect", "run"):
        assert part in said.out
