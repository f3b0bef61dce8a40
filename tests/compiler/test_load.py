"""Loading: every kind of file told by content, every other one refused in one line."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_payloads import Decoder, Touch, exported, torch_pickle
from safetensors.torch import save_file
from torch import nn

from memcompile.compiler.load import Loaded, load

IDS = torch.tensor([[1, 2, 3, 4]])
POSITIONS = torch.arange(4)[None]
ARCH = "archive_payloads:Decoder"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS, POSITIONS)
    return out


def refusal(path: Path, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(path, **options)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and len(message) < 900
    return message


# --- what is loaded ---


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model.safetensors", "model"])
def test_an_export_archive_whatever_its_name(name: str, tmp_path: Path) -> None:
    model = Decoder().eval()
    torch.export.save(exported(model), tmp_path / "saved.pt2")
    path = (tmp_path / "saved.pt2").rename(tmp_path / name)
    loaded = load(path)
    assert (loaded.kind, loaded.module, loaded.path) == ("exported", None, path)
    assert loaded.program is not None and loaded.model is loaded.program
    assert torch.equal(logits(loaded.program.module()), logits(model))


def saved_state(path: Path, state: Any) -> None:
    torch.save(state, path)


def saved_legacy(path: Path, state: Any) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def saved_safetensors(path: Path, state: Any) -> None:
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)


@pytest.mark.parametrize("save", [saved_state, saved_legacy, saved_safetensors])
def test_a_state_dict_with_its_class(save: Callable[..., None], tmp_path: Path) -> None:
    model = Decoder(scale=0.5).eval()
    save(tmp_path / "weights", model.state_dict())
    config = tmp_path / "config.json"
    config.write_text('{"scale": 0.5}')
    loaded = load(tmp_path / "weights", arch=ARCH, arch_config=config)
    assert loaded.kind == "state-dict" and loaded.name == "Decoder"
    assert isinstance(loaded.module, nn.Module) and not loaded.module.training
    loaded.module.table = model.table  # not persistent: no state dict holds it
    assert torch.equal(logits(loaded.module), logits(model))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "step": 3},
        lambda s: {"state_dict": s, "epoch": 1, "args": {"lr": 0.1}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    ],
    ids=["model", "state_dict", "data parallel", "compiled"],
)
def test_a_checkpoint_around_the_state_dict(wrap: Callable[..., Any], tmp_path: Path) -> None:
    model = Decoder()
    torch.save(wrap(model.state_dict()), tmp_path / "ckpt.pt")
    loaded = load(tmp_path / "ckpt.pt", arch=ARCH, arch_config={"scale": 2.0})
    assert torch.equal(loaded.module.mix.weight, model.mix.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_state_dict_keeps_its_data_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Decoder().to(dtype)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    module = load(tmp_path / "weights.pt", arch=ARCH).module
    assert module is not None
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert module.head.weight is module.embed.weight
    assert module.table.dtype == torch.float32  # what was not in the file is left alone


def test_a_class_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model_file.py").write_text(
        "import torch\nclass Net(torch.nn.Linear):\n  def __init__(self): super().__init__(2, 3)\n"
    )
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load("w.pt", arch="my_model_file:Net").name == "Net"
    assert sys.path == before


def test_a_trusted_module(tmp_path: Path) -> None:
    model = Decoder()
    torch.save(model, tmp_path / "zip.pt")
    saved_legacy(tmp_path / "legacy.pt", model)
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(model))
    for name in ("zip.pt", "legacy.pt", "pickle.pt"):
        loaded = load(tmp_path / name, trust_pickle=True)
        assert loaded.kind == "module" and loaded.module is not None
        assert not loaded.module.training
        assert torch.equal(logits(loaded.module), logits(model.eval()))


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    torch.export.save(exported(), tmp_path / "a.pt2")
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt2").read_bytes())
    torch.manual_seed(1)
    torch.export.save(exported(), tmp_path / "c.pt2")
    a, b, c = (load(tmp_path / name).sha256 for name in ("a.pt2", "b.pt", "c.pt2"))
    assert a == b != c and len(a) == 64


# --- what is refused ---


def onnx(path: Path) -> None:
    path.write_bytes(b"\x08\x0a\x12\x07pytorch\x1a\x032.1" + bytes(64))


def zip_of(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x" * 100)

    return make


def of_bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def torch_script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def cut_state_dict(path: Path) -> None:
    torch.save(Decoder().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])


def cut_legacy(path: Path) -> None:
    saved_legacy(path, Decoder().state_dict())
    path.write_bytes(path.read_bytes()[:-200])


def cut_safetensors(keep: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        save_file({"x": torch.zeros(8)}, path)
        path.write_bytes(path.read_bytes()[:keep])

    return make


def single_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def no_tensors(path: Path) -> None:
    torch.save({"a": 1, "b": [2]}, path)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (of_bytes(b""), "an empty file"),
    "PNG": (of_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), "a PNG image"),
    "GGUF": (of_bytes(b"GGUF\x03" + bytes(64)), "a GGUF file"),
    "ONNX": (onnx, "an ONNX protobuf"),
    "text": (of_bytes("plain text, déjà vu\n".encode() * 9), "a text file"),
    "cut character": (of_bytes(("a" * 4095 + "é" * 9).encode()), "a text file"),
    "JSON": (of_bytes(b'{"a": 1}'), "a JSON text"),
    "HTML": (of_bytes(b"<!DOCTYPE html><html>"), "an HTML page"),
    "LFS pointer": (of_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "HDF5": (of_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), "an HDF5 file"),
    "ELF": (of_bytes(b"\x7fELF" + bytes(64)), "shared library"),
    "noise": (of_bytes(b"\xf3\x00\x9a\x11" * 40), "an unknown binary format (it begins with f3"),
    "other zip": (zip_of("word/document.xml", "a", "b", "c"), "(it holds 'word/document.xml', "),
    "empty zip": (zip_of(), "an empty zip archive"),
    "npz": (zip_of("a.npy", "b.npy"), "an archive of NumPy arrays"),
    "old export": (zip_of("serialized_exported_program.json", "version"), "before torch 2.8"),
    "TorchScript": (torch_script, "a TorchScript archive"),
    "cut state dict": (cut_state_dict, "truncated or damaged zip"),
    "cut legacy file": (cut_legacy, "damaged"),
    "cut pickle": (of_bytes(b"\x80\x04\x95"), "a truncated or damaged Python pickle"),
    "cut safetensors": (cut_safetensors(-4), "a damaged or truncated safetensors file"),
    "cut header": (cut_safetensors(20), "ends inside its header"),
    "tensor": (single_tensor, "with a Tensor; expected a state dict"),
    "no tensors": (no_tensors, "with a dict of 'a', 'b'; expected a state dict"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("suffix", [".pt2", ".pt"])
def test_a_foreign_file_is_named(case: str, suffix: str, tmp_path: Path) -> None:
    make, words = FOREIGN[case]
    path = tmp_path / f"model{suffix}"
    make(path)
    before = path.read_bytes()
    message = refusal(path)
    assert message.startswith(f"{path}: ") and words in message
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_missing_path(tmp_path: Path) -> None:
    message = refusal(tmp_path / "model.pt", FileNotFoundError)
    assert "no such file" in message and "expected a transformers folder" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    assert str(path) in refusal(path, PermissionError)


def test_permission_is_said_in_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(path, PermissionError) == f"{path}: not allowed to read this file"


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refusal(tmp_path / "pipe")


def test_a_state_dict_without_its_class(tmp_path: Path) -> None:
    torch.save(Decoder().state_dict(), tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt")
    assert "a state dict (4 tensors)" in message and "--arch module:Class" in message


ARCH_FAULTS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "no colon": ("archive_payloads", None, ValueError, "expected module:Class"),
    "no module": ("nowhere_at_all:Net", None, ValueError, "cannot import 'nowhere_at_all'"),
    "no class": ("archive_payloads:Nothing", None, ValueError, "its classes are"),
    "no network": ("pathlib:Path", None, ValueError, "expected a torch.nn.Module"),
    "bad option": (ARCH, {"depth": 3}, ValueError, "unexpected keyword argument 'depth'"),
    "bad shape": (ARCH, {"width": 16}, ValueError, "is [11, 8], expected [11, 16]"),
    "bad names": ("torch.nn:Linear", {"in_features": 1, "out_features": 1}, ValueError, "missing"),
    "no config": (ARCH, "nowhere.json", FileNotFoundError, "no such config file"),
}


@pytest.mark.parametrize("case", ARCH_FAULTS)
def test_a_class_that_does_not_fit(case: str, tmp_path: Path) -> None:
    arch, config, kind, words = ARCH_FAULTS[case]
    torch.save(Decoder().state_dict(), tmp_path / "w.pt")
    assert words in refusal(tmp_path / "w.pt", kind, arch=arch, arch_config=config)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_config_that_is_no_object(text: str, tmp_path: Path) -> None:
    torch.save(Decoder().state_dict(), tmp_path / "w.pt")
    (tmp_path / "c.json").write_text(text)
    message = refusal(tmp_path / "w.pt", arch=ARCH, arch_config=tmp_path / "c.json")
    assert str(tmp_path / "c.json") in message


def test_a_class_for_what_needs_none(tmp_path: Path) -> None:
    torch.export.save(exported(), tmp_path / "m.pt2")
    assert "--arch goes with a state dict" in refusal(tmp_path / "m.pt2", arch=ARCH)
    assert "--arch goes with a state dict" in refusal(tmp_path, arch=ARCH)


# --- what would run code ---


def module_zip(path: Path, marker: Path) -> None:
    model = Decoder()
    model.extra = Touch(marker)  # type: ignore[assignment]
    torch.save(model, path)


def module_legacy(path: Path, marker: Path) -> None:
    saved_legacy(path, {"w": torch.zeros(2), "x": Touch(marker)})


def state_with_payload(path: Path, marker: Path) -> None:
    path.write_bytes(torch_pickle(marker))


def bare_pickle(protocol: int) -> Callable[[Path, Path], None]:
    return lambda path, marker: path.write_bytes(pickle.dumps(Touch(marker), protocol)) and None


PICKLES: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "module": (module_zip, "archive_payloads.Decoder"),
    "legacy": (module_legacy, "posix.mkdir"),
    "state dict": (state_with_payload, "posix.mkdir"),
    "pickle 2": (bare_pickle(2), "posix.mkdir"),
    "pickle 4": (bare_pickle(4), "posix.mkdir"),
    "pickle 5": (bare_pickle(5), "posix.mkdir"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_is_explained_and_not_run(case: str, tmp_path: Path) -> None:
    make, name = PICKLES[case]
    path, marker = tmp_path / "model.pt", tmp_path / "marker"
    make(path, marker)
    message = refusal(path, arch=ARCH)
    assert name in message and "--trust-pickle" in message and "state_dict()" in message
    assert not marker.exists()
    with contextlib.suppress(ValueError):
        load(path, arch=ARCH, trust_pickle=True)
    assert marker.exists(), "the payload is a dud"


def test_a_pickle_whose_class_is_missing(tmp_path: Path) -> None:
    made = "import torch\nclass Gone(torch.nn.Linear): pass\ntorch.save(Gone(1, 1), 'm.pt')\n"
    (tmp_path / "gone_module.py").write_text(made)
    subprocess.run([sys.executable, "-c", "import gone_module"], cwd=tmp_path, check=True)
    assert "gone_module.Gone" in refusal(tmp_path / "m.pt")
    assert "cannot be unpickled here" in refusal(tmp_path / "m.pt", trust_pickle=True)


def test_loading_runs_no_network_and_writes_nothing(tmp_path: Path) -> None:
    torch.export.save(exported(), tmp_path / "m.pt2")
    loaded = load(tmp_path / "m.pt2")
    assert isinstance(loaded, Loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_weights_are_converted_and_tables_are_not() -> None:
    folder = Path(__file__).parents[2] / "models/networks/checkpoints/bytes-small"
    plain, wide = (load(folder, dtype=dtype).module for dtype in (None, "float32"))
    assert plain is not None and wide is not None
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    halved = load(folder, dtype="float16").module
    assert halved is not None and halved.model.rotary_emb.inv_freq.dtype == torch.float32  # type: ignore[union-attr]


def test_a_type_that_nothing_is_converted_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int8'; known: float32, float16, bfloat16"):
        load(tmp_path, dtype="int8")
    torch.export.save(exported(), tmp_path / "a.pt2")
    with pytest.raises(ValueError, match="computes in the types it was exported with"):
        load(tmp_path / "a.pt2", dtype="float16")
