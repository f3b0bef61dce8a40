"""Policy files: what was fitted comes back to the bit, wherever a policy is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_payloads import exported
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from memcompile.compiler import package
from memcompile.compiler.arguments import parse_policies, policy_options, split_spec
from memcompile.compiler.backend import memcompile
from memcompile.compiler.cli import main
from memcompile.compiler.manifest import facts
from memcompile.compiler.package import open_engine, write
from memcompile.compiler.pipeline import Compiled, build
from memcompile.compiler.policy_file import (
    FORMAT,
    FittedPolicy,
    choose,
    fit,
    policy_name,
    read_policy,
    write_policy,
)
from memcompile.models.memory import preset
from memcompile.models.memory.state import state_weights

IDS = torch.arange(1, 11).repeat(4)[None]
HYBRID = {"state_layers": (0,), "window": 8, "page_size": 8}
SITE = {"layer": 0, "heads": 1, "kv_heads": 1, "key_dim": 8, "value_dim": 8}


def weights(**changes: Tensor) -> dict[str, Tensor]:
    """Those of the decoder's state, as if something had been fitted."""
    plain = state_weights(preset("hybrid", **HYBRID).memory(0, 0), 1, 1, 8)
    moved = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in plain.items()}
    return moved | changes


@pytest.fixture(scope="module")
def model() -> ExportedProgram:
    torch.manual_seed(0)
    return exported()


@pytest.fixture(scope="module")
def bare(model: ExportedProgram) -> Compiled:
    """The model under the policy, with nothing fitted."""
    return build(model, "hybrid", **HYBRID)


@pytest.fixture(scope="module")
def policy(bare: Compiled) -> FittedPolicy:
    torch.manual_seed(1)
    assert bare.captured is not None
    (site,) = bare.sites
    told = {"errors": {site.name: [0.5, 0.1]}}
    return fit(bare.preset, {site.name: weights()}, bare.sites, bare.captured.program, told)


