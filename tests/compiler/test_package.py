"""Packages: what is written comes back to the bit, whole or not at all; changed files are named."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from archive_payloads import PLANTS, Decoder, exported, write_entries
from safetensors import safe_open
from torch import Tensor, nn

from memcompile.compiler import manifest as manifests
from memcompile.compiler import package
from memcompile.compiler.archive import read_program
from memcompile.compiler.package import open_engine, write
from memcompile.compiler.pipeline import Compiled, build
from memcompile.compiler.report import Report
from memcompile.models.memory import preset

IDS = torch.arange(1, 11).repeat(5)[None]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    torch.manual_seed(0)
    options = {"budget": 32, "page_size": 8, "sinks": 8, "window": 8, "dense_layers": 0}
    return build(Decoder().eval(), "scout", max_context=64, **options)


@pytest.fixture(scope="module")
def written(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("written") / "model.scout", compiled)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "model.scout"))


def parts(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def resign(folder: Path, **changes: Any) -> None:
    """A manifest that fits the files again: whoever changes one file can change the other."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    for name, facts in manifest["files"].items():
        file = folder / name
        if file.is_file():
            facts.update(manifests.facts(file))
    path.write_text(json.dumps(manifest))


# --- there and back ---


def test_an_opened_engine_goes_on_as_the_compiled_one(compiled: Compiled, written: Path) -> None:
    ours, theirs = compiled.engine(), open_engine(written)
    assert torch.equal(ours.generate(IDS, 12), theirs.generate(IDS, 12))
    assert ours.position == theirs.position
    assert ours.stats().pages_read == theirs.stats().pages_read > 0
    assert ours.stats().pages_dense == theirs.stats().pages_dense


