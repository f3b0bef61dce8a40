"""The ONNX benchmark: its dense forms are attention, and what is bound is written in place."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_float64

from memcompile.benchmarks import onnx, onnx_forms
from memcompile.benchmarks.attention_step import Shape, dense_form

pytest.importorskip("onnxruntime")

SHAPE = Shape(8, 2, 16, 8, torch.float32)


@pytest.mark.parametrize("form", onnx_forms.FORMS)
def test_a_dense_form_writes_the_token_and_reads_the_whole_cache(form: str) -> None:
    tokens = 40
    held = onnx.caches(SHAPE, tokens, 2)
    before = [tuple(x.clone() for x in pair) for pair in held]
    bound = onnx.bound_dense(form, SHAPE, held, tokens)
    for state, (keys, values) in enumerate(before):
        bound(state)
        query, key, value, *_ = SHAPE.sample(tokens - 1, state)
        keys[:, :, -1:], values[:, :, -1:] = key, value
        assert torch.equal(held[state][0], keys) and torch.equal(held[state][1], values)
        exact = dense_form(
            "matmul", *(x.double() for x in (query, keys, values)), scale=SHAPE.scale
        )
        eager = dense_form("matmul", query, keys, values, SHAPE.scale)
        assert_close_to_float64(
            *(x.view_as(bound.out) for x in (bound.out, eager, exact)), reduction=tokens
        )