@pytest.fixture(scope="module")
def written(policy: FittedPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policies") / "decoder.safetensors"
    write_policy(path, policy)
    return path


def same(one: FittedPolicy, other: FittedPolicy) -> bool:
    return one.sha256 == other.sha256 and all(
        getattr(one, name) == getattr(other, name)
        for name in ("base", "sites", "model", "training")
    )


# --- there and back ---


def test_a_policy_comes_back_to_the_bit(policy: FittedPolicy, written: Path) -> None:
    again = read_policy(written)
    assert same(again, policy)
    for site, tensors in policy.fitted.items():
        assert all(torch.equal(again.fitted[site][key], tensors[key]) for key in tensors)
    assert written.read_bytes()[8:9] == b"{"  # a header of JSON: no pickle, no archive


def test_a_write_that_fails_leaves_what_was_there(
    policy: FittedPolicy, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(written, tmp_path / "p.safetensors"))
    other = dataclasses.replace(policy, model="other")

    def full(*args: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="no space"):
            write_policy(path, other)
    assert same(read_policy(path), policy) and [*tmp_path.iterdir()] == [path]
    write_policy(path, other)
    assert read_policy(path).model == "other"


# --- what is refused ---


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """The same file after `change` of what it says of itself and of its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[FORMAT])
    tensors = load_file(path)
    change(about, tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {FORMAT: json.dumps(about)})


def told(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda about, tensors: about.update(changes)


def of_site(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda about, tensors: next(iter(about["sites"].values())).update(changes)


def void(result: object) -> None:
    """What `result` came from was done for its effect."""


def of_tensors(
    change: Callable[[dict[str, Tensor], str], object],
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda about, tensors: void(change(tensors, f"{next(iter(about['sites']))}/"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (told(format="x"), "does not say that it is a policy file"),
        (told(version=2), "version 2; this memcompile reads version 1: use the memcompile"),
        (told(preset=3), "its 'preset' is 3"),
        (told(preset={"preset": "x"}), "unknown policy 'x'"),
        (told(preset={"preset": "hybrid", "x": 1}), "has no option 'x'"),
        (told(preset={"preset": "dense"}), "has no state under the policy but the memory 'dense'"),
        (told(sites=None), "its 'sites' is None"),
        (told(sites={}), "belongs to none of its sites"),
        (told(training=[]), r"its 'training' is \[\]"),
        (told(model=None), "its 'model' is None"),
        (of_site(heads=0), "heads 0.*which no attention has"),
        (of_site(heads="1"), "expected numbers for layer, heads, kv_heads, key_dim, value_dim"),
        (of_site(more=1), "expected numbers for"),
        (of_site(heads=3, kv_heads=2), "which no attention has"),
        (of_site(heads=2), r"query_map is \[1, 8, 8\] torch.float32; expected \[2, 8, 8\]"),
        (
            lambda about, tensors: about["sites"].update(more=SITE),
            "the site 'more' has the tensors none; its state has query_map",
        ),
        (of_tensors(lambda t, s: t.update(loose=torch.ones(1))), "'loose' belongs to none"),
        (of_tensors(lambda t, s: t.update({s + "x": torch.ones(1)})), "its state has query_map"),
        (of_tensors(lambda t, s: t.pop(s + "mass")), "its state has query_map, key_map, mass"),
        (
            of_tensors(lambda t, s: t.update({s + "mass": t[s + "mass"].half()})),
            r"mass is \[1\] torch.float16; expected \[1\] torch.float32",
        ),
        (
            of_tensors(lambda t, s: t[s + "key_map"][0, 0, :2].fill_(float("nan"))),
            "key_map: 2 of 64 numbers are not finite",
        ),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused(
    written: Path, tmp_path: Path, change: Any, message: str
) -> None:
    path = Path(shutil.copy(written, tmp_path / "p.safetensors"))
    rewritten(path, change)
    with pytest.raises(ValueError, match=message) as raised:
        read_policy(path)
    assert str(raised.value).startswith(str(path))


def test_damaged_and_foreign_files_are_refused(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    whole = written.read_bytes()
    for data in (b"", b"not tensors", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged, or no safetensors"):
            read_policy(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="a safetensors file, but not a policy file, as `memcomp"):
        read_policy(path)
    save_file({"x": torch.ones(2)}, path, {FORMAT: "{"})
    with pytest.raises(ValueError, match="damaged: what it says of itself"):
        read_policy(path)
    with pytest.raises(FileNotFoundError, match="nothing there; expected a policy file"):
        read_policy(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="a folder; expected a policy file"):
        read_policy(tmp_path)


def test_weights_and_shapes_of_other_sites_are_refused(policy: FittedPolicy) -> None:
    with pytest.raises(ValueError, match=r"for the sites a, shapes of the sites .*; give both"):
        dataclasses.replace(policy, fitted={"a": weights()})


def test_a_model_that_the_weights_cannot_belong_to_is_refused(
    policy: FittedPolicy, bare: Compiled
) -> None:
    policy.check(bare.sites)
    (site,) = bare.sites
    renamed = dataclasses.replace(site, name="layers.7")
    with pytest.raises(ValueError, match=r"does not have; its sites are layers\.7"):
        policy.check([renamed])
    with pytest.raises(ValueError, match=r"key_dim 8.*key_dim 16, value_dim 8: give the policy"):
        policy.check([dataclasses.replace(site, key_dim=16)])
    assert bare.captured is not None
    with pytest.raises(ValueError, match="weights for x, and the model's sites are"):
        fit(bare.preset, {"x": weights()}, bare.sites, bare.captured.program)


# --- wherever a policy is named ---


def test_options_that_the_weights_do_not_depend_on_may_be_given(written: Path) -> None:
    chosen = choose(written, {"rest": "scout:budget=512"})
    assert chosen.to_json()["rest"] == "scout:budget=512"
    assert isinstance(chosen, FittedPolicy) and chosen.sha256 == read_policy(written).sha256
    with pytest.raises(ValueError, match=r"with window=16 the site .* has another memory"):
        choose(str(written), {"window": 16})
    with pytest.raises(ValueError, match="has no option 'budget'"):
        choose(written, {"budget": 16})
    assert choose("scout", {"budget": 512}) == preset("scout", budget=512)


def test_the_command_line_reads_policies_by_name_and_by_file(written: Path) -> None:
    path = str(written)
    assert policy_name(path) == "decoder" and policy_name("scout") == "scout"
    assert split_spec("scout:budget=1, window=2") == ("scout", ["budget=1", "window=2"])
    assert split_spec(path) == (path, [])
    assert split_spec(f"{path}:rest=scout:budget=512") == (path, ["rest=scout:budget=512"])
    assert policy_options(path, ["rest=scout"], budget=None, max_context=9) == {
        "rest": "scout",
        "max_context": 9,
    }
    with pytest.raises(ValueError, match="another memory"):
        policy_options(path, ["window=16"], budget=None, max_context=None)
    assert parse_policies([path, f"{path}:rest=scout", "hybrid:state_layers=0+2"]) == {
        "decoder": (path, {}),
        "decoder:rest=scout": (path, {"rest": "scout"}),
        "hybrid:state_layers=0+2": ("hybrid", {"state_layers": (0, 2)}),
    }


def test_an_engine_runs_with_the_fitted_weights(
    model: ExportedProgram, bare: Compiled, policy: FittedPolicy, written: Path
) -> None:
    fitted = build(model, written)
    assert isinstance(fitted.preset, FittedPolicy) and same(fitted.preset, policy)
    assert any("not fitted" in note for note in bare.report.notes)
    assert not any("fitted" in note for note in fitted.report.notes)
    ours, unfitted = fitted.engine()(IDS), bare.engine()(IDS)
    assert not torch.equal(ours, unfitted)
    assert torch.equal(ours[:, :8], unfitted[:, :8])  # the window holds them all
    again = build(model, str(written)).engine()(IDS)
    assert torch.equal(ours, again)


def test_weights_of_another_model_of_the_same_shape_are_told_of(written: Path) -> None:
    torch.manual_seed(5)
    notes = build(exported(), written).report.notes
    assert any("fitted to another model of the same shape" in note for note in notes)


def test_a_package_keeps_what_was_fitted(
    model: ExportedProgram, written: Path, policy: FittedPolicy, tmp_path: Path
) -> None:
    gone = Path(shutil.copy(written, tmp_path / "gone.safetensors"))
    compiled = build(model, gone)
    folder = write(tmp_path / "decoder.hybrid", compiled)
    gone.unlink()
    assert "policy.safetensors" in json.loads((folder / "manifest.json").read_text())["files"]
    held = package.read(folder).preset
    assert isinstance(held, FittedPolicy) and same(held, policy)
    assert torch.equal(open_engine(folder)(IDS), compiled.engine()(IDS))

    kept = folder / "policy.safetensors"
    write_policy(kept, dataclasses.replace(policy, model="other"))
    with pytest.raises(ValueError, match=r"policy\.safetensors: .*(bytes|sha256)"):
        package.read(folder)
    write_policy(kept, policy.with_options({"rest": "scout"}))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["policy.safetensors"] = facts(kept)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"fitted for .*'rest': 'scout'.*damaged"):
        package.read(folder)


def test_the_commands_take_a_policy_file(
    model: ExportedProgram,
    written: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(model, tmp_path / "decoder.pt2")
    assert main(["decoder.pt2", "--policy", str(written)]) == 0, capsys.readouterr().err
    assert (tmp_path / "decoder.decoder/policy.safetensors").is_file()
    prompt = ["--ids", "--prompt", "1 2 3", "--max-new-tokens", "9"]
    assert main(["run", "decoder.decoder", *prompt]) == 0
    assert main(["inspect", "decoder.pt2", "--policy", str(written), "--json"]) == 0
    said = capsys.readouterr().out
    assert [*json.loads(said[said.index("{\n") :])] == ["decoder"]
    for name in ("absent.safetensors", "scoot"):
        assert main(["decoder.pt2", "--policy", name]) == 2
    said = capsys.readouterr().err
    assert "absent.safetensors: nothing there" in said and "did you mean 'scout'?" in said


def test_the_backend_takes_a_policy_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm)
    graph = fx.symbolic_trace(nn.Identity())
    assert memcompile(graph, [IDS], options={"policy": written}) is graph
    assert memcompile(graph, [IDS], options={"policy": str(written), "rest": "scout"}) is graph
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors: nothing there"):
        memcompile(graph, [IDS], options={"policy": "absent.safetensors"})


def test_the_shipped_policy_belongs_to_the_shipped_network() -> None:
    folder = Path(package.__file__).parents[1] / "models" / "networks" / "checkpoints"
    compiled = build(
        folder / "bytes-long",
        str(folder / "policies" / "bytes-long-hybrid.safetensors"),
        kernels="off",
        check=False,
    )
    states = [name for name, memory in compiled.memories.items() if memory.state]
    assert [site.layer for site in compiled.sites if site.name in states] == [0, 1, 2, 3]
    # Neither unfitted nor fitted to other weights.
    assert not [note for note in compiled.report.notes if "fitted" in note]
