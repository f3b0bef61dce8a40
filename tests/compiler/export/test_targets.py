"""Kernels for GPUs that are not there: what is written, what it says, and what is refused."""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from archive_payloads import Decoder
from target_case import TARGETS

from memcompile.codegen import cache
from memcompile.codegen.spec import KernelSpec
from memcompile.codegen.triton import ptx, workers
from memcompile.codegen.triton.bundle import bundle, folder_of
from memcompile.compiler import package
from memcompile.compiler.export.targets import (
    Needed,
    compile_needed,
    compile_targets,
    parse_targets,
)
from memcompile.compiler.manifest import read_manifest
from memcompile.compiler.pipeline import Compiled, build
from memcompile.compiler.report import Report
from memcompile.compiler.report_html import render

COMBINE = KernelSpec("combine", value_dim=16, count=2)


@pytest.fixture(autouse=True)
def kept(kernel_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(kernel_cache))


def index(folder: Path, target: str) -> dict[str, Any]:
    path = folder / "kernels" / target.replace(":", "-") / "kernels.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- what is written ---


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_has_its_files(targeted: Path, target: str) -> None:
    folder = targeted / "kernels" / target.replace(":", "-")
    told = index(targeted, target)
    assert told["target"] == target and told["verified_on_gpu"] is False
    assert told["capability"] == ([8, 0] if "cuda" in target else None)
    kernels = told["kernels"]
    roles = {name.partition(".")[2] for name in kernels}
    assert roles == {"append", "decode", "prefill", "merge"} and len(kernels) == 4
    suffixes = (".cubin", ".ptx") if "cuda" in target else (".hsaco", ".amdgcn")
    expected = {f"{name}{suffix}" for name in kernels for suffix in (*suffixes, ".json")}
    assert {path.name for path in folder.iterdir()} == {*expected, "kernels.json", "kernels.h"}
    for name, kernel in kernels.items():
        binary, assembly = ((folder / kernel[part]) for part in ("binary", "assembly"))
        assert binary.read_bytes()[:4] == b"\x7fELF" and kernel["entry"] in assembly.read_text()
        assert kernel["bytes"] == binary.stat().st_size
        assert kernel["registers"] > 0 and kernel["spilled"] == 0
        assert json.loads((folder / f"{name}.json").read_text()) == kernel
        # Nothing of the machine that compiled them is shipped.
        for content in (binary.read_bytes(), assembly.read_bytes()):
            assert str(Path.home()).encode() not in content and b"/tmp" not in content


@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_is_described_to_the_last_parameter(targeted: Path, target: str) -> None:
    folder = targeted / "kernels" / target.replace(":", "-")
    told = index(targeted, target)
    for name, kernel in told["kernels"].items():
        parameters = kernel["parameters"]
        assert [p["name"] for p in parameters if p.get("null")] == [*ptx.HIDDEN]
        if "cuda" in target:
            entry = ptx.entry((folder / kernel["assembly"]).read_text())
            kinds = [{"i32": "i32", "fp32": "fp32"}.get(p["type"], "pointer") for p in parameters]
            assert [parameter.kind for parameter in entry.parameters] == kinds
            assert (entry.name, entry.target) == (kernel["entry"], "sm_80")
        warp = told["warp"]
        assert kernel["threads"] == kernel["warps"] * warp
        assert any(name in operator["kernels"] for operator in told["operators"])
    for operator in told["operators"]:
        tensors = {a["name"] for a in operator["arguments"] if "shape" in a}
        numbers = {a["name"] for a in operator["arguments"] if a["type"] == "fp32"}
        assert operator["calls"] == {"dense": 2, "policy": 2}
        for given in operator["numbers"]:
            assert {*given} == {a["name"] for a in operator["arguments"] if "shape" not in a}
        for variant in operator["variants"]:
            held = {*tensors}
            for step in variant["steps"]:
                held |= {step.get("allocate", step.get("to"))}
                if "launch" in step:
                    kernel = told["kernels"][f"{operator['name']}.{step['launch']}"]
                    own = [p for p in kernel["parameters"] if not p.get("null")]
                    for parameter, value in zip(own, step["arguments"], strict=True):
                        if parameter["type"].startswith("*"):
                            assert value in held and parameter["multiple_of"] == 16
                        else:
                            assert (value in numbers) == (parameter["type"] == "fp32")
            assert {*operator["returns"]} <= held


