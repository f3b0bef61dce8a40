"""From kernel specifications to operators of the running process."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch

from ...models.memory.parts import field_width
from .. import operators
from ..render import render
from ..spec import DTYPES, SCORE_TERMS, KernelSpec, NotCovered
from . import build

NAMESPACE = "memcompile_cpp"

_lock = threading.Lock()
_loaded: dict[KernelSpec, torch._ops.OpOverload] = {}


def source(spec: KernelSpec) -> str:
    """The kernel's text.

    Raises:
        NotCovered: no template covers the spec.
    """
    if spec.contiguous:
        raise NotCovered(f"{spec.name}: on the CPU kernels read page tables")
    terms = SCORE_TERMS.get(spec.score, ())
    template = build.HERE / f"{spec.template}.cpp.jinja"
    return render(template, spec=spec, type=_type(spec), terms=terms)


def path(spec: KernelSpec) -> Path:
    """The readable file in the cache that the kernel is built from."""
    return build.folder(library(spec)) / f"{spec.name}.cpp"


def definitions(specs: Iterable[KernelSpec], more: Sequence[str] = ()) -> str:
    """C++ that defines the kernels' operators, for runtimes without Python.

    Args:
        more: schemas of operators that no spec describes.
    """
    return operators.definitions(NAMESPACE, [*(spec.schema for spec in specs), *more])


def library(spec: KernelSpec) -> build.Library:
    """What is built for a spec: its variants, and what hands them to the runtime."""
    return _library(spec, build.isas())


@cache
def _library(spec: KernelSpec, isas: tuple[str, ...]) -> build.Library:
    table = render(
        build.HERE / "table.cpp.jinja", spec=spec, type=DTYPES[spec.dtype], isas=isas,
        fields=_fields(spec),
    )  # fmt: skip
    units = (
        build.Unit(f"{spec.name}.cpp", source(spec), isas),
        build.Unit("table.cpp", table),
    )
    return build.Library(spec.name, units, needs=(runtime(),))


@cache
def runtime() -> build.Library:
    """The library that makes operators of kernels; it depends on torch's version."""
    name = "runtime.cpp"
    flags = torch_flags()
    unit = build.Unit(name, (build.HERE / name).read_text(encoding="utf-8"), flags=flags)
    return build.Library("libmemcompile_runtime", (unit,), link=torch_link(), versions=versions())


def definitions_library(specs: Iterable[KernelSpec]) -> build.Library:
    """A library of `definitions(specs)`, to be loaded where Python does not define them."""
    unit = build.Unit("definitions.cpp", definitions(specs), flags=torch_flags())
    return build.Library(
        "libmemcompile_definitions", (unit,), link=torch_link(), versions=versions()
    )


def torch_flags() -> tuple[str, ...]:
    """What a source that reads torch's headers is compiled with."""
    home = Path(torch.__file__).parent / "include"
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    return (
        f"-isystem{home}",
        f"-isystem{home / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        "-fopenmp",
        "-DAT_PARALLEL_OPENMP=1",
    )


def torch_link() -> tuple[str, ...]:
    """How a library is linked that calls torch.

    It names torch's libraries, which every process that loads it has loaded. OpenMP comes from
    there as well: the compiler's own would bring a second set of threads.
    """
    home = Path(torch.__file__).parent / "lib"
    return (f"-L{home}", "-ltorch_cpu", "-lc10", "-Wl,--allow-shlib-undefined")


def versions() -> tuple[str, ...]:
    """What a library that calls torch depends on beside its text."""
    return (torch.__version__, str(torch.version.git_version))


def _type(spec: KernelSpec) -> str:
    name = DTYPES[spec.dtype]
    return "float" if name == "f32" else name


def _fields(spec: KernelSpec) -> list[tuple[str, str, int]]:
    names = spec.score_fields if spec.op == "score_select" else spec.fields
    return [
        (
            f"index_{name}",
            "f32" if name == "log_count" else DTYPES[spec.dtype],
            field_width(name, spec.key_dim, spec.value_dim),
        )
        for name in names
    ]


@cache
def _open(shared: Path) -> ctypes.CDLL:
    try:
        torch.ops.load_library(shared)
        return ctypes.CDLL(str(shared))
    except OSError as error:
        raise build.BuildFailed(
            f"{shared} was built but cannot be loaded: {error}; delete its folder to build it again"
        ) from error


def load(specs: Iterable[KernelSpec]) -> dict[KernelSpec, torch._ops.OpOverload]:
    """The operators of these kernels; what the cache lacks is built first, on all cores.

    Raises:
        NoCompiler: there is no compiler, not even for finding what the cache holds.
        BuildFailed: the compiler failed.
        ValueError: $MEMCOMPILE_ISA names an instruction set that this machine cannot run.
    """
    wanted = list(dict.fromkeys(specs))
    with _lock:
        missing = [spec for spec in wanted if spec not in _loaded]
        if missing:
            made = build.build([runtime(), *map(library, missing)])
            _check_isa(_open(made[0]))
            for spec, shared in zip(missing, made[1:], strict=True):
                operator = operators.define(NAMESPACE, spec)
                _open(shared)
                _loaded[spec] = operator
        return {spec: _loaded[spec] for spec in wanted}


def _check_isa(runtime: ctypes.CDLL) -> None:
    wanted = os.environ.get("MEMCOMPILE_ISA")
    usable = [isa for isa in build.isas() if runtime.memcompile_can_run(isa.encode())]
    if wanted and wanted not in usable:
        raise ValueError(
            f"MEMCOMPILE_ISA={wanted} is not an instruction set that this machine runs; "
            f"these are: {', '.join(usable)}"
        )
