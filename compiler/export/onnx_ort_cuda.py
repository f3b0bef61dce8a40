"""ONNX for onnxruntime's CUDA provider: `--emit onnx-ort-cuda`.

As `onnx-ort`, where pages that a policy chose are read by `DynamicSparseAttention`, which the CPU
provider has no kernel for: without a GPU, the model with it is held to its contract and to
onnxruntime's own inference of types and shapes, and is not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...passes.fuse_listed import fuse_listed
from ...passes.result import NotRewritten
from .formats import Artefact
from .onnx_check import can_run, check_resolves
from .onnx_fused import TRANSLATIONS
from .onnx_ort import NEEDS, fuse, not_taken
from .onnx_portable import MAIN, PREFILL, built, functional_graphs, refuse_bfloat16, write_checked

if TYPE_CHECKING:
    from ..pipeline import Compiled

NAME, LISTED = "onnx-ort-cuda", "DynamicSparseAttention"


def emit(folder: Path, compiled: Compiled, source: Path | None) -> Artefact:
    """Writes the format `onnx-ort-cuda`; see `formats.emit_all`.

    Raises:
        NotRewritten: the policy has no read that `DynamicSparseAttention` can do; why is said.
    """
    assert compiled.program is not None
    contract, graphs = functional_graphs(compiled, delta=True)
    refuse_bfloat16(contract, graphs[MAIN])
    layouts = compiled.program.layouts
    chosen = fuse_listed(graphs[MAIN], not_taken(layouts))
    if not chosen.applied:
        raise NotRewritten(f"no read for {LISTED}; export onnx-ort", chosen.declined)
    notes, opaque = fuse(graphs, layouts, chosen.declined)
    write_checked(folder, contract, graphs, translations=TRANSLATIONS, opaque=opaque, unrun=(MAIN,))
    if can_run():
        check_resolves(folder / MAIN, LISTED)
    notes.insert(0, f"{MAIN}: {chosen.applied} reads by {LISTED}")
    notes.insert(0, f"needs the CUDA provider of onnxruntime {NEEDS} or later")
    if PREFILL in graphs:
        notes.append(f"feed prompts to {PREFILL}, which reads everything, the rest to {MAIN}")
    notes.append(f"{MAIN} was not run; memcompile verify runs it where the CUDA provider is")
    return Artefact(NAME, NAME, MAIN, built(), tuple(notes))