def test_strides_are_taken_for_multiples_of_a_heads_width() -> None:
    """What a kernel assumes must hold: heads of 40 begin at multiples of 8, not of 16."""
    from memcompile.codegen.triton.aot import compile_for

    spec = KernelSpec("append_index", "float16", key_dim=40, value_dim=96, page_size=4)
    (compiled,) = compile_for(spec, "cuda:sm_80")
    assert {compiled.multiples[f"key_{axis}"] for axis in ("batch", "head", "row")} == {8}
    assert {compiled.multiples[f"value_{axis}"] for axis in ("batch", "head", "row")} == {16}
    assert compiled.multiples["p_key"] == 16 and "rows" not in compiled.multiples


def test_the_manifest_lists_them_and_the_folder_opens(targeted: Path) -> None:
    listed = read_manifest(targeted)["files"]
    assert {"kernels/targets.h", "kernels/cuda-sm_80/kernels.json"} < {*listed}
    found = {p.relative_to(targeted).as_posix() for p in targeted.rglob("*") if p.is_file()}
    assert found == {*listed, "manifest.json"}
    assert package.read(targeted).preset.to_json()["preset"] == "dense"


def test_the_report_has_registers_and_sizes(targeted: Path) -> None:
    report = Report.from_json(json.loads((targeted / "report.json").read_text()))
    assert [*report.lowered.targets] == [*TARGETS]
    text, page = str(report), (targeted / "report.html").read_text()
    assert "kernels compiled for other machines" in text
    for target in TARGETS:
        assert f"{target}: 4 kernels," in text and "unverified on GPU" in text
        for name, kernel in index(targeted, target)["kernels"].items():
            row = next(line for line in text.splitlines() if name in line and target in line)
            assert f" {kernel['registers']} " in row
            link = f"kernels/{target.replace(':', '-')}/{kernel['binary']}"
            assert f'<a href="{link}">{name}</a>' in page and (targeted / link).is_file()
    assert "those for hip:gfx942 were compiled, and not run" in page


def test_what_no_template_covers_is_in_the_report() -> None:
    report = Report("Toy", "scout")
    report.lowered.targets = {"cuda:sm_90": {"kernels": [], "uncovered": ["attend: <b>"]}}
    assert "cuda:sm_90: not compiled: attend: <b>" in str(report)
    assert "not compiled for cuda:sm_90: attend: &lt;b&gt;" in render(report)


@pytest.mark.parametrize(
    "targets", [None, {"x": 1}, {"x": {"kernels": [{"name": "a"}], "uncovered": []}}]
)
def test_a_damaged_report_is_refused(targets: Any) -> None:
    told = Report("Toy", "scout").to_json()
    told["lowered"]["targets"] = targets
    with pytest.raises(ValueError, match="expected the figures of kernels by target"):
        Report.from_json(told)


