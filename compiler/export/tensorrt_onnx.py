"""ONNX models as TensorRT's parser takes them: standard operators alone, nothing nested."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...models import portable
from .contract import Contract
from .onnx_check import can_run, check_answers, check_depends, check_interface, check_model
from .onnx_model import DOMAIN, onnx_models, require_onnx
from .onnx_portable import functional_graphs
from .onnx_write import write_models

if TYPE_CHECKING:
    from ..pipeline import Compiled

LONGEST_LIST = 3840  # TensorRT's TopK gives no more

# Operators that list pages, and the argument that says how many at most.
_LISTS = {
    portable.operator("score_select"): "capacity",
    portable.operator("score_select.page_logits"): "capacity",
    portable.operator("score_select.among"): "budget_pages",
}


def write_inlined(folder: Path, compiled: Compiled, suffix: str = "") -> Contract:
    """Writes a compiled model's ONNX models and `state.json`, memory nodes replaced by their texts.

    TensorRT's parser reads the attributes of a function within a function as zeros.

    Args:
        suffix: of the models' names, for those that are kept with their memory nodes as well; "":
            they are not kept.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        NotRewritten: a memory that has no portable form.
        RuntimeError: state was lost, or answers differ under onnxruntime.
        ValueError: lists of pages that are longer than TensorRT can choose.
    """
    require_onnx()
    contract, graphs = functional_graphs(compiled)
    check_lists(graphs.values())
    models = onnx_models(graphs, contract, branches=False)
    for name, model in models.items():
        check_interface(model, contract, name)
        check_depends(model, contract, name)
    write_models(folder, models)
    contract.write(folder)
    runs = can_run() and not _bfloat16(contract, graphs.values())
    for name, graph in graphs.items():
        path = folder / name
        if suffix:
            path.replace(path.with_suffix(suffix))
            inline(path.with_suffix(suffix), path)
        else:
            inline(path, path)
        check_model(path)
        if runs:
            check_answers(path, graph, contract)
    return contract


def inline(source: Path, target: Path) -> None:
    """Writes a model without functions; its weights stay where they are, beside both."""
    import onnx
    from onnx import inliner

    model: Any = inliner.inline_local_functions(onnx.load(str(source), load_external_data=False))
    kept = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    onnx.save(model, str(target))


def check_lists(graphs: Iterable[fx.GraphModule]) -> None:
    """Refuses lists that TensorRT cannot choose, before anything is exported.

    Raises:
        ValueError: one is longer than LONGEST_LIST.
    """
    for graph in graphs:
        for node in graph.graph.nodes:
            name = _LISTS.get(node.target)
            if name is None:
                continue
            names = [argument.name for argument in node.target._schema.arguments]
            count = node.args[names.index(name)]
            if count > LONGEST_LIST:
                raise ValueError(
                    f"a query reads up to {count} pages, and TensorRT chooses {LONGEST_LIST} at "
                    "most; give a smaller budget or min_context, or a larger page_size"
                )


def _bfloat16(contract: Contract, graphs: Iterable[fx.GraphModule]) -> bool:
    """Whether onnxruntime's CPU provider has no kernels for it."""
    held = [tensor.torch_dtype for tensor in contract.state]
    held += [x.dtype for graph in graphs for x in (*graph.parameters(), *graph.buffers())]
    return torch.bfloat16 in held
