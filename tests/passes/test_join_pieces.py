"""A tensor made empty and written piece by piece is a concatenation, if all of it is written."""

from __future__ import annotations

import pytest
import torch
from normal_form import Forward, targets

from memcompile.compiler.capture import capture
from memcompile.compiler.pipeline import build, normalise
from memcompile.passes.join_pieces import join_pieces
from memcompile.passes.strip_asserts import strip_asserts
from memcompile.passes.unlift import unlift


def joined(m, x):
    made = x.new_empty(*x.shape[:-1], 16)
    made[..., :6].copy_(x[..., 10:])
    made[..., 6:].copy_(x[..., :1].expand(-1, -1, 10))
    return made


def backwards(m, x):
    made = torch.empty_like(x)
    made[..., 4:] = x[..., :12]
    made[..., :4] = x[..., 12:]
    return made


def with_a_gap(m, x):
    made = x.new_empty(*x.shape[:-1], 16)
    made[..., :6].copy_(x[..., 10:])
    made[..., 7:].copy_(x[..., 7:])
    return made


def overlapping(m, x):
    made = x.new_empty(*x.shape[:-1], 16)
    made[..., :8].copy_(x[..., 8:])
    made[..., 6:].copy_(x[..., 6:])
    return made


def into_zeros(m, x):
    made = torch.zeros_like(x)
    made[..., :8].copy_(x[..., 8:])
    made[..., 8:].copy_(x[..., :8])
    return made


def cast(m, x):
    made = x.new_empty(*x.shape[:-1], 16, dtype=torch.float64)
    made[..., :8].copy_(x[..., 8:])
    made[..., 8:].copy_(x[..., :8])
    return made.float()


@pytest.mark.parametrize(
    ("body", "applied"),
    [(joined, 1), (backwards, 1), (with_a_gap, 0), (overlapping, 0), (into_zeros, 0), (cast, 0)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_what_is_wholly_written_is_joined(body, applied):
    model = Forward(body)
    module = unlift(capture(model).program).graph
    strip_asserts(module)
    assert join_pieces(module).applied == applied
    left = [name for name in targets(module) if "empty" in name or "scatter" in name]
    assert bool(left) == (not applied)
    tokens = torch.randint(19, (2, 5))
    if body is not with_a_gap:
        assert torch.equal(module(tokens), model(tokens))
    normalise(capture(model).program)


def test_latent_attention_of_transformers():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, first_k_dense_replace=1, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=16, n_group=1,
        topk_group=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    compiled = build(DeepseekV3ForCausalLM(config).eval(), "dense", kernels="off")
    assert compiled.report.self_check is not None and len(compiled.sites) == 1
