"""Builds shared libraries with the machine's C++ compiler, each once: cached by content."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import cache as store

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
COMPILERS = ("g++", "clang++")
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall"),
    # The unused halves of some AVX-512 intrinsics are undefined on purpose; GCC 12 warns of them.
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-ignored-attributes"),
)

# Best first. Never -march=native: a library is built for instruction sets, not for one machine.
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mprfchw")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-mprefer-vector-width=512"),
    "avx512": (*_AVX512, "-mprefer-vector-width=512"),
    "avx2": _AVX2,
    "portable": (),
}


class NoCompiler(RuntimeError):
    """There is no C++ compiler on this machine."""


class BuildFailed(RuntimeError):
    """The compiler refused a generated source, or does not work."""


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Unit:
    """One source text of a library.

    Attributes:
        name: its file's name in the library's folder, "….cpp".
        isas: the instruction sets it is compiled for, each with -DMEMCOMPILE_ISA=<name>; empty:
            once, for any machine of the architecture.
        flags: what it needs beside FLAGS.
    """

    name: str
    text: str
    isas: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Library:
    """A shared library to build.

    Attributes:
        name: the file is <name>.so.
        units: its sources.
        link: the linker's flags.
        needs: libraries it is linked against; they are built first.
        versions: whatever else the result depends on (torch's version, say).
    """

    name: str
    units: tuple[Unit, ...]
    link: tuple[str, ...] = ()
    needs: tuple[Library, ...] = ()
    versions: tuple[str, ...] = ()


def isas() -> tuple[str, ...]:
    """The instruction sets that kernels are built for on this architecture, best first."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return tuple(ISA_FLAGS) if x86 else ("portable",)


def compiler() -> Compiler:
    """$CXX, or the first of g++ and clang++ on the path.

    Raises:
        NoCompiler: none is there.
    """
    return _compiler(os.environ.get("CXX", ""), os.environ.get("PATH", ""))


@cache
def _compiler(given: str, path: str) -> Compiler:
    try:
        candidates = [shlex.split(given)] if given.strip() else [[name] for name in COMPILERS]
    except ValueError as error:
        raise NoCompiler(f"$CXX is {given!r}, which is no command: {error}; mend it") from error
    for command in candidates:
        found = shutil.which(command[0], path=path)
        if not found:
            continue
        asked = (found, *command[1:])
        lines = _run((*asked, "--version")).splitlines()[1:]
        return Compiler(asked, lines[0] if lines else "")
    looked = (
        f"$CXX is {given!r}, which is not there"
        if given.strip()
        else (f"none of {', '.join(COMPILERS)} is on the path")
    )
    raise NoCompiler(
        f"no C++ compiler: {looked}; install one (Debian: apt install g++) or point $CXX at it"
    )


def folder(library: Library) -> Path:
    """Where the library lies, or will, in the cache."""
    return store.root() / "cpp" / f"{library.name}-{_key(library, compiler())}"


def _key(library: Library, by: Compiler) -> str:
    parts = [library.name, *by.command, by.version, platform.machine(), *FLAGS, *library.link]
    for unit in library.units:
        parts += [unit.name, unit.text, *unit.flags]
        for isa in unit.isas:
            parts += [isa, *ISA_FLAGS[isa]]
        parts += [text for _, text in sorted(_included(unit.text).items())]
    parts += [_key(need, by) for need in library.needs]
    return store.key(*parts, *library.versions)


def _included(text: str) -> Mapping[str, str]:
    """The texts of our headers that a source reads, however deep, by name."""
    found: dict[str, str] = {}
    waiting = re.findall(r'#include "(?:memcompile/)?([^"]+)"', text)
    while waiting:
        name = waiting.pop()
        if name not in found and (INCLUDE / "memcompile" / name).exists():
            found[name] = (INCLUDE / "memcompile" / name).read_text(encoding="utf-8")
            waiting += re.findall(r'#include "(?:memcompile/)?([^"]+)"', found[name])
    return found


def build(libraries: Iterable[Library]) -> list[Path]:
    """The libraries' paths, in order; what the cache lacks is built first, on all cores.

    Raises:
        NoCompiler: there is none; the cache is keyed by the compiler, so nothing is found either.
        BuildFailed: the compiler failed; the message has its command and first errors.
    """
    wanted = list(libraries)
    if not wanted:
        return []
    by = compiler()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        built: dict[Library, Future[Path]] = {}
        waiters: list[threading.Thread] = []
        for library in wanted:
            _submit(library, by, pool, built, waiters)
        for waiter in waiters:
            waiter.join()
        return [built[library].result() for library in wanted]


def _submit(
    library: Library,
    by: Compiler,
    pool: ThreadPoolExecutor,
    built: dict[Library, Future[Path]],
    waiters: list[threading.Thread],
) -> Future[Path]:
    if library in built:
        return built[library]
    needs = [_submit(need, by, pool, built, waiters) for need in library.needs]
    done: Future[Path] = Future()
    built[library] = done
    place = store.root() / "cpp" / f"{library.name}-{_key(library, by)}"
    shared = place / f"{library.name}.so"
    if store.intact(place):
        done.set_result(shared)
        return done

    # A library waits for its objects and needs in a thread of its own, so that the pool's threads
    # are all left to compilers.
    def wait() -> None:
        try:
            store.publish(place, lambda beside: _make(library, by, beside, pool, needs))
            done.set_result(shared)
        except BaseException as error:
            done.set_exception(error)

    waiters.append(threading.Thread(target=wait, daemon=True))
    waiters[-1].start()
    return done


def _make(
    library: Library,
    by: Compiler,
    place: Path,
    pool: ThreadPoolExecutor,
    needs: Sequence[Future[Path]],
) -> None:
    log: list[str] = [by.version]
    objects, running = [], []
    for unit in library.units:
        source = place / unit.name
        source.write_text(unit.text, encoding="utf-8")
        for isa in unit.isas or ("",):
            made = place / f"{source.stem}{'.' + isa if isa else ''}.o"
            flags = (*FLAGS, *unit.flags, f"-I{INCLUDE}")
            if isa:
                flags += (f"-DMEMCOMPILE_ISA={isa}", *ISA_FLAGS[isa])
            command = (*by.command, *flags, "-c", str(source), "-o", str(made))
            running.append(pool.submit(_run, command))
            objects.append(made)
    log += [step.result() for step in running]
    others = [need.result() for need in needs]
    target = place / f"{library.name}.so"
    # What is needed is loaded with the library, whether or not a symbol says so.
    needed = ("-Wl,--no-as-needed", *map(str, others))
    command = (*by.command, "-shared", *map(str, objects), *needed, *library.link)
    command += (f"-Wl,-soname,{target.name}", "-o", str(target))
    log.append(pool.submit(_run, command).result())
    (place / "build.log").write_text("\n".join(log), encoding="utf-8")
    for made in objects:
        made.unlink()


def _run(command: Sequence[str]) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise BuildFailed(
            f"{shlex.join(command)}\ncould not be started: {error}; point $CXX at a C++ compiler"
        ) from error
    said = answer.stdout + answer.stderr
    if answer.returncode:
        _fail(command, said)
    return f"$ {shlex.join(command)}\n{said}"


def _fail(command: Sequence[str], said: str) -> None:
    lines = said.splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines
    shown = "\n".join(f"  {line}" for line in errors[:8])
    raise BuildFailed(
        f"the C++ compiler failed:\n  $ {shlex.join(command)}\n{shown}\n"
        "try another compiler with $CXX (GCC 11 or Clang 14 and newer are known to do), or "
        "compile with kernels off; the generated source is what its template printed"
    )
