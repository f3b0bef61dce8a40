"""AOTInductor with our kernels: a package, and libraries beside it of which one is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...codegen.cpp import ship
from ...codegen.cpp.loader import NAMESPACE
from ...codegen.spec import KernelSpec
from ...passes.make_paged import make_paged
from ..lower import SIXTEEN, Traced, load_linear, memory_calls, put_kernels, uncovered
from ..report import Lowered
from . import against_graph, inductor
from .contract import contract_of, places_of
from .formats import Artefact, this_machine
from .launched import launched

if TYPE_CHECKING:
    from ..pipeline import Compiled

PORTABLE = "export 'aoti-portable' instead, which needs no kernels"


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes `engine.pt2`, `prefill.pt2` where a prompt is read otherwise, and the libraries.

    Raises:
        NotRewritten: a memory that needs a host.
        RuntimeError: an operation that no kernel covers, no compiler, or a package that does not do
            what its graph does.
    """
    program, step = compiled.program, compiled.step
    assert program is not None and step is not None
    device = program.device
    why = inductor.elsewhere(device)
    if why:
        raise RuntimeError(f"aoti: {why}")
    why = uncovered(program.layouts)
    if why:
        raise RuntimeError(f"aoti: {why}; {PORTABLE}")
    sites = places_of(program)
    contract = contract_of(program, sites).in_place()
    try:
        sixteen = any(weight.dtype in SIXTEEN for weight in step.policy.parameters())
        linear = load_linear(device, "required")[0] if sixteen else None
    except RuntimeError as reason:
        raise _refused(reason) from reason
    specs: set[KernelSpec] = set()
    for name, graph in inductor.graphs(step, program).items():
        paged = make_paged(graph, sites, program.ragged)
        traced = inductor.trace_flat(paged, contract, device, linear)
        found = put_all(traced, device)
        specs |= found
        if device.type == "cuda":
            traced = launched(traced, found)
        inductor.check_operations(traced, () if device.type == "cuda" else (NAMESPACE,))
        inductor.compile_package(traced, folder / name)
        engine = inductor.on(device, inductor.load(folder / name, traced.weights))
        eager = inductor.on(device, inductor.eager(paged))
        against_graph.check(contract, sites, engine, eager, f"aoti/{name}")
    contract.write(folder)
    notes = inductor.notes(folder, device)
    if device.type == "cpu":
        library = ship.ship(specs, linear is not None, folder)
        notes.insert(0, f"load {library.name} first; it brings the libraries that lie beside it")
    return Artefact("aoti", folder.name, inductor.PACKAGE, this_machine(), tuple(notes))


def put_all(traced: Traced, device: Any) -> set[KernelSpec]:
    """Puts a kernel in place of every memory operation; their specs."""
    calls = memory_calls({"step": traced})
    specs = {spec for _, _, spec, _ in calls if isinstance(spec, KernelSpec)}
    try:
        put_kernels({"step": traced}, device, "required", Lowered())
    except RuntimeError as reason:
        raise _refused(reason) from reason
    return specs


def _refused(reason: RuntimeError) -> RuntimeError:
    text = str(reason).removeprefix("kernels='required', but ")
    return RuntimeError(f"aoti: {text}\n{PORTABLE}")
