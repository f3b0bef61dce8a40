"""`memcompile eval` from end to end: files, resuming, refusals and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_case import CHECKPOINT, SMALL, silently_dense

from memcompile.compiler import evaluate, pipeline
from memcompile.compiler.arguments import BadInput, parse_numbers, parse_policies
from memcompile.compiler.cli import main
from memcompile.compiler.manifest import read_manifest
from memcompile.evaluation.records import RECORDS, SETTINGS
from memcompile.models.networks import induction

FIELDS = ",".join(f"{name}={value}" for name, value in SMALL.items())
POLICY = f"scout:{FIELDS}"
NAME = "scout:" + ",".join(f"{name}={value}" for name, value in sorted(SMALL.items()))
QUICK = ["--lengths", "640", "--depths", "0,1", "--samples", "1", "--start", "0"]
FILES = {RECORDS, SETTINGS, "summary.json", "table.md"}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return induction.save(tmp_path_factory.mktemp("models") / "induction")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command line in an empty folder; gives its code, stdout and stderr."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is captured once for all tests that ask for this."""
    monkeypatch.setattr(evaluate, "subject_of", subject_once)


SUBJECT_OF, SUBJECTS = evaluate.subject_of, dict[str, Any]()


def subject_once(loaded: Any, name: str, max_context: int | None) -> Any:
    if name not in SUBJECTS:
        SUBJECTS[name] = SUBJECT_OF(loaded, name, max_context)
    return SUBJECTS[name]


def kept(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, RECORDS).read_text().splitlines()]


def test_an_evaluation_leaves_records_tables_and_pictures(say: Any, network: Path) -> None:
    asked = ("eval", network, "--policy", POLICY, *QUICK, "--tasks", "single,mqar")
    code, out, err = say(*asked)
    assert (code, err) == (0, "")
    assert "no claim: 2 prompts < 20" in out and "wrote needles-single.png" in out
    written = {path.name for path in Path("induction.eval").iterdir()}
    assert written >= FILES and {path[:7] for path in written - FILES} == {"needles", "quality"}
    records = kept("induction.eval")
    assert len(records) == 2 * 2 * 2
    assert {record["score"] for record in records} == {1.0}
    assert {record["policy"] for record in records} == {"dense", NAME}
    before = Path("induction.eval", RECORDS).read_bytes()
    code, out, _ = say(*asked, "--json")
    found = json.loads(out)
    assert code == 0 and found == json.loads(Path("induction.eval/summary.json").read_text())
    assert len(found["rows"]) == 4 and all(row["value"]["mean"] == 1 for row in found["rows"])
    assert Path("induction.eval", RECORDS).read_bytes() == before