# --- the cache, and the processes that fill it ---


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one small kernel."""
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "cache"))
    bundle(COMBINE, "cuda:sm_80")
    return tmp_path / "cache"


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_Worker", lambda *_: pytest.fail("a process was started"))


def test_what_is_compiled_once_is_taken_from_the_cache(place: Path, no_process: None) -> None:
    (made,) = compile_needed([Needed(COMBINE, {None}, {"policy": 1})], ["cuda:sm_80"])
    assert [*made.kernels] == ["combine_f32_v16_x2.combine"]
    assert made.operators[0]["calls"] == {"policy": 1}
    entries = [entry for entry in cache.entries() if entry.kind == "binaries"]
    assert [entry.name for entry in entries] == ["combine_f32_v16_x2.cuda-sm_80"]
    folder = folder_of(COMBINE, "cuda:sm_80")
    before = (folder / "combine.cubin").read_bytes()
    (folder / "combine.cubin").write_bytes(b"spoilt")
    assert (bundle(COMBINE, "cuda:sm_80") / "combine.cubin").read_bytes() == before
    cache.remove(cache.entries())
    assert not any(place.rglob("*.cubin"))


def test_compiling_twice_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    folder = folder_of(COMBINE, "cuda:sm_80")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "elsewhere"))
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
        again = bundle(COMBINE, "cuda:sm_80")
    assert again != folder
    assert {path.name: path.read_bytes() for path in again.iterdir()} == first


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ({"os_error": [28, "No space left", "/c"]}, OSError, "No space left.*'/c'"),
        ({"os_error": [None, "the cache is odd", None]}, OSError, "the cache is odd"),
        ({"failed": "Oops: no layout"}, RuntimeError, "x2 for hip:gfx942: Oops: no layout"),
        (None, RuntimeError, "x2 for hip:gfx942: the compiler ended with 1: out of everything"),
    ],
    ids=["disk", "cache", "compiler", "dead"],
)
def test_what_a_process_cannot_compile_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, kind: type[Exception], words: str
) -> None:
    started = subprocess.Popen
    says = "sys.exit('out of everything')" if answer is None else f"print({json.dumps(answer)!r})"

    def process(given: list[str], **options: Any) -> Any:
        return started([given[0], "-c", f"import sys; sys.stdin.readline(); {says}"], **options)

    monkeypatch.setattr(subprocess, "Popen", process)
    with pytest.raises(kind, match=words):
        compile_needed([Needed(COMBINE, {None})], ["hip:gfx942"])


def test_a_process_that_cannot_be_started_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **options: Any) -> Any:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", none)
    with pytest.raises(OSError, match="temporarily unavailable"):
        compile_needed([Needed(COMBINE, {None})], ["hip:gfx942"])


def test_what_a_process_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memcompile.codegen.triton import worker

    def answer(spec: KernelSpec) -> dict[str, Any]:
        return worker._answer({"spec": spec.to_json(), "target": "cuda:sm_80", "width": None})

    wide = KernelSpec("attend", key_dim=512, value_dim=512, page_size=16)
    assert "heads above 256" in answer(wide)["not_covered"]
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "file" / "below"))
        assert "point $MEMCOMPILE_CACHE at a folder" in answer(COMBINE)["os_error"][1]
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> Any:
            raise AssertionError("no such\nlayout")

        patch.setattr("memcompile.codegen.triton.bundle.bundle", broken)
        assert answer(COMBINE) == {"failed": "AssertionError: no such layout"}


# --- what is refused ---


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cuda:sm_91", ["unknown target 'cuda:sm_91'", "did you mean 'cuda:sm_90'", "hip:gfx942"]),
        ("sm_90", ["unknown target 'sm_90'", "cuda:sm_90"]),
        ("cuda:sm_90,hip:gfx1", ["unknown target 'hip:gfx1'"]),
        ("", ["no target is given", "cuda:sm_80"]),
        (" , ", ["no target is given"]),
    ],
)
def test_unknown_targets_are_one_line_and_code_2(
    say: Any, network: Path, text: str, found: list[str]
) -> None:
    said = say(network, "--target", text)
    assert said.code == 2 and len(said.err.strip().splitlines()) == 1
    assert all(part in said.err for part in found)
    assert not list(Path.cwd().iterdir())


def test_targets_are_named_once() -> None:
    assert parse_targets(" cuda:sm_90,hip:gfx942 ,cuda:sm_90,") == ["cuda:sm_90", "hip:gfx942"]
    assert parse_targets(["cuda:sm_80"]) == ["cuda:sm_80"]
    unhashable: Any = [7]
    with pytest.raises(ValueError, match="unknown target 7"):
        parse_targets(unhashable)


def test_without_triton_nothing_is_begun(
    say: Any, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    said = say(network, "--target", "cuda:sm_90")
    assert said.code == 2 and "pip install triton" in said.err
    assert len(said.err.strip().splitlines()) == 1 and not list(Path.cwd().iterdir())


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    torch.manual_seed(0)
    return build(Decoder().eval(), "dense", max_context=64, check=False, kernels="off")


def test_a_model_that_no_kernel_covers(compiled: Compiled) -> None:
    assert compiled.program is not None
    layouts = tuple(replace(x, dtype=torch.float64) for x in compiled.program.layouts)
    double = replace(compiled, program=replace(compiled.program, layouts=layouts))
    with pytest.raises(ValueError, match=r"cuda:sm_90: no kernel covers .* the model is float64"):
        compile_targets(double, ["cuda:sm_90"])
    with pytest.raises(RuntimeError, match="no kernel covers"):
        compile_targets(double, ["cuda:sm_90"], required=True)
    with pytest.raises(ValueError, match="nothing was rewritten, so there are no kernels"):
        compile_targets(replace(compiled, program=None), ["cuda:sm_90"])


def test_a_spec_that_fits_no_multiprocessor_is_told(place: Path, no_process: None) -> None:
    wide = KernelSpec("attend", key_dim=512, value_dim=512, page_size=16)
    needs = [Needed(wide, {None}), Needed(COMBINE, {None})]
    (made,) = compile_needed(needs, ["cuda:sm_80"])
    assert [*made.kernels] == ["combine_f32_v16_x2.combine"]
    assert len(made.uncovered) == 1 and "heads above 256" in made.uncovered[0]
    with pytest.raises(RuntimeError, match="heads above 256"):
        compile_needed(needs, ["cuda:sm_80"], required=True)


# --- nothing half-written ---


@pytest.mark.parametrize("name", ["combine.ptx", "kernels.json", "kernels.h", "targets.h"])
@pytest.mark.parametrize("earlier", [False, True], ids=["new", "replaced"])
def test_a_full_disk_leaves_nothing_half_written(
    compiled: Compiled,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    earlier: bool,
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    binaries = compile_needed([Needed(COMBINE, {None})], ["cuda:sm_80"])
    if earlier:
        package.write(here / "engine", compiled, binaries=binaries)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}

    def refuse(write: Callable[..., Any]) -> Callable[..., Any]:
        def refused(path: Path, *given: Any, **options: Any) -> Any:
            if path.name.endswith(name):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, *given, **options)

        return refused

    for method in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, method, refuse(getattr(Path, method)))
    with pytest.raises(OSError, match="No space left"):
        package.write(here / "engine", compiled, binaries=binaries, force=True)
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


INTERRUPTED = """
from memcompile.codegen.spec import KernelSpec
from memcompile.compiler.export.targets import Needed, compile_needed
specs = [KernelSpec("combine", value_dim=n, count=2) for n in range(8, 576, 8)]
compile_needed([Needed(spec, {None}) for spec in specs], ["cuda:sm_80"])
"""


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.long)], ids=["compiling", "command"]
)
def test_an_interrupt_ends_the_compilers(network: Path, tmp_path: Path, whole: bool) -> None:
    """Ctrl-C while kernels are compiled: no folder is left, and no process."""
    command = ["-m", "memcompile.compiler.cli", str(network), "--out", "engine", "--quiet"]
    command += ["--target", "cuda:sm_120,hip:gfx950"]
    process = subprocess.Popen(
        [sys.executable, *(command if whole else ["-c", INTERRUPTED])],
        cwd=tmp_path,
        env={**os.environ, "MEMCOMPILE_CACHE": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        started: list[str] = []
        deadline = time.monotonic() + 120
        while not started and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            started = [pid for pid in children_of(process.pid) if b"worker" in command_of(pid)]
        assert started, process.communicate()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    if whole:
        assert process.returncode == 130 and "Traceback" not in said, said
    else:
        assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in said, said
        assert said.count("Traceback") == 1, said  # its own: none of a thread
    assert [path.name for path in tmp_path.iterdir()] in (["cache"], [])
    assert not any(b"worker" in command_of(pid) for pid in started)


def children_of(pid: int) -> list[str]:
    """Of all its threads."""
    found: list[str] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread may end
            found += file.read_text().split()
    return found


def command_of(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
