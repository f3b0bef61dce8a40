"""A 32-layer Llama (hidden 1024, random) becomes a running engine within a minute, export apart."""

from __future__ import annotations

import time

import pytest
import torch


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.long
def test_from_module_to_running_engine(llama):
    from memcompile.compiler.pipeline import build

    compiled = build(llama, "scout")
    started = time.perf_counter()
    engine = compiled.engine()
    engine.prefill(torch.zeros(1, 8, dtype=torch.int64))
    logits = engine(torch.zeros(1, 1, dtype=torch.int64))
    running = time.perf_counter() - started
    stages = dict(compiled.report.timings)
    export = stages.pop("capture")
    assert len(compiled.sites) == 32
    assert logits.isfinite().all()
    assert sum(stages.values()) + running <= 60, f"{stages}, first calls {running:.1f} s"
    print(f"export {export:.1f} s, the rest {sum(stages.values()):.1f} s, calls {running:.1f} s")
