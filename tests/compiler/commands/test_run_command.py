"""`memcompile run`: prompts, text as it comes, ends, figures, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from memcompile.compiler import package
from memcompile.compiler.arguments import BadInput, parse_ids
from memcompile.compiler.commands.files import end_tokens
from memcompile.compiler.pipeline import Compiled, build
from memcompile.models import networks
from memcompile.models.networks import induction

CHECKPOINT = Path(networks.__file__).parent / "checkpoints" / "bytes-small"
PROMPT = "def main("


@pytest.fixture(scope="module")
def text_engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Compiled]:
    """A folder that writes text, and what was compiled into it."""
    pytest.importorskip("transformers")
    compiled = build(CHECKPOINT, "dense", check=False, kernels="off")
    folder = tmp_path_factory.mktemp("text") / "engine"
    return package.write(folder, compiled, source=CHECKPOINT), compiled


@pytest.fixture
def folder(text_engine: tuple[Path, Compiled], monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder, which need not be opened anew each time."""
    path, compiled = text_engine
    monkeypatch.setattr(package, "open_compiled", lambda given, kernels=None: compiled)
    return path


@pytest.fixture
def write(say: Any, folder: Path) -> Any:
    """What the JSON says after a run of the prompt."""

    def run(*arguments: object) -> Any:
        asked = ("run", folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--json")
        said = say(*asked, *arguments)
        assert (said.code, said.err) == (0, ""), said.err
        return json.loads(said.out)

    return run


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes, terminal: bool = False) -> None:
    given = io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr(given, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", given)


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


def test_a_prompt_comes_from_an_option_a_file_or_stdin(
    say: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("run", folder, "--max-new-tokens", 12)
    said = say(*asked, "--prompt", PROMPT)
    assert said.code == 0 and len(said.out) > 4 and "12 written" in said.err
    Path("prompt.txt").write_text(PROMPT)
    assert say(*asked, "--prompt-file", "prompt.txt").out == said.out
    dash = ["--prompt-file", "-"]
    for more, terminal in (([], False), (dash, False), (dash, True)):
        stdin(monkeypatch, PROMPT.encode(), terminal)
        assert say(*asked, *more).out == said.out
    stdin(monkeypatch, PROMPT.encode(), terminal=True)
    refused = say(*asked)
    assert refused.code == 2 and "--prompt TEXT" in refused.err and "stdin" in refused.err
    monkeypatch.setattr(sys, "stdin", None)
    assert say(*asked).code == 2


def test_text_comes_piece_by_piece(say: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memcompile.compiler.commands import run

    pieces: list[str] = []
    monkeypatch.setattr(run, "_show", pieces.append)
    said = say("run", folder, "--prompt", PROMPT, "--max-new-tokens", 9)
    assert said.out == "\n" and len([piece for piece in pieces if piece]) == 9


def test_streamed_whole_and_json_are_one_text(say: Any, folder: Path) -> None:
    asked = ("run", folder, "--prompt", PROMPT, "--max-new-tokens", 9)
    streamed = say(*asked)
    assert say(*asked, "--no-stream").out == streamed.out
    quiet = say(*asked, "--quiet")
    assert (quiet.out, quiet.err) == (streamed.out, "")
    told = json.loads(say(*asked, "--json").out)
    assert told["text"] + "\n" == streamed.out
    assert bytes(told["ids"]).decode() == told["text"]
    assert (told["prompt_tokens"], told["ended"]) == (len(PROMPT), "length")
    assert told["tokens_per_second"] > 0 and 0 < told["pages_read"] == told["pages_dense"]


def test_what_runs_on_references_is_said_unless_kernels_are_off(
    say: Any, folder: Path, text_engine: tuple[Path, Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = text_engine[1].report.lowered
    monkeypatch.setattr(lowered, "references", ["no C++ compiler: install one"])
    asked = ("run", folder, "--prompt", PROMPT, "--max-new-tokens", 2)
    for kernels, quiet, told in (("auto", [], 1), ("off", [], 0), ("auto", ["--quiet"], 0)):
        said = say(*asked, "--kernels", kernels, *quiet)
        assert said.code == 0
        assert said.err.count("not generated: no C++ compiler: install one\n") == told


def test_ids_are_streamed_too(say: Any, folder: Path) -> None:
    ids = " ".join(str(byte) for byte in PROMPT.encode())
    asked = ("run", folder, "--ids", "--prompt", ids, "--max-new-tokens", 5)
    told = json.loads(say(*asked, "--json").out)
    assert told["text"] is None
    assert (
        say(*asked).out == " ".join(map(str, told["ids"])) + "\n" == say(*asked, "--no-stream").out
    )


def test_one_new_token_has_no_rate(say: Any, folder: Path) -> None:
    said = say("run", folder, "--prompt", PROMPT, "--max-new-tokens", 1)
    assert said.code == 0 and "tokens/s" not in said.err and "1 written" in said.err


def test_draws_follow_the_seed(write: Any) -> None:
    drawn = [write("--temperature", 1.5, "--seed", seed)["ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = write()["ids"]
    for cut in (("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1)):
        assert write("--temperature", 2, *cut)["ids"] == greedy
    assert write("--repetition-penalty", 5)["ids"] != greedy


def test_text_ends_before_a_stop_string(write: Any) -> None:
    whole = write("--max-new-tokens", 20)["text"]
    stop = whole[5:8]
    told = write("--max-new-tokens", 20, "--stop", "never", "--stop", stop)
    assert told["ended"] == "stop" and told["text"] == whole[: whole.index(stop)]
    assert len(told["ids"]) == whole.index(stop) + len(stop)


def test_text_ends_before_an_end_token(write: Any, folder: Path) -> None:
    whole = write("--max-new-tokens", 20)["ids"]
    end = whole[4]
    for told in (
        write("--max-new-tokens", 20, "--eos", 0, "--eos", end),
        *(_with_file(folder, write, named) for named in (end, [0, end, 999])),
    ):
        at = whole.index(end)
        assert told["ended"] == "eos" and told["ids"] == whole[: at + 1]
        assert told["text"] == bytes(whole[:at]).decode()


def _with_file(folder: Path, write: Any, named: Any) -> Any:
    """A run where a file beside the model says what ends a text; --eos none does without."""
    config = folder / "generation_config.json"
    config.write_text(json.dumps({"eos_token_id": named}))
    try:
        assert len(write("--max-new-tokens", 20, "--eos", "none")["ids"]) == 20
        return write("--max-new-tokens", 20)
    finally:
        config.unlink()


def test_end_tokens_are_read_from_what_lies_beside_a_model(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "</s>": 1}, []))
    assert end_tokens(tmp_path, words) == []
    beside = tmp_path / "tokenizer_config.json"
    for named in ("</s>", {"content": "</s>"}):
        beside.write_text(json.dumps({"eos_token": named}))
        assert (end_tokens(tmp_path, words), end_tokens(tmp_path, None)) == ([1], [])
    beside.write_text(json.dumps({"eos_token": "<unknown>"}))
    assert end_tokens(tmp_path, words) == []
    for named, ends in ((2, [2]), ([2, 3], [2, 3]), (None, []), ("x", []), (-1, []), (True, [])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert end_tokens(tmp_path, words) == ends
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(BadInput, match=r"generation_config.json: damaged JSON"):
        end_tokens(tmp_path, words)


def test_a_built_folder_keeps_the_file_that_names_the_end(tmp_path: Path) -> None:
    from memcompile.compiler.folder import tokenizer_files

    (tmp_path / "generation_config.json").write_text("{}")
    assert tokenizer_files(tmp_path) == [tmp_path / "generation_config.json"]


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
        (["--ids"], "no token"),
        (["--prompt", "1", "--prompt-file", "x"], "one of"),
        (["--prompt", "text"], "tokenizer.json"),
        (["--ids", "--prompt", ""], "no token"),
        (["--ids", "--prompt", "0 9999"], "9999"),
        (["--ids", "--prompt", f"0 {1 << 63}"], str(1 << 63)),
        (["--ids", "--prompt", "1", "--eos", "9999"], "eos is [9999]"),
        (["--ids", "--prompt", "1", "--eos", "x"], "--eos: expected a token id, or none alone"),
        (["--ids", "--prompt", "1", "--eos", "none", "--eos", "1"], "got 'none'"),
        (["--ids", "--prompt", "1", "--stop", "x"], "--stop: is looked for in text"),
        (["--prompt", "1", "--stop", ""], "--stop: give a text"),
        (["--prompt", "1", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "1", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "1", "--top-k", "3"], "give a temperature above 0"),
        (["--prompt", "1", "--top-k", "many"], "'many' is not a valid integer"),
        (["--prompt", "1", "--read", "denes"], "Did you mean 'dense'?"),
        (["--prompt-file", "absent.txt"], "absent.txt: no such file"),
        (["--prompt-file", "."], ".: is a directory"),
    ],
)
def test_run_refuses_in_one_line(
    say: Any,
    engine_folder: Path,
    text_engine: tuple[Path, Compiled],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    found: str,
) -> None:
    monkeypatch.setattr(package, "open_compiled", lambda given, kernels=None: text_engine[1])
    said = say("run", engine_folder, *arguments)
    assert (said.code, said.out) == (2, "")
    assert found in said.err and len(said.err.strip().splitlines()) == 1


def test_run_refuses_more_tokens_than_the_context_holds_before_it_starts(
    say: Any, network: Path, engine_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = build(network, "dense", max_context=20, check=False, kernels="off")
    monkeypatch.setattr(package, "open_compiled", lambda given, kernels=None: short)
    prompt = ("--ids", "--prompt", " ".join("3" * 12))
    said = say("run", engine_folder, *prompt, "--max-new-tokens", 10)
    assert (said.code, said.out) == (2, "") and "context of 20" in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert say("run", engine_folder, *prompt, "--max-new-tokens", 9).code == 0


def test_a_prompt_that_is_no_text_is_refused(
    say: Any, engine_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompt.txt").write_bytes(b"abc\xff")
    said = say("run", engine_folder, "--prompt-file", "prompt.txt")
    assert said.code == 2 and "prompt.txt: expected UTF-8" in said.err and "0xff at 3" in said.err
    stdin(monkeypatch, b"abc\xff")
    said = say("run", engine_folder)
    assert said.code == 2 and "stdin: expected UTF-8" in said.err


def test_a_damaged_tokenizer_is_refused(say: Any, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    (broken / "tokenizer.json").write_text("{}")
    said = say("run", broken, "--prompt", "a")
    assert said.code == 2 and "tokenizer.json: no tokenizer that can be read" in said.err


def test_run_refuses_a_folder_that_is_no_engine(say: Any) -> None:
    Path("empty").mkdir()
    said = say("run", "empty", "--ids", "--prompt", "1")
    assert said.code == 2 and "empty: no manifest.json" in said.err
    said = say("run", "emtpy", "--ids", "--prompt", "1")
    assert said.code == 2 and "emtpy: nothing there (did you mean empty?)" in said.err
