"""Further decoders of transformers, tiny and random: rewritten, and equal to eager in steps."""

from __future__ import annotations

import pytest
import torch
import transformers
from stepping import assert_logits, stepped

from memcompile.compiler.pipeline import build

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 97,
    "n_positions": 128,
    "initializer_range": 0.2,
}
NETWORKS = {
    "Qwen2": COMMON,
    "Phi": COMMON,
    "Phi3": {**COMMON, "pad_token_id": 0},
    "Gemma": {**COMMON, "head_dim": 16},
    "Gemma2": {**COMMON, "head_dim": 16, "sliding_window": 9, "attn_implementation": "eager"},
    "StableLm": COMMON,
    "Cohere": COMMON,
    "Olmo2": COMMON,
    "Starcoder2": {**COMMON, "sliding_window": 9},
    "Granite": COMMON,
    "SmolLM3": {**COMMON, "pad_token_id": 0},
    "GPTJ": {**GPT, "rotary_dim": 8},
    "CodeGen": {**GPT, "rotary_dim": 8},
    "GPTBigCode": GPT,
    "GPTNeo": {
        "hidden_size": 64,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "num_heads": 4,
        "vocab_size": 97,
        "max_position_embeddings": 128,
        "window_size": 8,
        "initializer_range": 0.2,
    },
    "Falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 97,
        "initializer_range": 0.2,
        "multi_query": True,
    },
}


@pytest.mark.parametrize(
    "name",
    # Every second one in the gate.
    [n if i % 2 else pytest.param(n, marks=pytest.mark.long) for i, n in enumerate(NETWORKS)],
)
def test_dense_is_eager(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**NETWORKS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    compiled = build(model, "dense", page_size=8)
    tokens = torch.randint(97, (2, 21))
    assert len(compiled.sites) == 2
    assert_logits(model, stepped(compiled.engine(), tokens, [7, 1, 5, 8]), tokens)
