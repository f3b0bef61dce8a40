"""`memcompile verify`: exported engines against eager, and what it makes of faulty ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from memcompile.compiler.cli import main
from memcompile.compiler.exit_codes import BAD_INPUT, DIFFERS, NONE_RAN, OK
from memcompile.compiler.export import formats, runners
from memcompile.compiler.export import verify as verify_module
from memcompile.compiler.export.contract import Contract, contract_of, places_of, read_contract
from memcompile.compiler.export.formats import Artefact, known_formats
from memcompile.compiler.export.runners import CannotRun
from memcompile.compiler.export.verify import Trace
from memcompile.compiler.export.verify import trace as trace_of
from memcompile.compiler.package import write
from memcompile.compiler.pipeline import Compiled, build
from memcompile.passes.make_functional import make_functional
from memcompile.runtime.engine import Program

ROOT = Path(__file__).resolve().parents[3]
BYTES_SMALL = ROOT / "models/networks/checkpoints/bytes-small"
Outputs = Mapping[str, Tensor]
TRACES: dict[Any, Trace] = {}


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    options = {"budget": 88, "page_size": 8, "sinks": 8, "window": 16, "dense_layers": 0}
    return build(BYTES_SMALL, "scout", kernels="off", check=False, dtype="float32", **options)


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What eager says is the same in every test here, and is asked once."""

    def trace(opened: Program, *what: Any, **how: Any) -> Trace:
        key = (*what, *how.items())
        if key not in TRACES:
            TRACES[key] = trace_of(opened, *what, **how)
        return TRACES[key]

    monkeypatch.setattr(verify_module, "trace", trace)


def run_eagerly(compiled: Compiled) -> Callable[[Path, Contract], Any]:
    """A runner of graphs that were never exported: what is tested is who compares."""
    assert compiled.program is not None and compiled.step is not None
    sites = places_of(compiled.program)
    graph = make_functional(compiled.step.policy, sites, compiled.program.ragged)

    def make(path: Path, contract: Contract) -> Any:
        assert path.read_text() == "an engine"

        def call(given: Outputs) -> Outputs:
            with torch.no_grad():
                made = graph(*(given[name] for name in contract.inputs))
            return dict(zip(contract.outputs, made, strict=True))

        return call

    return make


