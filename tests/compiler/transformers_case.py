"""Small models of transformers with random weights, and policies to read their caches through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

VOCABULARY = 61
IDS = {"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 2}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    **IDS,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**BASE, **more})
    ),
    "qwen3": lambda **more: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**{**BASE, **more})
    ),
    "gpt2": lambda **more: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**GPT2, **IDS, "initializer_range": 0.3, **more})
    ),
    "mistral": lambda **more: transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**BASE, "sliding_window": None, **more})
    ),
}
SELECTING = {"page_size": 8, "dense_layers": 0, "kernels": "off"}
TIERS = {"sinks": 8, "window": 8}
DENSE = {"policy": "dense", "page_size": 8, "kernels": "off"}
# A budget that holds every context of these models.
ALL = {"policy": "scout", "budget": 1024, **TIERS, **SELECTING}
SCOUT = {"policy": "scout", "budget": 32, **TIERS, **SELECTING}
SPARSE: dict[str, dict[str, Any]] = {
    "scout": SCOUT,
    "quest": {"policy": "quest", "budget": 32, **SELECTING},
    "hierarchical": {
        **{"policy": "hierarchical", "levels": (8, 16), "refine": 16, **TIERS},
        **{"dense_layers": 0, "kernels": "off"},
    },
    "window": {"policy": "window", "sinks": 8, "window": 16, "page_size": 8, "kernels": "off"},
}
