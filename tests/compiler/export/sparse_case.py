"""`DynamicSparseAttention` by the words of its schema: onnxruntime has it on GPUs alone.

What is tested with it is not onnxruntime's kernel, but what a model hands to it. The other operator
of onnxruntime's own in such a model is onnxruntime's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

INT32 = np.int32


class DynamicSparseAttention(OpRun):
    """`local_plus_selected` of an auxiliary cache."""

    op_domain = "com.microsoft"

    def _run(
        self,
        query: Any,
        key: Any,
        value: Any,
        past_key: Any,
        past_value: Any,
        auxiliary_key: Any,
        auxiliary_value: Any,
        selected_indices: Any,
        selected_counts: Any,
        seqlens_k: Any,
        total_sequence_length: Any,
        num_heads: int,
        kv_num_heads: int,
        scale: float,
        attention_mode: str,
        selected_kv_source: str,
        local_window_size: int,
    ) -> Any:
        assert (attention_mode, selected_kv_source) == ("local_plus_selected", "auxiliary")
        batch, n, wide = query.shape
        size, cells = wide // num_heads, auxiliary_key.shape[2]
        assert key.shape == value.shape == (batch, n, kv_num_heads * size)
        assert auxiliary_key.shape == auxiliary_value.shape == (batch, kv_num_heads, cells, size)
        assert selected_indices.shape[0] == batch * n and selected_counts.shape == (batch * n,)
        assert seqlens_k.shape == (batch,) and total_sequence_length == seqlens_k.max() + 1
        for whole in (selected_indices, selected_counts, seqlens_k, total_sequence_length):
            assert whole.dtype == INT32
        assert past_key is None and past_value is None
        room = (batch, kv_num_heads, int(total_sequence_length), size)
        held_key, held_value = (np.full(room, np.nan, x.dtype) for x in (key, value))
        out = np.zeros_like(query).reshape(batch, n, num_heads, size)
        for b in range(batch):
            total = int(seqlens_k[b]) + 1
            assert n <= total <= held_key.shape[2]
            for held, new in ((held_key, key), (held_value, value)):
                rows = new[b].reshape(n, kv_num_heads, size).transpose(1, 0, 2)
                held[b, :, total - n : total] = rows
            for r in range(n):
                count = int(selected_counts[b * n + r])
                listed = selected_indices[b * n + r]
                chosen = listed[:count]
                assert (listed[count:] == -1).all() and len({*chosen.tolist()}) == count
                assert count == 0 or (chosen.min() >= 0 and chosen.max() < cells)
                end = total - n + r + 1
                near = slice(max(0, end - local_window_size), end)
                for h in range(num_heads):
                    g = h * kv_num_heads // num_heads
                    keys = np.concatenate([held_key[b, g, near], auxiliary_key[b, g, chosen]])
                    values = np.concatenate([held_value[b, g, near], auxiliary_value[b, g, chosen]])
                    at = slice(h * size, (h + 1) * size)
                    logits = keys.astype(np.float64) @ query[b, r, at].astype(np.float64) * scale
                    weights = np.exp(logits - logits.max())
                    out[b, r, h] = (weights / weights.sum()) @ values.astype(np.float64)
        return (out.reshape(query.shape),)


class GroupQueryAttention(OpRun):
    """onnxruntime's, in a model of one node."""

    op_domain = "com.microsoft"

    def _run(self, *inputs: Any, **attributes: Any) -> Any:
        names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
        given = {name: x for name, x in zip(names, inputs, strict=True) if name}
        outputs = ["out", "keys", "values"]
        set_ones = {name: value for name, value in attributes.items() if value is not None}
        node = onnx.helper.make_node(
            "GroupQueryAttention", names, outputs, domain="com.microsoft", **set_ones
        )
        graph = onnx.helper.make_graph(
            [node],
            "one",
            [_named(name, x) for name, x in given.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        )
        opsets = [onnx.helper.make_opsetid(*one) for one in (("", 20), ("com.microsoft", 1))]
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        return tuple(session.run(outputs, given))


def _named(name: str, x: Any) -> Any:
    kind = onnx.helper.np_dtype_to_tensor_dtype(x.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, x.shape)


def stand_in(path: Path) -> ReferenceEvaluator:
    """A model that runs without a GPU; slowly."""
    model = inline_local_functions(onnx.load(path))
    return ReferenceEvaluator(model, new_ops=[DynamicSparseAttention, GroupQueryAttention])