@pytest.fixture
def folder(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two engines, of which the second does not run here."""

    def emit(place: Path, compiled: Compiled, source: Path | None) -> Artefact:
        assert compiled.program is not None
        contract_of(compiled.program, places_of(compiled.program)).write(place)
        (place / "engine").write_text("an engine")
        return Artefact(place.name, place.name, "engine", formats.this_machine())

    monkeypatch.setattr(formats, "emitter", lambda name: emit)
    monkeypatch.setattr(runners, "RUNNERS", {"onnx": run_eagerly(compiled)})
    out = tmp_path / "out"
    write(out, compiled, emit=["onnx", "tensorrt"])
    return out


def test_an_engine_that_is_eagers_equal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), "--prompt-tokens", "200", "--steps", "5", "--json"]) == OK
    first, second = json.loads(capsys.readouterr().out)["engines"]
    assert first["format"] == "onnx" and first["outcome"] == "equal" and not first["changed"]
    assert 0 <= first["largest"] <= first["allowed"] < 1e-2
    assert first["tokens"] == (1 + 3) * 205 and first["calls"] == 2 * (7 + 5)
    assert second["outcome"] == "not run"
    assert second["reason"] == "tensorrt engines do not run on this machine"
    onnx, tensorrt = json.loads((folder / "manifest.json").read_text())["artefacts"]
    assert onnx["verified"]["outcome"] == "equal" and onnx["run"]["torch"] == torch.__version__
    assert onnx["built"]["machine"] and tensorrt["run"] is None and tensorrt["verified"] is None


def fault(wrong: Callable[[dict[str, Tensor]], None]) -> Callable[[Any], Any]:
    """A runner whose outputs are made `wrong` call by call."""

    def around(make: Any) -> Any:
        def faulty(path: Path, contract: Contract) -> Any:
            call = make(path, contract)

            def wronged(given: Outputs) -> Outputs:
                made = {**given, **call(given)}
                wrong(made)
                return made

            return wronged

        return faulty

    return around


def lose_keys(made: dict[str, Tensor]) -> None:
    made["site0_keys_out"] = made["site0_keys"]


def not_a_number(made: dict[str, Tensor]) -> None:
    made["logits"][0, -1, 0] = float("nan")


def other_shape(made: dict[str, Tensor]) -> None:
    made["logits"] = made["logits"][..., :-1]


def break_down(made: dict[str, Tensor]) -> None:
    raise RuntimeError("the runtime\nbroke")


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (lose_keys, "logits differ"),
        (not_a_number, "logits differ"),
        (other_shape, "eager's are torch.float32"),
        (break_down, "RuntimeError: the runtime broke"),
    ],
)
def test_a_faulty_engine_is_told(
    wrong: Any,
    reason: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runners, "RUNNERS", {"onnx": fault(wrong)(runners.RUNNERS["onnx"])})
    command = ["verify", str(folder), "--only", "onnx", "--prompt-tokens", "90", "--steps", "2"]
    assert main(command) == DIFFERS
    said = capsys.readouterr().out
    assert "differs" in said
    # A column of the table may be narrower than a word.
    letters = "".join(c for c in said if c.isalnum())
    assert all("".join(c for c in word if c.isalnum()) in letters for word in reason.split())
    (onnx, _) = json.loads((folder / "manifest.json").read_text())["artefacts"]
    assert onnx["run"] is not None and onnx["verified"] is None


def no_runtime(path: Path, contract: Contract) -> Any:
    raise CannotRun("onnxruntime is not installed")


@pytest.mark.parametrize("how", [[], ["--quiet"], ["--json"]], ids=["table", "quiet", "json"])
def test_where_nothing_runs_nothing_is_verified(
    how: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runners, "RUNNERS", {"onnx": no_runtime})
    command = ["verify", str(folder), "--prompt-tokens", "9", "--steps", "1", *how]
    assert main(command) == NONE_RAN
    said = capsys.readouterr()
    assert said.err == (
        "memcompile: nothing was verified, as no engine ran here (onnx: onnxruntime is not "
        "installed; tensorrt: tensorrt engines do not run on this machine)\n"
    )
    if how == ["--json"]:
        told = json.loads(said.out)["engines"]
        assert [engine["outcome"] for engine in told] == ["not run", "not run"]
    elif how == ["--quiet"]:
        assert not said.out
    else:
        assert said.out.splitlines()[-1] == "not verified, since not run here: onnx, tensorrt"
    held = json.loads((folder / "manifest.json").read_text())["artefacts"]
    assert all(artefact["run"] is artefact["verified"] is None for artefact in held)
    assert main([*command, "--only", "tensorrt"]) == NONE_RAN


def test_one_that_runs_is_enough_and_the_others_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(folder), "--prompt-tokens", "9", "--steps", "1"]) == OK
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "not verified, since not run here: tensorrt"
    assert not said.err


def test_one_that_is_wrong_outweighs_those_that_do_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runners, "RUNNERS", {"onnx": fault(lose_keys)(runners.RUNNERS["onnx"])})
    assert main(["verify", str(folder), "--prompt-tokens", "9", "--steps", "1"]) == DIFFERS
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "not verified, since not run here: tensorrt"
    assert not said.err


def test_the_help_tells_the_outcomes_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--help"]) == OK
    said = " ".join(capsys.readouterr().out.split())
    assert f"{NONE_RAN} if none of them runs here: then nothing was verified" in said


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_wrong_questions(
    folder: Path, compiled: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(["verify", str(folder), "--only", "onxn"], capsys)
    assert "unknown format 'onxn'" in said and "Did you mean 'onnx'?" in said
    said = refused(["verify", str(folder), "--only", "aoti"], capsys)
    assert "no aoti engine in it (it holds onnx, tensorrt); build it with --emit" in said
    plain = tmp_path / "plain"
    write(plain, compiled)
    assert "no exported engine in it" in refused(["verify", str(plain)], capsys)
    said = refused(["bytes", "--emit", "onnx,,aoti"], capsys)
    assert "unknown format ''" in said


def test_changed_files_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "onnx/engine").write_text("another")
    said = refused(["verify", str(folder), "--only", "onnx"], capsys)
    assert "onnx/engine" in said and "cut off or changed" in said


def test_native_code_runs_with_consent_alone(
    compiled: Compiled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran = []

    def emit(place: Path, compiled: Compiled, source: Path | None) -> Artefact:
        assert compiled.program is not None
        contract_of(compiled.program, places_of(compiled.program)).write(place)
        (place / "engine.pt2").touch()
        return Artefact(place.name, place.name, "engine.pt2", {})

    def make(path: Path, contract: Contract) -> Any:
        ran.append(path.name)
        raise CannotRun("no more than asked for")

    monkeypatch.setattr(formats, "emitter", lambda name: emit)
    monkeypatch.setattr(runners, "RUNNERS", {"aoti": make})
    out = tmp_path / "out"
    write(out, compiled, emit=["aoti"])
    command = ["verify", str(out), "--prompt-tokens", "9", "--steps", "1", "--json"]
    assert main(command) == NONE_RAN
    (told,) = json.loads(capsys.readouterr().out)["engines"]
    assert told["outcome"] == "not run" and "--trust-native" in told["reason"] and not ran
    assert main([*command, "--trust-native"]) == NONE_RAN
    assert ran == ["engine.pt2"]


def test_files_that_nobody_lists_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "onnx/prefill.onnx").touch()
    said = refused(["verify", str(folder), "--only", "onnx"], capsys)
    assert "onnx/prefill.onnx: manifest.json does not list it, and it may be loaded" in said
    (folder / "onnx/prefill.onnx").unlink()
    told = json.loads((folder / "manifest.json").read_text())
    told["artefacts"][0]["main"] = "../../elsewhere"
    (folder / "manifest.json").write_text(json.dumps(told))
    said = refused(["verify", str(folder), "--only", "onnx"], capsys)
    assert "elsewhere: manifest.json does not list it" in said
    told["artefacts"][0]["folder"] = ""
    (folder / "manifest.json").write_text(json.dumps(told))
    assert "damaged: an artefact is" in refused(["verify", str(folder)], capsys)


def test_a_damaged_contract_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folder of an exported engine"):
        read_contract(tmp_path)
    for text, reason in (("{", "damaged JSON"), ("{}", "damaged: 'state'"), ("[]", "damaged")):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_contract(tmp_path)


def test_a_contract_is_read_as_it_was_written(compiled: Compiled, tmp_path: Path) -> None:
    assert compiled.program is not None
    contract = contract_of(compiled.program, places_of(compiled.program))
    contract.write(tmp_path)
    assert read_contract(tmp_path) == contract
    assert contract.capacity is not None and contract.capacity.tokens % 8 == 0
    keys = contract.state[0]
    assert keys.grows is not None and (keys.grows.axis, keys.grows.tokens) == (2, 1)
    wrong: list[tuple[str, Any, str]] = [
        ("context", 0, "where a number of tokens was expected"),
        ("capacity", None, "there is no capacity"),
        ("tokens", "", "names are"),
    ]
    for key, value, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            Contract.from_json({**contract.to_json(), key: value})
    for key, value in (("dtype", "float8"), ("shape", [1, -1]), ("batch_axis", 9)):
        data = json.loads(json.dumps(contract.to_json()))
        data["state"][0][key] = value
        with pytest.raises(ValueError, match="site0_keys"):
            Contract.from_json(data)


def test_formats_are_known_each_once() -> None:
    assert known_formats(["onnx", "aoti", "onnx"]) == ["onnx", "aoti"]
    with pytest.raises(ValueError, match="damaged: an artefact"):
        Artefact.from_json({"format": "onnx"})
    with pytest.raises(ValueError, match="damaged: an artefact"):
        Artefact.from_json({**Artefact("onnx", "../x", "m", {}).to_json()})


def test_nothing_is_written_for_a_format_that_fails(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emit(place: Path, *rest: Any) -> Artefact:
        (place / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "emitter", lambda name: emit)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", compiled, emit=["onnx"])
    assert not list(tmp_path.iterdir())


def test_export_from_python_refuses_before_it_works(tmp_path: Path) -> None:
    import memcompile

    model: Any = SimpleNamespace()
    with pytest.raises(ValueError, match=r"give a list of them, as in \['onnx'\]"):
        memcompile.export(model, tmp_path / "out", "onnx")
    with pytest.raises(ValueError, match="no format is given"):
        memcompile.export(model, tmp_path / "out", [])
    with pytest.raises(ValueError, match="unknown format 'tensorflow'"):
        memcompile.export(model, tmp_path / "out", ["tensorflow"])
    with pytest.raises(ValueError, match="strict=False"):
        memcompile.export(model, tmp_path / "out", ["onnx"], strict=False)
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError):
        memcompile.export(model, tmp_path / "kept", ["onnx"])
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
