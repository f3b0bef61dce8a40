"""AOTInductor with torch's own operations alone: one self-contained package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...passes.make_functional import make_functional
from . import against_graph, inductor
from .contract import Contract, contract_of, places_of
from .formats import Artefact, this_machine

if TYPE_CHECKING:
    from ..pipeline import Compiled


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes `engine.pt2`, and `prefill.pt2` where a prompt is read otherwise.

    Raises:
        NotRewritten: a memory that needs a host, or that no standard operations cover.
        RuntimeError: no compiler, or a package that does not do what its graph does.
    """
    program, step = compiled.program, compiled.step
    assert program is not None and step is not None
    device = program.device
    why = inductor.elsewhere(device)
    if why:
        raise RuntimeError(f"aoti-portable: {why}")
    sites = places_of(program)
    contract = contract_of(program, sites).in_place()
    for name, graph in inductor.graphs(step, program).items():
        flat = in_place(make_functional(graph, sites, program.ragged), contract)
        traced = inductor.trace_flat(flat, contract, device)
        inductor.check_operations(traced)
        inductor.compile_package(traced, folder / name)
        engine = inductor.on(device, inductor.load(folder / name, traced.weights))
        eager = inductor.on(device, inductor.eager(flat))
        against_graph.check(contract, sites, engine, eager, f"aoti-portable/{name}")
    contract.write(folder)
    notes = ("needs torch alone", *inductor.notes(folder, device))
    return Artefact("aoti-portable", folder.name, inductor.PACKAGE, this_machine(), notes)


def in_place(functional: fx.GraphModule, contract: Contract) -> fx.GraphModule:
    """A functional step that writes its new state into its inputs and returns the logits alone.

    Inductor makes of an input's new rows, put into it, a write of these rows.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in functional.graph.nodes:
        if node.op != "output":
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    inputs = [copied[n] for n in functional.graph.nodes if n.op == "placeholder"]
    results: Any = functional.graph.output_node().args[0]
    logits, *made = (copied[node] for node in results)
    for place, new in zip(inputs[-len(contract.state) :], made, strict=True):
        graph.call_function(torch.ops.aten.copy_.default, (place, new))
    graph.output((logits,))
    return fx.GraphModule(functional, graph)
