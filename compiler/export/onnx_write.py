"""Writes ONNX models, weights once and apart from the graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .onnx_model import origin

if TYPE_CHECKING:
    import onnx_ir as ir

DATA = "model.onnx.data"
# Smaller tensors stay in the graph, where shape inference reads them.
INLINE_BYTES = 1024


def write_models(folder: Path, models: Mapping[str, ir.Model], data: str = DATA) -> None:
    """Writes models to `folder` by their names, their weights to one file beside them.

    Weights are read one by one as they are written, and tensors alike are written once, within a
    model and between models. No graph is serialised with weights in it: protobuf ends at 2 GiB.
    """
    import onnx_ir as ir

    values = [
        value
        for model in models.values()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= INLINE_BYTES
    ]
    unique: dict[Any, Any] = {}
    keys = []
    for value in values:
        key = identity(value.const_value)
        unique.setdefault(key, value.const_value)
        keys.append(key)
    if unique:
        external = ir.external_data.convert_tensors_to_external(list(unique.values()), folder, data)
        place = dict(zip(unique, external, strict=True))
        for value, key in zip(values, keys, strict=True):
            value.const_value = place[key]
    for name, model in models.items():
        ir.save(model, folder / name)


def identity(tensor: Any) -> Any:
    """What two tensors alike have in common: where they come from, or else their bytes."""
    source = tensor.meta.get("source") or origin(tensor)
    if source is not None:
        return source
    digest = hashlib.sha256(tensor.tobytes()).hexdigest()
    return digest, tensor.dtype, tuple(tensor.shape)
