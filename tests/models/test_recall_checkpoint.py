"""The shipped byte-level Llama answers single-fact recalls, as transformers reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memcompile.models.networks import recall

FOLDER = Path(recall.__file__).parent / "checkpoints" / "bytes-small"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.parametrize("depth", [None, 0.0], ids=["any-depth", "farthest"])
@torch.no_grad()
def test_recall_at_512_bytes(model: torch.nn.Module, depth: float | None) -> None:
    seeds = range(recall.HELD_OUT_SEEDS + 50_000, recall.HELD_OUT_SEEDS + 50_050)
    prompts = [recall.recall_prompt(512, seed, depth=depth) for seed in seeds]
    questions, answers = recall.recall_batch(prompts)
    written = model.generate(questions, max_new_tokens=answers.shape[1], do_sample=False)  # type: ignore[operator]
    right = (written[:, 512:] == answers).all(1)
    assert right.float().mean() >= 0.9, [
        prompt.key for prompt, good in zip(prompts, right, strict=True) if not good
    ]


def test_checkpoint_is_small_and_explained() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 4 * 2**20
    assert set(files) == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    log = json.loads((FOLDER / "training.json").read_text())
    assert log["cpu_minutes"] <= 30
    assert log["held_out"]["recall_by_length"]["512"] >= 0.9
