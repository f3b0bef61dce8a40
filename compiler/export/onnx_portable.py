"""ONNX that any onnxruntime runs: `--emit onnx`.

`model.onnx` is the step through the policy; `prefill.onnx`, where the policy chooses what it reads,
the same step reading everything, on the same weights. Both have the contract of `state.json`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...passes.make_functional import make_functional
from .contract import Contract, contract_of, places_of, prefill_of
from .formats import Artefact, this_machine
from .onnx_check import (
    can_run,
    check_answers,
    check_depends,
    check_interface,
    check_model,
)
from .onnx_model import OPSET, Translation, check_opset, onnx_models, require_onnx
from .onnx_write import write_models

if TYPE_CHECKING:
    from ..pipeline import Compiled

MAIN, PREFILL = "model.onnx", "prefill.onnx"


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes the format `onnx`; see `formats.emit_all`."""
    contract, graphs = functional_graphs(compiled)
    refuse_bfloat16(contract, graphs[MAIN])
    error = write_checked(folder, contract, graphs)
    notes = ["any onnxruntime runs it; only its CPU provider was tried"]
    if PREFILL in graphs:
        notes.append(f"feed prompts to {PREFILL}, which reads everything, the rest to {MAIN}")
    if error is None:
        notes.append("not run: onnxruntime is not installed here")
    return Artefact("onnx", "onnx", MAIN, built(), tuple(notes))


def functional_graphs(
    compiled: Compiled, delta: bool = False
) -> tuple[Contract, dict[str, fx.GraphModule]]:
    """The contract of a compiled model, and the graphs to be exported by their files' names.

    Args:
        delta: as for `make_functional`.

    Raises:
        NotRewritten: a memory that needs a host, or has no portable form.
    """
    program, step = compiled.program, compiled.step
    assert program is not None and step is not None
    sites = places_of(program)
    graphs = {MAIN: make_functional(step.policy, sites, program.ragged, delta)}
    dense = prefill_of(step, program)
    if dense is not None:
        prompt = make_functional(dense, sites, program.ragged, delta)
        # A state is written by another kernel for many rows, which is the same operator here.
        if prompt.code != graphs[MAIN].code:
            graphs[PREFILL] = prompt
    return contract_of(program, sites), graphs


def refuse_bfloat16(contract: Contract, graph: torch.nn.Module) -> None:
    """Refuses what onnxruntime has no kernels for on a CPU.

    Raises:
        ValueError: weights or state are bfloat16.
    """
    refuse_bfloat16_among([tensor.torch_dtype for tensor in contract.state], graph)


def refuse_bfloat16_among(state: Iterable[torch.dtype], graph: torch.nn.Module) -> None:
    """`refuse_bfloat16` of a state without a contract."""
    held = [*state, *(x.dtype for x in (*graph.parameters(), *graph.buffers()))]
    if torch.bfloat16 in held:
        raise ValueError(
            "the model is bfloat16, for which onnxruntime has no kernels on CPUs, where engines "
            "are checked before they are kept; convert it with --dtype float32 or float16, "
            "model.to(torch.float32) in Python, or export another format than onnx"
        )


def write_checked(
    folder: Path,
    contract: Contract,
    graphs: Mapping[str, fx.GraphModule],
    *,
    opset: int = OPSET,
    translations: Mapping[str, Translation] | None = None,
    opaque: Collection[str] = (),
    unrun: Collection[str] = (),
) -> float | None:
    """Writes models and contract, and holds each to what it was made from.

    Args:
        graphs: by file name; they share their weights.
        opset, translations: as for `onnx_model`.
        opaque: as for `check_answers`.
        unrun: files that nothing here can run.

    Returns:
        The largest difference from eager as a part of the largest value; None where none was run,
        or onnxruntime is not installed.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        RuntimeError: state was lost, an output dropped, a number folded; or answers differ.
    """
    require_onnx()
    check_opset(opset)
    models = onnx_models(graphs, contract, opset=opset, translations=translations)
    for name, model in models.items():
        check_interface(model, contract, name)
        check_depends(model, contract, name)
    write_models(folder, models)
    contract.write(folder)
    worst = None
    for name, graph in graphs.items():
        check_model(folder / name)
        if name not in unrun and can_run():
            worst = max(worst or 0.0, check_answers(folder / name, graph, contract, opaque))
    return worst


def built() -> dict[str, Any]:
    """Where it was built, and with what."""
    versions = {}
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**this_machine(), **versions, "opset": OPSET}
