"""Building: the cache, many processes, compilers that are missing or broken, no Python."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils.benchmark import Timer

from memcompile.codegen import cache, cpp, render
from memcompile.codegen.cpp import build, loader
from memcompile.codegen.spec import KernelSpec

SPEC = KernelSpec("combine", value_dim=8, count=2)
CALL = """
out, lse = {operator}(torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 1), *({other}))
assert out.tolist() == [[[[0.5] * 8]]] and abs(lse.item() - 0.693147) < 1e-5, (out, lse)
"""
OTHER = "torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1)"
HEADER = Path(build.INCLUDE) / "memcompile" / "kernel.h"


def python(text: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(text)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def small(text: str = 'extern "C" int answer() { return 42; }\n') -> build.Library:
    return build.Library("small", (build.Unit("small.cpp", text),))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_what_is_cached_is_not_compiled(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    real = build.compiler().command[0]
    wrapped = script(
        tmp_path / "cxx", f'[ "$1" = --version ] || echo x >> {count}\nexec {real} "$@"'
    )
    monkeypatch.setenv("CXX", wrapped)
    first = build.build([small()])
    assert count.read_text().count("x") == 2  # compiles, links
    assert build.build([small(), small()]) == first * 2
    assert count.read_text().count("x") == 2
    log = (first[0].parent / "build.log").read_text()
    assert "-shared" in log and "small.cpp" in log
    assert build.build([small('extern "C" int other() { return 1; }\n')]) != first


def test_the_key_holds_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    library = small('#include "memcompile/kernel.h"\n')
    by = build.compiler()
    key = build._key(library, by)
    changed = [
        build._key(small("int x;\n"), by),
        build._key(library, build.Compiler(by.command, "another version")),
        build._key(build.Library("small", library.units, versions=("2.0",)), by),
        build._key(build.Library("small", library.units, needs=(small(),)), by),
        build._key(build.Library("small", (build.Unit("small.cpp", "", ("portable",)),)), by),
    ]
    text = HEADER.read_text()
    monkeypatch.setattr(build, "_included", lambda _: {"kernel.h": text + "// edited\n"})
    changed.append(build._key(library, by))
    assert len({key, *changed}) == len(changed) + 1


def test_included_headers_are_found_however_deep() -> None:
    found = build._included('#include "memcompile/attention.h"\n')
    assert {"attention.h", "simd.h", "simd_portable.h", "simd_avx512_bf16.h"} <= set(found)


def test_processes_at_once(tmp_path: Path) -> None:
    """Several processes load one kernel that the cache lacks: each gets it, whole."""
    runtime = build.build([cpp.runtime()])[0].parent
    kept_in = tmp_path / "cpp"
    shutil.copytree(runtime, kept_in / runtime.name)
    text = f"""
    import torch
    from memcompile.codegen import cpp
    from memcompile.codegen.spec import KernelSpec
    operator = cpp.load([KernelSpec("combine", value_dim=8, count=2)]).popitem()[1]
    {CALL.format(operator="operator", other=OTHER).replace(chr(10), chr(10) + "    ")}
    print("right")
    """
    running = [python(text, MEMCOMPILE_CACHE=str(tmp_path)) for _ in range(3)]
    said = [process.communicate() for process in running]
    assert [out for out, _ in said] == ["right\n"] * 3, said
    kept = sorted(path.name.rpartition("-")[0] for path in kept_in.iterdir())
    assert kept == ["combine_f32_v8_x2", "libmemcompile_runtime"]


def test_no_compiler(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(cpp.NoCompiler, match=r"none of g\+\+, clang\+\+ is on the path; install"):
        build.build([small()])
    monkeypatch.setenv("CXX", "/no/such/compiler -O1")
    with pytest.raises(cpp.NoCompiler, match=r"\$CXX is '/no/such/compiler -O1', which is not"):
        cpp.load([KernelSpec("combine", value_dim=16, count=2)])


def test_a_broken_compiler(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = '[ "$1" = --version ] && exec echo broken 1.0\necho "error: out of order" >&2\nexit 1'
    monkeypatch.setenv("CXX", script(tmp_path / "broken", broken))
    with pytest.raises(cpp.BuildFailed, match=r"broken -std(.|\n)*error: out of order(.|\n)*\$CXX"):
        build.build([small()])
    assert not list((empty / "cpp").iterdir())
    monkeypatch.setenv("CXX", script(tmp_path / "mute", "exit 3"))
    with pytest.raises(cpp.BuildFailed, match=r"mute --version"):
        build.build([small()])


def test_a_wrong_source_shows_its_first_errors(empty: Path) -> None:
    with pytest.raises(cpp.BuildFailed, match=r"small\.cpp:1:(.|\n)*error"):
        build.build([small("int answer() { return nothing; }\n")])


def test_an_unknown_instruction_set_is_refused() -> None:
    answer = python(
        """
        from memcompile.codegen import cpp
        from memcompile.codegen.spec import KernelSpec
        cpp.load([KernelSpec("combine", value_dim=8, count=2)])
        """,
        MEMCOMPILE_ISA="avx1024",
    ).communicate()[1]
    assert "MEMCOMPILE_ISA=avx1024 is not an instruction set that this machine runs" in answer
    assert answer.rstrip().endswith("portable")


def test_loading_twice_gives_the_same_operator() -> None:
    first = cpp.load([SPEC])
    assert cpp.load([SPEC, SPEC]) == first
    assert str(first[SPEC]) == f"memcompile_cpp.{SPEC.name}.default"
    assert str(first[SPEC]._schema).endswith(SPEC.schema)
    assert cpp.path(SPEC).read_text() == cpp.source(SPEC)


def test_without_python() -> None:
    """Definitions, runtime and kernels as libraries: nothing of Python's defines an operator."""
    attend = KernelSpec(
        "attend", "bfloat16", 64, 64, False, 4, 64, pages="listed", window=True, softcap=True
    )
    libraries = [cpp.definitions_library([SPEC, attend]), cpp.runtime(), cpp.library(SPEC)]
    paths = [str(path) for path in build.build(libraries)]
    answer = python(
        f"""
        import sys, torch
        for path in {paths!r}:
            torch.ops.load_library(path)
        {
            CALL.format(operator=f"torch.ops.memcompile_cpp.{SPEC.name}", other=OTHER).replace(
                chr(10), chr(10) + "        "
            )
        }
        assert not [name for name in sys.modules if name.startswith("memcompile")]
        print(torch.ops.memcompile_cpp.{attend.name}.default._schema)
        """
    ).communicate()
    assert answer[0] == f"memcompile_cpp::{attend.schema}\n", answer[1]


