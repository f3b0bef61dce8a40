"""Every policy on every kind of model, in both formats: odd chunks, then 64 steps, as eager; in a
process with torch alone, and in the C++ program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from aoti_case import SCOUT, assert_equal, drive, generate, rows_of, traces, without_prefill, words
from torch import nn

from memcompile.compiler.export import aoti, aoti_portable, inductor
from memcompile.compiler.export.runners import LIBRARY
from memcompile.compiler.pipeline import build

STEPS = 64
BYTES_SMALL = Path(__file__).resolve().parents[3] / "models/networks/checkpoints/bytes-small"
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"page_size": 8},
    "window": {"sinks": 8, "window": 24, "page_size": 8},
    "scout": SCOUT,
    "hierarchical": {
        "levels": (8, 32, 64), "sinks": 8, "window": 16, "refine": 16, "dense_layers": 0,
    },
    "hybrid": {"window": 16, "page_size": 8},
}  # fmt: skip
SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LATENT = {
    "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
    "n_shared_experts": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "qwen3": (
        "Qwen3",
        {**SIZES, "intermediate_size": 64, "head_dim": 16, "num_key_value_heads": 1},
    ),
    "deepseek": ("DeepseekV3", {**SIZES, **LATENT}),
}


def model(name: str) -> Any:
    if name == "bytes-small":
        return BYTES_SMALL
    import transformers

    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    head = "GPT2LMHeadModel" if name == "gpt2" else f"{kind}ForCausalLM"
    made: nn.Module = getattr(transformers, head)(config).eval()
    return made


@pytest.mark.long
@pytest.mark.parametrize("name", ["bytes-small", *CONFIGS])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", ["aoti", "aoti-portable"])
def test_tokens_are_eagers(
    form: str,
    policy: str,
    name: str,
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inductor, "graphs", without_prefill)
    options = {"dtype": "float32"} if name == "bytes-small" else {}
    compiled = build(model(name), policy, kernels="off", check=False, **options, **POLICIES[policy])
    folder = tmp_path / form
    folder.mkdir()
    (aoti if form == "aoti" else aoti_portable).emit(folder, compiled, None)
    told = traces(compiled, None, STEPS)
    libraries = [folder / LIBRARY] if form == "aoti" else []
    assert_equal(drive(folder, told, tmp_path, *libraries), told)
    for trace in told:
        fed = torch.cat(trace.tokens, 1).tolist()
        prompts = [word for row in fed for word in ("--prompt", words(row[:-STEPS]))]
        ran = generate(program, folder, "--max-new-tokens", str(STEPS), *prompts)
        assert ran.returncode == 0, ran.stderr
        assert rows_of(ran.stdout) == [row[-STEPS:] for row in fed]
