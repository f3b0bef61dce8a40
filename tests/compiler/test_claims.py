"""Damaged files that fuzzing found: what they claim is held to what they hold."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_payloads import PROGRAM, Decoder, Entries, Touch, edit, exported, saved, write_entries
from safetensors.torch import load_file

from memcompile.compiler.claims import check_claims
from memcompile.compiler.cli import main
from memcompile.compiler.load import load
from memcompile.compiler.package import read, write
from memcompile.compiler.pipeline import build
from memcompile.compiler.policy_file import fit, read_policy, write_policy
from memcompile.models.memory import preset, preset_from_json
from memcompile.models.memory.state import state_weights


@pytest.fixture(scope="module")
def clean() -> Entries:
    torch.manual_seed(0)
    return saved(exported())


def nodes(data: Any, name: str) -> Any:
    return next(n for n in data["graph_module"]["graph"]["nodes"] if name in n["target"])


def values(data: Any) -> Any:
    return data["graph_module"]["graph"]["tensor_values"]


def other_size(data: Any) -> None:
    name = nodes(data, "linear")["outputs"][0]["as_tensor"]["name"]
    values(data)[name]["sizes"][2]["as_int"] += 1


def other_type(data: Any) -> None:
    name = nodes(data, "scaled_dot")["outputs"][0]["as_tensor"]["name"]
    values(data)[name]["dtype"] = 8


def other_symbol(data: Any) -> None:
    name = nodes(data, "linear")["outputs"][0]["as_tensor"]["name"]
    values(data)[name]["sizes"][:2] = reversed(values(data)[name]["sizes"][:2])


def no_tensor(data: Any) -> None:
    nodes(data, "aten.add")["inputs"][0]["arg"] = {"as_float": 0.0}


def wrong_axis(data: Any) -> None:
    nodes(data, "unsqueeze")["inputs"][1]["arg"] = {"as_int": 99}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_size, "aten.linear.default"),
        (other_type, "the file says"),
        (other_symbol, "the file says"),
        (no_tensor, "damaged"),
        (wrong_axis, "cannot be run"),
    ],
)
def test_a_graph_that_lies_about_its_values(
    change: Callable[[Any], None], words: str, clean: Entries, tmp_path: Path
) -> None:
    entries = dict(clean)
    edit(entries, PROGRAM, change)
    path = write_entries(entries, tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"damaged|cannot read") as refused:
        load(path)
    message = str(refused.value)
    assert words in message or "cannot read" in message
    assert message.startswith(f"{path}: ") and "\n" not in message


def test_what_export_writes_is_what_it_claims() -> None:
    check_claims(exported())


def test_an_embedding_may_take_its_tokens_by_name(clean: Entries, tmp_path: Path) -> None:
    def named(data: Any) -> None:
        nodes(data, "embedding")["inputs"][1]["kind"] = 2  # a keyword

    entries = dict(clean)
    edit(entries, PROGRAM, named)
    program = load(write_entries(entries, tmp_path / "model.pt2")).model
    compiled = build(program, "dense", check=False, kernels="off", strict=False)
    assert compiled.program is not None and compiled.program.vocabulary == 11


@pytest.mark.parametrize("policy", ["window", "scout", "hierarchical"])
def test_a_number_that_no_position_reaches_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=r"window must be at most 2147483647: positions are 32"):
        preset(policy, window=1 << 64).memory(9, 0)


def test_a_weight_of_another_shape_is_named() -> None:
    program = exported()
    program.state_dict["mix.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'mix.bias' is \[3\] torch.float32, and its graph"):
        check_claims(program)


@pytest.mark.parametrize("name", ["mix.bias", "table"])
def test_a_weight_that_is_not_there_is_named(name: str) -> None:
    program = exported()
    for held in (program.state_dict, program.constants):
        held.pop(name, None)
    with pytest.raises(ValueError, match=f"its graph takes the weight {name!r}, which it does"):
        check_claims(program)


def test_a_pickle_named_safetensors_is_told_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    torch.save({"w": Touch(tmp_path / "marker")}, path)
    with pytest.raises(ValueError, match=r"a file written by torch.save.*mkdir"):
        load(path)
    torch.save(Decoder().state_dict(), path)
    assert load(path, arch="archive_payloads:Decoder").kind == "state-dict"
    assert not (tmp_path / "marker").exists()


def test_a_flipped_bit_in_a_pickle_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save(Decoder(), path)
    data = bytearray(path.read_bytes())
    data[data.index(b"archive_payloads") + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("arch", [".x:y", "a..b:c", "a:b c", "1:2"])
def test_an_arch_of_no_names_is_no_arch(arch: str, tmp_path: Path) -> None:
    torch.save(Decoder().state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="expected module:Class"):
        load(tmp_path / "w.pt", arch=arch)


def test_an_arch_whose_module_breaks_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks_at_import.py").write_text("1 / 0")
    torch.save(Decoder().state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot import 'breaks_at_import': division by zero"):
        load("w.pt", arch="breaks_at_import:Net")


def test_a_policy_of_numbers_where_texts_belong() -> None:
    with pytest.raises(ValueError, match="rest must be a text, got 7"):
        preset_from_json({"preset": "hybrid", "rest": 7})
    with pytest.raises(ValueError, match="score must be a text"):
        preset("scout", score=1)


@pytest.mark.parametrize(
    ("claim", "value", "told"),
    [
        ("heads", 1 << 40, r"cannot be used: .*expected \[1099511627776, "),
        ("key_dim", 1 << 31, r"cannot be used: .*which no attention has"),
    ],
)
def test_a_policy_file_that_claims_too_much_takes_no_memory(
    claim: str, value: int, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    bare = build(exported(), "hybrid", state_layers=(0,), window=8, page_size=8, kernels="off")
    (site,) = bare.sites
    assert bare.captured is not None
    fitted = {site.name: state_weights(bare.memories[site.name], 1, 1, 8)}
    write_policy(path, fit(bare.preset, fitted, bare.sites, bare.captured.program, {}))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["memcompile-policy"])
    about["sites"][site.name][claim] = value
    header["__metadata__"]["memcompile-policy"] = json.dumps(about)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match=told):
        read_policy(path)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "engine"
    return write(folder, build(exported(), "dense", kernels="off"))


def test_a_manifest_without_its_version(engine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engine, tmp_path / "engine"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["memcompile"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="its 'memcompile' is None"):
        read(folder)
    assert load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("context", [1 << 31, 1 << 63, 10**30])
def test_a_context_beyond_32_bits_is_refused(
    context: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.export.save(exported(), tmp_path / "m.pt2")
    for command in ([], ["inspect"]):
        words = [*command, str(tmp_path / "m.pt2"), "--max-context", str(context)]
        assert main([*words, *(["--dry-run"] if not command else [])]) == 2
        assert "positions are 32 bit" in capsys.readouterr().err


def test_too_little_memory_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.export.save(exported(), tmp_path / "m.pt2")

    def large(*arguments: Any, **options: Any) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr("memcompile.compiler.pipeline.build", large)
    assert main([str(tmp_path / "m.pt2"), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "not enough memory for this" in said and "Traceback" not in said


def test_what_a_line_holds_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model.pt", "\x1b[31m\n\x07"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "\x1b" not in said and "\\x1b[31m" in said
    assert main(["\x1b[31m.pt2"]) == 2
    assert "\\x1b[31m.pt2" in capsys.readouterr().err


def test_a_pickle_of_plain_data_is_still_a_pickle(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="a Python pickle"):
        load(tmp_path / "m.pt")
