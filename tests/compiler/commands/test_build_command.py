"""`memcompile MODEL`: what it writes, what it refuses and keeps, and the exit code of each."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_case import SMALL

from memcompile import codegen
from memcompile.codegen.cpp import NoCompiler
from memcompile.compiler import manifest, package, pipeline
from memcompile.compiler.arguments import policy_options
from memcompile.compiler.commands.files import default_name
from memcompile.compiler.load import Loaded


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


@pytest.fixture(scope="module")
def compiled(network: Path) -> Any:
    """What the network compiles to, once."""
    return pipeline.build(network, "dense", check=False, kernels="off")


@pytest.fixture
def built_once(network: Path, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line gets that, so that only the writing is left."""
    given = Loaded("transformers", network, module=torch.nn.Identity())
    monkeypatch.setattr("memcompile.compiler.load.load", lambda path, **options: given)
    monkeypatch.setattr(pipeline, "build", lambda *arguments, **options: compiled)


def test_an_earlier_build_is_replaced_only_when_told(
    say: Any, network: Path, built_once: None
) -> None:
    assert say(network, "--out", "out", "--quiet").code == 0
    marker = Path("out/marker")
    marker.touch()
    said = say(network, "--out", "out")
    assert said.code == 2 and "--force" in said.err and marker.exists()
    assert say(network, "--out", "out", "--force", "--quiet").code == 0
    assert not marker.exists()


def test_quiet_leaves_what_json_asks_for(say: Any, network: Path, built_once: None) -> None:
    said = say(network, "--dry-run", "--quiet")
    assert (said.code, said.out, said.err) == (0, "", "")
    assert json.loads(say(network, "--dry-run", "--quiet", "--json").out)["policy"] == "dense"


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


def test_a_refused_model_can_have_its_report(say: Any, without_attention: Path) -> None:
    asked = (without_attention, "--no-strict", "--out", "refused", "--quiet")
    assert say(*asked).code == 0
    folder = Path("refused")
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "report.html",
        "report.json",
    ]
    assert "No attention was rewritten" in (folder / "report.html").read_text()
    for command in (["run", "--ids", "--prompt", "1"], ["bench"], ["eval"]):
        said = say(command[0], folder, *command[1:])
        assert said.code == 2
        assert "refused: holds no engine: the model was refused; report.html in it" in said.err
    pytest.importorskip("triton")
    said = say(*asked[:2], "--target", "cuda:sm_90", "--dry-run")
    assert said.code == 0 and "no kernels were compiled: nothing was rewritten" in said.out
    kept = say(*asked)
    assert kept.code == 2 and "already exists and is kept; give --force" in kept.err
    assert say(*asked, "--force").code == 0


def test_nothing_rewritten_is_code_3_and_says_what_was_looked_for(
    say: Any, without_attention: Path
) -> None:
    said = say(without_attention)
    assert said.code == 3 and said.err.startswith("memcompile: flat.pt2: ")
    assert "scaled_dot_product_attention" in said.err
    looked = say("inspect", without_attention)
    assert looked.code == 3 and "no step can be derived" in looked.out
    loose = say(without_attention, "--no-strict")
    assert loose.code == 0 and "wrote the report alone to flat.scout/" in loose.out
    assert [path.name for path in Path.cwd().iterdir()] == ["flat.scout"]


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


@pytest.fixture
def filled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that memcompile wrote, for whoever moves it about, is one with its manifest."""

    def fill(folder: Path, *arguments: Any) -> None:
        (folder / "weights").touch()
        (folder / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT}))

    monkeypatch.setattr(package, "_fill", fill)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whoever started the tests in the background may have let them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("moment", ["writing", "between", "after"])
def test_a_signal_leaves_nothing_half_done(
    say: Any,
    network: Path,
    built_once: None,
    filled_at_once: None,
    interruptible: None,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    earlier: bool,
    moment: str,
) -> None:
    """While the folder is written, between the renames, and after them."""
    if earlier:
        assert say(network, "--out", "out", "--quiet").code == 0
        Path("out/marker").touch()
    before = signal.getsignal(signal.SIGTERM)
    fill, rename, count = package._fill, Path.rename, 0

    def interrupt() -> None:
        signal.raise_signal(number)  # to this thread: another's would not end its sleep
        time.sleep(5)

    def filled(*arguments: Any) -> None:
        fill(*arguments)
        if moment == "writing":
            interrupt()

    def renamed(path: Path, target: Path) -> Path:
        nonlocal count
        moved = rename(path, target)
        count += 1
        if (moment == "between" and count == 1) or (moment == "after" and path.name == "new"):
            interrupt()
        return moved

    monkeypatch.setattr(package, "_fill", filled)
    monkeypatch.setattr(Path, "rename", renamed)
    said = say(network, "--out", "out", "--force")
    monkeypatch.setattr(Path, "rename", rename)
    assert said.code == code and "Traceback" not in said.err
    assert signal.getsignal(signal.SIGTERM) is before
    # The first rename of a new folder is the last, too: then it is there, and whole.
    there = earlier or moment != "writing"
    assert [path.name for path in Path.cwd().iterdir()] == ["out"] * there
    if there:
        assert manifest.is_package(Path("out")) and Path("out/weights").exists()
        assert Path("out/marker").exists() == (earlier and moment != "after")


def test_a_model_file_loses_its_suffix_and_a_folder_keeps_its_dots(tmp_path: Path) -> None:
    (tmp_path / "llama-3.1").mkdir()
    assert default_name(tmp_path / "llama-3.1", "scout") == "llama-3.1.scout"
    assert default_name(tmp_path / "model.pt", "dense") == "model.dense"
    assert default_name(tmp_path / "model.v2", "dense") == "model.v2.dense"
