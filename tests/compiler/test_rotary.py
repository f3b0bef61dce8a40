"""Rotary scalings of transformers: those that depend on the length need one, the others do not."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close_to_float64

import memcompile
from memcompile.passes.result import NotRewritten

ORIGINAL, CONTEXT = 16, 40
BY_LENGTH = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "short_factor": [1.0] * 8,
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}
FIXED = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def llama(kind: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    scaling = {"rope_type": kind, "rope_theta": 1e4, **(BY_LENGTH | FIXED)[kind]}
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        initializer_range=0.2,
        rope_parameters=scaling,
        max_position_embeddings=ORIGINAL,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", [*BY_LENGTH, *FIXED])
def test_equals_eager_at_the_length_it_was_resolved_for(kind):
    model = llama(kind)
    options = {"max_context": CONTEXT} if kind in BY_LENGTH else {}
    engine = memcompile.compile(model, "dense", **options)
    tokens = torch.randint(97, (2, CONTEXT))
    parts = [engine(tokens[:, a:b]) for a, b in [(0, 7), (7, 8), (8, CONTEXT)]]
    with torch.no_grad():
        eager = model(tokens, use_cache=False).logits
        truth = llama(kind).double()(tokens, use_cache=False).logits
    assert_close_to_float64(torch.cat(parts, 1), eager, truth, reduction=64 * CONTEXT)
    if options:
        with pytest.raises(ValueError, match="41 tokens exceed the context of 40"):
            engine(tokens[:, :1])


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_declined_by_name_without_a_length(kind):
    with pytest.raises(NotRewritten, match=f"rotary type '{kind}' recomputes its frequencies"):
        memcompile.compile(llama(kind), "dense")


def test_the_model_is_left_as_it_was():
    model = llama("dynamic")
    before = model.model.rotary_emb.inv_freq.clone()
    memcompile.compile(model, "dense", max_context=CONTEXT)
    assert model.model.rotary_emb.rope_type == "dynamic"
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.config.use_cache is True