def test_the_files(compiled: Compiled, written: Path) -> None:
    assert sorted(parts(written)) == [
        "manifest.json",
        "program.pt2",
        "report.html",
        "report.json",
        "weights.safetensors",
    ]
    manifest = json.loads((written / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("memcompile", 1)
    assert manifest["policy"] == compiled.preset.to_json()
    assert manifest["max_context"] == 64 and manifest["takes_position_ids"] is True
    assert [s["name"] for s in manifest["sites"]] == [s.name for s in compiled.sites]
    assert manifest["torch"] == torch.__version__
    assert set(manifest["files"]) == set(parts(written)) - {"manifest.json"}
    assert json.loads((written / "report.json").read_text())["policy"] == "scout"


def test_the_program_holds_no_weights_and_no_paths(compiled: Compiled, written: Path) -> None:
    with zipfile.ZipFile(written / "program.pt2") as archive:
        sizes = {e.filename: e.file_size for e in archive.infolist() if "weight_" in e.filename}
        assert sizes and max(sizes.values()) <= 8
        assert b"stack_trace" not in archive.read("archive/models/model.json")
    with safe_open(written / "weights.safetensors", "pt") as weights:
        assert len(weights.keys()) == 4  # embed (= head), mix.weight, mix.bias, table
    for name, data in parts(written).items():
        assert str(Path(__file__).parent).encode() not in data, name


class Awkward(nn.Module):
    """Every kind of tensor a program carries besides plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4, dtype=torch.bfloat16)
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        whole = torch.randn(2, 5)
        self.register_buffer("low", whole[0])
        self.register_buffer("high", whole[1, 1:4])
        self.register_buffer("again", whole[0])
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("counts", torch.arange(3, dtype=torch.int32), persistent=False)
        self.register_buffer("short", torch.randn(3, dtype=torch.float16))
        self.register_buffer("angle", torch.randn(2, dtype=torch.complex64))
        self.register_buffer("fine", torch.randn(2, dtype=torch.complex128))
        self.register_buffer("spread", torch.randn(1, 3).expand(5, 3))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("scalar", torch.tensor(3.5, dtype=torch.float64))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        lifted = torch.tensor([1.0, 2.0, 3.0])
        small = self.low.sum() + self.high.sum() + self.again[0] + self.flags.sum() + self.scalar
        small = small + self.angle.abs().sum() + self.fine.abs().sum() + self.spread.sum()
        x = self.embed(input_ids).float() @ self.turned.t()
        return (x + lifted * self.short.float() + self.none.sum(0) + self.counts) * small.float()


def test_every_kind_of_weight_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Awkward().eval()
    program = exported(model)
    fake: Any = SimpleNamespace(
        captured=SimpleNamespace(program=program, name="Awkward", takes_position_ids=True),
        program=SimpleNamespace(max_context=None),
        preset=preset("dense"),
        report=Report("Awkward", "dense"),
        sites=[],
    )
    folder = write(tmp_path / "awkward", fake)
    manifest = manifests.read_manifest(folder)
    read = read_program(folder / "program.pt2")
    package._pour(read, folder / "weights.safetensors", manifest["weights"])
    for kind in ("state_dict", "constants"):
        ours, theirs = getattr(program, kind), getattr(read, kind)
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
            assert isinstance(tensor, nn.Parameter) == isinstance(theirs[name], nn.Parameter), name
    assert read.state_dict["turned"].stride() == model.turned.stride()
    assert read.state_dict["again"] is read.state_dict["low"]
    ids, positions = torch.randint(0, 11, (2, 5)), torch.arange(5).expand(2, 5)
    assert torch.equal(read.module()(ids, positions), model(ids, positions))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_data_types(dtype: torch.dtype, tmp_path: Path) -> None:
    compiled = build(Decoder().to(dtype).eval(), "dense", page_size=8, check=False)
    engine = open_engine(write(tmp_path / "model", compiled))
    assert torch.equal(engine.prefill(IDS), compiled.engine().prefill(IDS))


def test_the_tokenizer_goes_along_and_code_does_not(compiled: Compiled, tmp_path: Path) -> None:
    source = tmp_path / "llama"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenization_x.py", "model.bin"):
        (source / name).write_text(name)
    folder = write(tmp_path / "out", compiled, source=source)
    assert {"tokenizer.json", "tokenizer_config.json"} < set(parts(folder))
    assert not {"tokenization_x.py", "model.bin"} & set(parts(folder))
    open_engine(folder)
    (folder / "tokenizer.json").write_text("changed")
    with pytest.raises(ValueError, match=r"tokenizer\.json: 7 bytes where"):
        open_engine(folder)


# --- whole or not at all ---


def test_an_existing_folder_is_kept(compiled: Compiled, folder: Path) -> None:
    before = parts(folder)
    with pytest.raises(FileExistsError, match="already exists and is kept; give --force"):
        write(folder, compiled)
    assert parts(folder) == before


def test_force_replaces_what_memcompile_wrote(compiled: Compiled, folder: Path) -> None:
    (folder / "left over").write_text("x")
    assert write(folder, compiled, force=True) == folder
    assert "left over" not in parts(folder)
    open_engine(folder)
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_force_keeps_what_memcompile_did_not_write(
    name: str, compiled: Compiled, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_text("{}")
    for target in (tmp_path / "home", tmp_path / "home" / name):
        with pytest.raises(FileExistsError, match="kept even with --force"):
            write(target, compiled, force=True)
    assert (tmp_path / "home" / name).read_text() == "{}"


def test_an_empty_folder_may_be_filled(compiled: Compiled, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    open_engine(write(tmp_path / "out", compiled))


def test_a_link_leads_to_the_folder_that_is_written(compiled: Compiled, folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    write(link, compiled, force=True)
    assert link.is_symlink()
    open_engine(link)


def test_no_parent(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="parent folder does not exist"):
        write(tmp_path / "a" / "b", compiled)
    assert not list(tmp_path.iterdir())


def test_a_parent_that_may_not_be_written(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path.resolve())
    with pytest.raises(PermissionError, match="not allowed to write in"):
        write(tmp_path / "out", compiled)


def test_nothing_to_write(compiled: Compiled, tmp_path: Path) -> None:
    fake: Any = SimpleNamespace(program=None)
    with pytest.raises(ValueError, match="nothing was rewritten"):
        write(tmp_path / "out", fake)


def fail_in(target: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(target, name, fail)

    return patch


def fail_to_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of all, when the old folder is already out of the way."""
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "weights": fail_in(package, "_save_tensors"),
    "program": fail_in(torch.export, "save"),
    "check": fail_in(package, "rewrite"),
    "checksum": fail_in(package, "all_facts"),
    "rename": fail_to_rename,
}


@pytest.mark.parametrize("force", [False, True], ids=["new", "forced"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_midway_leaves_everything_as_it_was(
    case: str, force: bool, compiled: Compiled, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = folder if force else folder.parent / "other"
    before = parts(folder)
    with monkeypatch.context() as patch:
        FAILURES[case](patch)
        with pytest.raises((KeyboardInterrupt, OSError)):
            write(target, compiled, force=force)
    assert list(folder.parent.iterdir()) == [folder]
    assert parts(folder) == before


def test_a_weight_that_cannot_be_written_is_named(compiled: Compiled, tmp_path: Path) -> None:
    captured = SimpleNamespace(
        program=SimpleNamespace(state_dict={"w": torch.eye(2).to_sparse()}, constants={})
    )
    fake: Any = SimpleNamespace(program=compiled.program, captured=captured, preset=preset("dense"))
    with pytest.raises(ValueError, match="weight 'w' is a Tensor; only dense tensors"):
        write(tmp_path / "out", fake)
    assert not list(tmp_path.iterdir())


# --- what is not opened ---


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9]) and None


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: resign(folder, **changes)


def other_weights(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "weights.safetensors")
        resign(folder)

    return spoil


def cut_and_signed(folder: Path) -> None:
    cut("weights.safetensors")(folder)
    resign(folder)


def other_site(folder: Path) -> None:
    sites = json.loads((folder / "manifest.json").read_text())["sites"]
    sites[0]["heads"] += 1
    resign(folder, sites=sites)


def listed(name: str) -> Callable[[Path], None]:
    """A manifest that lists a file of this name, too."""

    def spoil(folder: Path) -> None:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        resign(folder, files={**files, name: {"bytes": 1, "sha256": "0"}})

    return spoil


def link(name: str) -> Callable[[Path], None]:
    """A listed file whose content, though as it was written, lies elsewhere."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        (outside / "x").write_bytes(b"x")
        if name == "report.json":
            shutil.move(folder / name, outside / name)
            (folder / name).symlink_to(outside / name)
        else:
            (folder / name).symlink_to(outside)
            files = json.loads((folder / "manifest.json").read_text())["files"]
            resign(folder, files={**files, f"{name}/x": {}})

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "cut program": (cut("program.pt2"), ValueError, "program.pt2: "),
    "cut weights": (cut("weights.safetensors"), ValueError, "cut off or changed"),
    "flipped weights": (flip("weights.safetensors"), ValueError, "its sha256 differs"),
    "flipped program": (flip("program.pt2"), ValueError, "its sha256 differs"),
    "flipped report": (flip("report.json"), ValueError, "its sha256 differs"),
    "no program": (remove("program.pt2"), FileNotFoundError, "program.pt2: missing"),
    "no manifest": (remove("manifest.json"), FileNotFoundError, "(it holds program.pt2, report"),
    "cut manifest": (cut("manifest.json"), ValueError, "manifest.json: damaged JSON"),
    "newer version": (manifest(version=7), ValueError, "version 7, written by memcompile"),
    "other format": (manifest(format="x"), ValueError, "not the manifest of a folder"),
    "no policy": (manifest(policy=None), ValueError, "its 'policy' is None"),
    "unknown policy": (manifest(policy={"preset": "x"}), ValueError, "its 'policy': unknown"),
    "policy of lists": (manifest(policy={"preset": []}), ValueError, "damaged: its 'policy'"),
    "weights unsaid": (manifest(weights={}), ValueError, "its 'weights' lack 'aliases'"),
    "no files": (manifest(files={}), ValueError, "does not list program.pt2"),
    "file outside": (
        lambda f: resign(
            f, files={"program.pt2": {}, "weights.safetensors": {}, "../../x": {"bytes": 1}}
        ),
        ValueError,
        "lists the file '../../x'",
    ),
    "file of a folder outside": (listed("kernels/../../x"), ValueError, "'kernels/../../x'"),
    "file from the root": (listed("/etc/passwd"), ValueError, "lists the file '/etc/passwd'"),
    "file of a drive": (listed("c:x"), ValueError, "lists the file 'c:x'"),
    "file with a backslash": (listed("..\\x"), ValueError, "lists the file"),
    "file with two names": (listed("kernels//x"), ValueError, "lists the file 'kernels//x'"),
    "file without a name": (listed(""), ValueError, "lists the file ''"),
    "file that is a folder": (listed("."), ValueError, "lists the file '.'"),
    "file below that is gone": (listed("kernels/x"), FileNotFoundError, "kernels/x: missing"),
    "link to a file outside": (link("report.json"), ValueError, "leads out of the folder"),
    "link to a folder outside": (link("kernels"), ValueError, "leads out of the folder"),
    "cut weights, signed": (
        cut_and_signed,
        ValueError,
        "weights.safetensors: damaged",
    ),
    "weight missing": (
        other_weights(lambda w: w.__delitem__(sorted(w)[0])),
        ValueError,
        "holds no weight",
    ),
    "weight of another shape": (
        other_weights(lambda w: w.update({sorted(w)[0]: torch.zeros(2)})),
        ValueError,
        "the program expects",
    ),
    "weight too many": (
        other_weights(lambda w: w.update(extra=torch.zeros(2))),
        ValueError,
        "'extra'], which the program does not use",
    ),
    "other sites": (other_site, ValueError, "finds other attentions in it"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_is_refused_by_name(case: str, folder: Path) -> None:
    spoil, kind, words = SPOILED[case]
    spoil(folder)
    with pytest.raises(kind) as refusal:
        open_engine(folder)
    message = str(refusal.value)
    assert (type(refusal.value) is kind and words in message and str(folder) in message) or (
        case == "unknown policy" and words in message
    )
    assert "\n" not in message


@pytest.mark.parametrize("plant", [p for p in PLANTS if p.fires == "load"], ids=lambda p: p.name)
def test_a_planted_program_never_runs(plant: Any, folder: Path, tmp_path: Path) -> None:
    """Checksums do not help against whoever writes both; the vetting of archives does."""
    program, marker = folder / "program.pt2", tmp_path / "marker"
    with zipfile.ZipFile(program) as archive:
        entries = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    renamed = {
        name: data.replace(b'"model.mix.weight"', b'"mix.weight"').replace(
            b'"model.table"', b'"table"'
        )
        for name, data in entries.items()
    }
    plant.plant(renamed, marker)
    write_entries(renamed, program)
    resign(folder)
    if plant.names:
        with pytest.raises(ValueError, match=plant.names[0].replace("(", ".")):
            open_engine(folder)
    else:
        with pytest.raises(ValueError, match="holds no weight"):
            open_engine(folder)
    assert not marker.exists()


def test_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing there"):
        open_engine(tmp_path / "x")
    (tmp_path / "x").write_text("")
    with pytest.raises(FileNotFoundError, match="a file; expected a folder"):
        open_engine(tmp_path / "x")