def test_calls_are_cheap() -> None:
    """A call's own cost lies within a few of torch's smallest operators."""
    operator = cpp.load([SPEC])[SPEC]
    parts = (torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 1)) * 2
    ours = Timer("operator(*parts)", globals={"operator": operator, "parts": parts})
    theirs = Timer("torch.add(parts[0], parts[0])", globals={"torch": torch, "parts": parts})
    assert ours.blocked_autorange().median < 20 * theirs.blocked_autorange().median


def test_publishing_drops_what_fails(empty: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cache.publish(empty / "thing", fail)
    assert not list(empty.iterdir())
    cache.publish(empty / "thing", lambda folder: (folder / "whole").write_text("1") and None)
    cache.publish(empty / "thing", fail)
    assert {path.name for path in empty.rglob("*")} == {"thing", "whole", cache.SUMS}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x" * 101 + "\n", "101 columns, at most 100 are allowed"),
        ("x \n", "trailing blanks"),
        ("x\n\n\ny\n", "more than one empty line in a row"),
        ("x", "must print a text that ends with one line break"),
    ],
)
def test_unreadable_text_is_refused(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        render.check_readable("thing.cpp.jinja", text)


def test_a_name_that_is_missing_is_refused(tmp_path: Path) -> None:
    import jinja2

    (tmp_path / "t.jinja").write_text("{{ given }} {{ missing }}\n")
    with pytest.raises(jinja2.UndefinedError, match="'missing' is undefined"):
        render.render(tmp_path / "t.jinja", given=1)


def test_threads_are_torchs_own() -> None:
    """The runtime is not linked to an OpenMP of its own."""
    shared = build.build([loader.runtime()])[0]
    needed = subprocess.run(["readelf", "-d", shared], capture_output=True, text=True)
    if needed.returncode:
        pytest.skip("no readelf here")
    assert "libtorch_cpu" in needed.stdout
    assert "gomp" not in needed.stdout and "libomp" not in needed.stdout
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("harm", ["cut off", "missing", "another byte"])
def test_what_was_damaged_in_the_cache_is_built_again(empty: Path, harm: str) -> None:
    (first,) = build.build([small()])
    whole = first.read_bytes()
    if harm == "missing":
        first.unlink()
    else:
        first.write_bytes(whole[:100] if harm == "cut off" else whole[:-1] + b"?")
    assert not cache.intact(first.parent)
    (again,) = build.build([small()])
    assert again == first and cache.intact(again.parent)
    assert len(again.read_bytes()) == len(whole)
    assert [folder.name for folder in again.parent.parent.iterdir()] == [again.parent.name]


def test_what_is_no_compiler_is_refused(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x00\x01\x02")
    garbage.chmod(0o755)
    monkeypatch.setenv("CXX", str(garbage))
    with pytest.raises(build.BuildFailed, match=r"could not be started.*point \$CXX at"):
        build.build([small()])
    monkeypatch.setenv("CXX", 'g++ "unfinished')
    with pytest.raises(build.NoCompiler, match="is no command: No closing quotation"):
        build.build([small()])


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMCOMPILE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot be written.*point \$MEMCOMPILE_CACHE at"):
        build.build([small()])


def test_a_locale_without_unicode(tmp_path: Path) -> None:
    env = {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    text = f"""
        from memcompile.codegen import cpp
        from memcompile.codegen.spec import KernelSpec
        spec = KernelSpec.from_json({SPEC.to_json()!r})
        print(len(cpp.source(spec)), cpp.runtime().name)
        score = KernelSpec("score_select", key_dim=8, page_size=8, score="ball")
        print(len(cpp.source(score).encode()), cpp.path(score).name)
    """
    ran = python(text, **env)
    out, error = ran.communicate()
    assert ran.returncode == 0 and len(out.splitlines()) == 2, error
