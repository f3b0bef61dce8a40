"""ONNX with onnxruntime's own fused operators: `--emit onnx-ort`.

The same models as `onnx`, with the same contract, where `GroupQueryAttention` appends to and reads
the caches of dense layers and `LinearAttention` keeps recurrent states, the delta rule among them.
What neither of them covers keeps its portable node, and the notes say why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...passes.fuse_grouped import fuse_grouped
from ...passes.result import Declined
from ...runtime.site_layout import SiteLayout
from .formats import Artefact
from .onnx_fused import TRANSLATIONS
from .onnx_portable import (
    MAIN,
    PREFILL,
    built,
    functional_graphs,
    refuse_bfloat16,
    write_checked,
)

if TYPE_CHECKING:
    from ..pipeline import Compiled

GROUPED = "GroupQueryAttention"
NEEDS = "1.32"  # the first whose operator is told of padding


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes the format `onnx-ort`; see `formats.emit_all`."""
    assert compiled.program is not None
    contract, graphs = functional_graphs(compiled, delta=True)
    refuse_bfloat16(contract, graphs[MAIN])
    notes, opaque = fuse(graphs, compiled.program.layouts)
    error = write_checked(folder, contract, graphs, translations=TRANSLATIONS, opaque=opaque)
    notes.insert(0, f"needs onnxruntime {NEEDS} or later; tried on its CPU provider alone")
    if PREFILL in graphs:
        notes.append(f"feed prompts to {PREFILL}, which reads everything, the rest to {MAIN}")
    if error is None:
        notes.append("not run: onnxruntime is not installed here")
    return Artefact("onnx-ort", "onnx-ort", MAIN, built(), tuple(notes))


def fuse(
    graphs: Mapping[str, fx.GraphModule],
    layouts: Sequence[SiteLayout],
    declined: Sequence[Declined] = (),
) -> tuple[list[str], set[str]]:
    """Fuses append and read where `GroupQueryAttention` can do both, in place.

    Args:
        declined: reads of the graph MAIN that another fusion was meant for; why it was not.

    Returns:
        what became of each graph, and which reads stay portable nodes and why; the names of states
        that the operator keeps in an order of its own.

    Raises:
        RuntimeError: a cache that only one of the graphs would leave to the operator, which orders
            it in its own way.
    """
    refused = {
        f"site{n}_keys": f"{GROUPED} takes widths that are multiples of 8, not {layout.key_dim}"
        for n, layout in enumerate(layouts)
        if layout.key_dim % 8
    } | not_taken(layouts)
    instead = {(MAIN, one.node): one for one in declined}
    notes, ordered = [], {}
    for name, graph in graphs.items():
        result = fuse_grouped(graph, refused)
        notes.append(f"{name}: {result.applied} reads by {GROUPED}")
        told = [instead.get((name, one.node), one) for one in result.declined]
        reasons = dict.fromkeys(one.reason for one in told)
        notes += [f"{name}: a read stays a portable node: {reason}" for reason in reasons]
        ordered[name] = _own_order(graph)
    if len({frozenset(names) for names in ordered.values()}) > 1:
        raise RuntimeError(f"{GROUPED} would keep a cache in its own order in one model alone")
    return notes, ordered[MAIN]


def not_taken(layouts: Sequence[SiteLayout]) -> dict[str, str]:
    """Inputs of keys whose sites no attention of onnxruntime's takes, and why."""
    return {f"site{n}_keys": why for n, x in enumerate(layouts) if (why := _why_not(x))}


def _why_not(layout: SiteLayout) -> str:
    """Why none takes a site; empty where one may."""
    if layout.key_dim != layout.value_dim:
        return f"keys of {layout.key_dim} and values of {layout.value_dim} numbers"
    if layout.dtype not in (torch.float32, torch.float16):
        return f"onnxruntime has no kernel for {layout.dtype} on CPUs"
    return ""


def _own_order(graph: fx.GraphModule) -> set[str]:
    """States of fixed size that are left to the operator."""
    target = torch.ops.memcompile_portable.grouped_attention.default
    return {
        str(cache)
        for node in graph.graph.nodes
        if node.target is target and node.args[11] >= 0
        for cache in node.args[5:7]
    }