@pytest.mark.usefixtures("captured_once")
def test_memories_of_several_kinds_and_page_sizes_stand_beside_dense(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested = POLICY.replace(",", ";")
    policies = [
        "hierarchical:refine=32,levels=8+64,sinks=8,window=16,dense_layers=0",
        f"mixture:layers=0=dense+1=quest:budget=64;dense_layers=0,default={nested}",
        f"hybrid:state_layers=1,window=16,rest={nested}",
    ]
    monkeypatch.setattr(evaluate, "_write", lambda *outcome: [])
    given = [word for policy in policies for word in ("--policy", policy)]
    quick = ["--lengths", "640", "--depths", "1", "--samples", "1", "--start", "0"]
    code, out, err = say("eval", network, *given, *quick, "--tasks", "single", "--out", "out")
    assert code == 0, err
    records = {record["policy"].partition(":")[0]: record for record in kept("out")}
    assert [*records] == ["dense", "hierarchical", "mixture", "hybrid"]
    assert all(record["resident_bytes"] > 0 for record in records.values())
    assert [name for name, record in records.items() if record["state_bytes"]] == ["hybrid"]
    pages = {name: record["pages_dense"] for name, record in records.items()}
    assert pages["dense"] == pages["hierarchical"] > pages["mixture"]
    assert out.count("; 1 of 2 layers dense") == 1 and "; 1 of 2 with a state" in out
    assert out.count("note: ") == out.count("are not fitted: what they read is not") == 1
    assert "note: hybrid:rest=scout:" in out


@pytest.mark.usefixtures("captured_once")
def test_an_interrupted_evaluation_loses_one_prompt_and_goes_on(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("eval", network, "--policy", POLICY, *QUICK, "--tasks", "single,mqar", "--out", "out")
    from memcompile.evaluation import run

    ask, calls = run.ask, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return ask(*arguments)

    monkeypatch.setattr(run, "ask", interrupted)
    monkeypatch.setattr(evaluate, "_write", lambda *outcome: [])
    code, out, err = say(*asked)
    assert (code, out) == (130, "") and "3 of 8 are kept in out" in err
    first = kept("out")
    assert len(first) == 3
    assert say(*asked)[0] == 0
    assert len(calls) == 4 + 5 and kept("out")[:3] == first
    assert len({(r["task"], r["depth"], r["sample"], r["policy"]) for r in kept("out")}) == 8


@pytest.mark.usefixtures("captured_once")
def test_a_cheat_is_code_4_and_one_line(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = pipeline.build_captured

    def cheating(captured: Any, chosen: Any, **options: Any) -> Any:
        compiled = build(captured, chosen, **options)
        assert compiled.program is not None
        compiled.program = silently_dense(compiled.program)
        return compiled

    monkeypatch.setattr(pipeline, "build_captured", cheating)
    code, out, err = say("eval", network, "--policy", POLICY, *QUICK, "--out", "out")
    assert (code, out) == (4, "") and len(err.splitlines()) == 1
    assert "no evidence for the policy" in err and f"{NAME!r} read" in err
    assert {record["policy"] for record in kept("out")} == {"dense"}
    assert not Path("out/summary.json").exists()


def test_a_compiled_folder_is_held_against_dense_under_its_own_policy(say: Any) -> None:
    settings = [word for field in FIELDS.split(",") for word in ("--set", field)]
    assert say(CHECKPOINT, *settings, "--out", "engine", "--quiet")[0] == 0
    Path("text.txt").write_text("A line of text, and another one.\n" * 40)
    code, out, err = say(
        *("eval", "engine", "--lengths", 512, "--depths", 0.5, "--samples", 2, "--stride", 16),
        *("--tasks", "single,late-constraint,text-loss", "--text", "text.txt", "--out", "out"),
    )
    assert code == 0, err
    assert "a byte" in out and "single, 512" in out
    assert {record["policy"] for record in kept("out")} == {"dense", "scout"}
    assert {r["task"] for r in kept("out")} == {"single", "late-constraint", "text-loss"}
    # The folder's own report has the rows too, and says where they are from.
    page = Path("engine/report.html").read_text()
    assert 'id="quality"' in page and "<code>out</code>" in page
    quality = json.loads(Path("engine/quality.json").read_text())
    assert quality["rows"] == json.loads(Path("out/summary.json").read_text())["rows"]
    assert quality["own"] == "scout"
    read_manifest(Path("engine"))
    refused = say("eval", "engine", "--max-context", 5)
    assert refused[0] == 2 and "was compiled already" in refused[2]
    refused = say("eval", "engine", "--start", 5)
    assert refused[0] == 2 and "--start goes with models without" in refused[2]


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--policy", "scuot"], ["'scuot'", "did you mean 'scout'"]),
        (["--policy", "scout:budgte=3"], ["'budgte'", "did you mean 'budget'"]),
        (["--policy", "scout:max_context=3"], ["--max-context, which holds for all"]),
        (["--policy", "scout", "--policy", "scout"], ["'scout' is given twice"]),
        (["--tasks", "sinlge"], ["--tasks", "did you mean 'single'", "text-loss"]),
        (["--lengths", "4k"], ["--lengths", "whole numbers", "'4k'"]),
        (["--depths", "middle"], ["--depths", "numbers with commas"]),
        (["--wording", "byte"], ["'byte'", "did you mean 'bytes'"]),
        (["--samples", "0"], ["--samples"]),
        ([], ["0 of 'dense' and 0 others", "give --policy, as in --policy scout:budget=512"]),
        (["--policy", "dense", "--policy", "dense:page_size=8"], ["2 of 'dense' and 0 others"]),
        (["--policy", "scout", "--wording", "bytes"], ["need a tokenizer.json"]),
        (["--policy", "scout", "--start", "65"], ["token 65", "vocabulary of 65"]),
        (["--policy", "scout:dense_layers=9"], ["keeps all 2 attentions dense"]),
        (["--policy", "scout:dense_layers=0", "--lengths", "512"], ["nothing to skip"]),
        (["--policy", POLICY, "--tasks", "tracking"], ["no let, same, trace"]),
        (["--policy", "scout:budget=512", "--text", "absent.txt"], ["absent.txt: no such file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_evaluated_is_one_line_and_code_2(
    say: Any, network: Path, arguments: list[str], found: list[str]
) -> None:
    code, out, err = say("eval", network, *arguments)
    assert (code, out) == (2, ""), err
    assert len(err.strip().splitlines()) == 1
    for part in found:
        assert part in err
    assert not [*Path().iterdir()]


@pytest.mark.usefixtures("captured_once")
def test_another_evaluation_in_the_folder_is_refused(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["eval", network, "--policy", POLICY, *QUICK, "--tasks", "single", "--out", "out"]
    monkeypatch.setattr(evaluate, "_write", lambda *outcome: [])
    assert say(*asked)[0] == 0
    before = Path("out", RECORDS).read_bytes()
    code, _, err = say(*asked, "--seed", "1")
    assert code == 2 and "(plan.seed was 0, is 1)" in err
    # What an earlier format's records lack cannot be made up for.
    settings = Path("out", SETTINGS)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "version": 1}))
    code, _, err = say(*asked)
    assert code == 2 and f"(version was 1, is {evaluate.VERSION})" in err
    assert Path("out", RECORDS).read_bytes() == before


@pytest.mark.usefixtures("captured_once")
def test_a_file_is_no_folder(say: Any, network: Path) -> None:
    Path("out").write_text("mine")
    code, _, err = say("eval", network, "--policy", POLICY, "--out", "out")
    assert code == 2 and "out: not a folder; give another --out" in err
    assert Path("out").read_text() == "mine"


@pytest.mark.usefixtures("captured_once")
def test_a_text_that_is_none_is_refused(say: Any, network: Path) -> None:
    Path("text.txt").write_bytes(b"abc\xff")
    code, _, err = say("eval", network, "--policy", POLICY, "--text", "text.txt")
    assert code == 2 and "0xff at 3" in err


def test_missing_libraries_are_told_before_anything_is_done(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = evaluate.importlib.util.find_spec
    monkeypatch.setattr(
        evaluate.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "scipy" else find(name, *rest),
    )
    code, _, err = say("eval", network, "--policy", POLICY)
    assert code == 2 and "needs scipy: pip install 'memcompile[eval]'" in err
    assert not [*Path().iterdir()]


def test_a_tokenizer_file_needs_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install 'memcompile"):
        evaluate.FileTokenizer(CHECKPOINT / "tokenizer.json")


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json: no tokenizer that can be read"):
        evaluate.FileTokenizer(tmp_path / "tokenizer.json")


def test_the_end_token_is_read_beside_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes((CHECKPOINT / "tokenizer.json").read_bytes())
    assert evaluate.FileTokenizer(path).end is None
    config = tmp_path / "tokenizer_config.json"
    for said, end in (({"eos_token": "a"}, 97), ({"eos_token": {"content": "b"}}, 98), ({}, None)):
        config.write_text(json.dumps(said))
        assert evaluate.FileTokenizer(path).end == end
    config.write_text("{")
    with pytest.raises(ValueError, match="damaged JSON"):
        _ = evaluate.FileTokenizer(path).end


def test_specs_of_policies_are_read_and_named() -> None:
    assert parse_policies(["scout", "scout:budget=512, page-size=8", "scout:budget=none"]) == {
        "scout": ("scout", {}),
        "scout:budget=512,page_size=8": ("scout", {"budget": 512, "page_size": 8}),
        "scout:budget=none": ("scout", {"budget": None}),
    }
    again = parse_policies([*parse_policies(["scout:compensate=no,budget=512"])])
    assert again == {
        "scout:budget=512,compensate=false": ("scout", {"budget": 512, "compensate": False})
    }
    assert parse_numbers("--depths", "0, 0.5", float) == (0.0, 0.5)


def test_fields_of_several_values_and_policies_within_policies_are_read_and_named() -> None:
    specs = {
        "hierarchical:levels=64+512": {"levels": (64, 512)},
        "hybrid:state_layers=1+3": {"state_layers": (1, 3)},
        "hybrid:rest=scout:budget=512;window=64": {"rest": "scout:budget=512;window=64"},
        "mixture:default=scout,layers=0=dense+1=hybrid": {
            "layers": {"0": "dense", "1": "hybrid"},
            "default": "scout",
        },
    }
    named = parse_policies(specs)
    assert {name: options for name, (_, options) in named.items()} == specs
    assert parse_policies(named) == named
    for wrong, message in {
        "hybrid:rest=scuot": "'scuot'",
        "hybrid:state_layers=1;3": "state_layers.*whole numbers with . between",
        "mixture:layers=0": "layers.*LAYER=POLICY with . between",
        "hierarchical:levels=64x512": "levels",
    }.items():
        with pytest.raises((BadInput, ValueError), match=message):
            parse_policies([wrong])


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    """Whoever used the file last may have left both on."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    fast.enable_truncation(4)
    fast.enable_padding(length=16, pad_id=0, pad_token="!")
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = evaluate.FileTokenizer(tmp_path / "tokenizer.json")
    assert [len(tokenizer.encode("x" * n)) for n in (1, 40)] == [1, 40]
