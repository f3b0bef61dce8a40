"""Copies made for grouped queries are undone; tiling in another order is not."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from normal_form import heads, lowered

from memcompile.passes.fold_attention import fold_attention
from memcompile.passes.undo_repeat_kv import undo_repeat_kv


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def repeat_kv(x):
    b, h, t, d = x.shape
    return x[:, :, None].expand(b, h, 2, t, d).reshape(b, 2 * h, t, d)


def expanded(m, x):
    k = heads(m.project(x), 4)[:, :2]
    return attend(heads(x, 4), repeat_kv(k), repeat_kv(k * 2))


def interleaved(m, x):
    k = heads(m.project(x), 4)[:, :2]
    return attend(heads(x, 4), k.repeat_interleave(2, dim=1), (k * 2).repeat_interleave(2, 1))


def broadcast(m, x):
    k = heads(m.project(x), 4)[:, :1]
    return attend(heads(x, 4), k.expand(-1, 4, -1, -1), (k * 2).expand(-1, 4, -1, -1))


def tiled(m, x):
    k = heads(m.project(x), 4)[:, :2]
    return attend(heads(x, 4), k.repeat(1, 2, 1, 1), (k * 2).repeat(1, 2, 1, 1))


def keys_only(m, x):
    k = heads(m.project(x), 4)
    return attend(heads(x, 4), repeat_kv(k[:, :2]), k * 2)


@pytest.mark.parametrize(
    ("body", "kv_heads", "applied"),
    [(expanded, 2, 1), (interleaved, 2, 1), (broadcast, 1, 1), (tiled, 4, 0), (keys_only, 4, 0)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_stores_each_head_once(body, kv_heads, applied):
    module = lowered(body)
    fold_attention(module)
    result = undo_repeat_kv(module)
    (node,) = [n for n in module.graph.nodes if "memcompile" in str(n.target)]
    assert result.applied == applied
    assert [n.meta["val"].shape[1] for n in node.args[1:3]] == [kv_heads, kv_heads]
    assert len(result.declined) == (body is keys_only)
