"""The C++ loader: it builds, says when there is no driver, and launches what Triton would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

from memcompile.codegen.spec import KernelSpec
from memcompile.codegen.triton import ptx
from memcompile.codegen.triton.load import module
from memcompile.codegen.triton.tune import example

ROOT = Path(__file__).parents[3]
LOADER = ROOT / "examples" / "cpp" / "kernel_loader"
SPEC = KernelSpec("attend", key_dim=64, value_dim=64, group=2, page_size=64)
KINDS = {"pointer": "p", "i32": "i", "fp32": "f"}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(scope="module")
def built(targeted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the loader and of a driver that is none."""
    place = tmp_path_factory.mktemp("loader")
    strict = ["-Wall", "-Wextra", "-Werror"]
    # The line of the README, and stricter.
    line = ["g++", "-std=c++17", *strict, "-I", str(targeted / "kernels"), "main.cpp"]
    subprocess.run([*line, "-o", str(place / "kernel_loader"), "-ldl"], cwd=LOADER, check=True)
    fake = Path(__file__).with_name("fake_cuda.c")
    (place / "fake").mkdir()
    library = place / "fake" / "libcuda.so.1"
    subprocess.run(["gcc", *strict, "-shared", "-fPIC", str(fake), "-o", str(library)], check=True)
    return place


def parameters(folder: Path) -> str:
    """What each entry takes, read from the PTX itself."""
    found = []
    for path in sorted((folder / "kernels" / "cuda-sm_80").glob("*.ptx")):
        entry = ptx.entry(path.read_text())
        found.append(f"{entry.name}={''.join(KINDS[p.kind] for p in entry.parameters)}")
    return ";".join(dict.fromkeys(found))


@pytest.fixture
def load(built: Path, targeted: Path, tmp_path: Path) -> Any:
    """Runs the loader on the driver that is none: its exit code, what it said, and the calls."""

    def run(*words: str, device: int = 80, **environment: str) -> tuple[int, str, list[Any]]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        told = {
            "LD_LIBRARY_PATH": str(built / "fake"),
            "FAKE_LOG": str(log),
            "FAKE_DEVICE": str(device),
            "FAKE_PARAMETERS": parameters(targeted),
        }
        ran = subprocess.run(
            [built / "kernel_loader", targeted / "kernels", *words],
            env={**os.environ, **told, **environment},
            capture_output=True,
            text=True,
        )
        lines = log.read_text().splitlines() if log.exists() else []
        return ran.returncode, ran.stdout + ran.stderr, [json.loads(line) for line in lines]

    return run


def test_without_a_driver_it_says_so(built: Path, targeted: Path) -> None:
    if _has_driver():
        pytest.skip("there is a driver here")
    ran = subprocess.run(
        [built / "kernel_loader", targeted / "kernels"], capture_output=True, text=True
    )
    assert ran.returncode == 3 and ran.stdout == ""
    assert "no CUDA driver (libcuda.so.1" in ran.stderr and "nothing was launched" in ran.stderr


def _has_driver() -> bool:
    import ctypes

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def test_without_a_device_it_says_so(load: Any) -> None:
    code, said, calls = load(device=0)
    assert code == 3 and "no CUDA device; nothing was launched" in said and not calls


def of_triton(batch: int, kv_heads: int, rows: int, pages: int) -> tuple[list[Any], list[Any]]:
    """What the generated launcher passes on for tensors of these sizes, and those tensors."""
    arguments = example(SPEC, torch.device("cpu"), batch, kv_heads, 64 * pages, rows, 64)
    made = module(SPEC, "cuda:sm_80")
    found: list[Any] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*given: Any, num_warps: int, **constants: int) -> None:
                found.append((self.kernel.__name__, grid, num_warps, given))

            return launch

    launcher = made.attend
    FunctionType(launcher.__code__, {**vars(made), "wrap_triton": Recorded})(*arguments)
    return found, arguments


@pytest.mark.parametrize(
    ("batch", "kv_heads", "rows", "pages"),
    [(1, 2, 1, 1), (2, 3, 1, 40), (1, 2, 70, 8), (3, 2, 5, 64)],
    ids=["one page", "split", "prefill", "prefill, split"],
)
def test_a_launch_is_what_triton_would_make(
    load: Any, targeted: Path, batch: int, kv_heads: int, rows: int, pages: int
) -> None:
    words = [f"batch={batch}", f"kv_heads={kv_heads}", f"rows={rows}", f"table_pages={pages}"]
    code, said, calls = load(SPEC.name, *words)
    assert code == 4 and "WRONG" in said  # nothing ran: the loader does not take that for a result
    expected, arguments = of_triton(batch, kv_heads, rows, pages)
    launches = [call for call in calls if call["call"] == "launch"]
    index = json.loads((targeted / "kernels" / "cuda-sm_80" / "kernels.json").read_text())
    loads = [call for call in calls if call["call"] in ("load", "function")]
    assert [call["call"] for call in loads] == ["load", "function"] * len(launches)
    assert all(call["elf"] for call in loads if call["call"] == "load")
    assert len(launches) == len(expected)
    held: dict[int, int] = {}  # tensors of Triton's launch, and addresses of the loader's
    for call, (kernel, grid, warps, given) in zip(launches, expected, strict=True):
        assert call["entry"] == kernel and call["extra"] is False
        assert tuple(call["grid"]) == (*grid, 1, 1)[:3]
        assert call["block"] == [32 * warps, 1, 1]
        told = [
            k for k in index["kernels"].values() if k["entry"] == kernel and k["warps"] == warps
        ]
        assert call["shared"] in {k["shared"] for k in told}
        assert call["values"][-2:] == [0, 0]  # Triton's own
        assert len(call["values"]) == len(given) + 2
        for value, mine in zip(call["values"], given, strict=False):
            if isinstance(mine, Tensor):
                assert held.setdefault(mine.data_ptr(), value) == value and value % 16 == 0
            else:
                assert value == mine
    assert len({*held.values()}) == len(held)
    sizes = {call["at"]: call["bytes"] for call in calls if call["call"] == "allocate"}
    for tensor in arguments:
        if isinstance(tensor, Tensor):
            assert sizes[held[tensor.data_ptr()]] == max(16, tensor.nbytes)


def test_more_shared_memory_is_asked_for(load: Any, targeted: Path) -> None:
    index = json.loads((targeted / "kernels" / "cuda-sm_80" / "kernels.json").read_text())
    shared = {k["entry"]: k["shared"] for k in index["kernels"].values()}
    _, _, calls = load(SPEC.name, "rows=70")
    for call in calls:
        if call["call"] == "attribute":
            assert call["which"] == 8 and call["value"] > 48 << 10
    asked = any(call["call"] == "attribute" for call in calls)
    launches = [call["shared"] for call in calls if call["call"] == "launch"]
    assert asked == any(size > 48 << 10 for size in launches) and shared


def test_a_right_result_is_told(load: Any) -> None:
    code, said, _ = load(SPEC.name, "table_pages=1", FAKE_ONES=f"{SPEC.name} 6 256")
    assert code == 0 and "out: 256 values, at most 0 from 1: right" in said
    assert "loaded attend_f32_k64_v64_g2_p64.decode.cubin" in said


def test_other_operators_launch_on_zeros(load: Any) -> None:
    code, said, calls = load("append_index_f32_k64_v64_p64", "rows=65")
    (launch,) = [call for call in calls if call["call"] == "launch"]
    assert code == 0 and launch["grid"] == [2, 2, 1]
    assert "launch append_index_f32_k64_v64_p64.append: grid 2 x 2 x 1" in said


def test_the_device_decides_what_is_loaded(load: Any) -> None:
    _, said, calls = load(SPEC.name, device=89)  # of the same major version: the binary
    assert calls and all(call["elf"] for call in calls if call["call"] == "load")
    _, said, calls = load(SPEC.name, device=100)  # of another: the text, for the driver
    loads = [call for call in calls if call["call"] == "load"]
    assert loads and not any(call["elf"] for call in loads) and all(c["text"] for c in loads)
    assert "decode.ptx, which the driver translates" in said
    code, said, calls = load(SPEC.name, device=75)
    assert code == 2 and not calls
    assert "no kernels for compute capability 7.5; the folder has cuda:sm_80 hip:gfx942" in said
    _, said, calls = load(SPEC.name, FAKE_REFUSE="1")  # a binary that the driver does not take
    assert [c["elf"] for c in calls if c["call"] == "load"][:2] == [True, False]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["attend"], "no operator 'attend'; known:\n  append_index"),
        ([SPEC.name, "row=3"], "'row=3' is no size of attend_f32_k64_v64_g2_p64; known: batch"),
        ([SPEC.name, "rows=x"], "'rows=x' is no size"),
        ([SPEC.name, "splits=2"], "'splits=2' is no size"),
        ([SPEC.name, "query_row=100"], "query_row is 100; the kernel takes 32 bit and multiples"),
    ],
)
def test_wrong_words_are_refused(load: Any, words: list[str], found: str) -> None:
    code, said, calls = load(*words)
    assert code == 2 and found in said
    assert not [call for call in calls if call["call"] == "launch"]


def test_both_languages_take_the_headers(targeted: Path, tmp_path: Path) -> None:
    text = '#include "targets.h"\nint main(void) { return memc_target_count != 2; }\n'
    for compiler, suffix, standard in (("gcc", "c", "c99"), ("g++", "cpp", "c++17")):
        file = tmp_path / f"main.{suffix}"
        file.write_text(text)
        options = [f"-std={standard}", "-Wall", "-Wextra", "-pedantic", "-Werror"]
        made = ["-o", str(tmp_path / suffix), "-I", str(targeted / "kernels")]
        subprocess.run([compiler, *options, str(file), *made], check=True)
        assert subprocess.run([tmp_path / suffix]).returncode == 0


def test_cmake_builds_it(targeted: Path, tmp_path: Path) -> None:
    asked = ["cmake", "-S", str(LOADER), "-B", str(tmp_path / "build")]
    refused = subprocess.run(asked, capture_output=True, text=True)
    assert refused.returncode != 0 and "give -DKERNELS=FOLDER/kernels" in refused.stderr
    kernels = f"-DKERNELS={targeted / 'kernels'}"
    subprocess.run([*asked, kernels], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path / "build")], check=True, capture_output=True)
    assert (tmp_path / "build" / "kernel_loader").is_file()
