"""Training of the byte-level Llama: it learns, it resumes where it stopped, it keeps its budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memcompile.models.networks import train
from memcompile.models.networks.bytes_llama import BytesLlamaConfig, load

TINY = BytesLlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
TEXT = b"".join(b"line %d of the filler\n" % i for i in range(2000))


@pytest.fixture(autouse=True)
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 1056)
    monkeypatch.setattr(train, "evaluate", lambda network: {})


def run(out: Path, steps: int) -> dict[str, Any]:
    return train.train(
        out, minutes=10, steps=steps, seed=3, config=TINY, text=TEXT, checkpoint_every=5
    )


def test_interrupted_run_ends_as_the_straight_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(tmp_path / "straight", 12)
    draw = train.draw_batch

    def draw_until_interrupted(seed: int, step: int, *rest: Any) -> Any:
        if step == 8:
            raise KeyboardInterrupt
        return draw(seed, step, *rest)

    monkeypatch.setattr(train, "draw_batch", draw_until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", 12)
    assert (tmp_path / "resumed" / "resume.pt").is_file()
    monkeypatch.setattr(train, "draw_batch", draw)
    resumed = run(tmp_path / "resumed", 12)
    assert resumed["steps"] == straight["steps"] == 12
    assert resumed["tokens"] == straight["tokens"]
    weights = [load(tmp_path / name).state_dict() for name in ("straight", "resumed")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert not (tmp_path / "resumed" / "resume.pt").exists()


def test_loss_falls_and_is_logged(tmp_path: Path) -> None:
    log = run(tmp_path, 100)
    assert log == json.loads((tmp_path / "training.json").read_text())
    first, last = log["curve"][0], log["curve"][-1]
    assert last["text_bits"] < first["text_bits"] < 8
    assert last["tokens"] == log["tokens"]


def test_budget_of_minutes_ends_the_run(tmp_path: Path) -> None:
    log = train.train(
        tmp_path, minutes=0.01, steps=10**9, seed=0, config=TINY, text=TEXT, checkpoint_every=5
    )
    assert 0 < log["steps"] < 10**4
    assert log["cpu_minutes"] / log["threads"] < 0.2


def test_orthogonalize_flattens_the_spectrum() -> None:
    matrices = torch.randn(4, 24, 64)
    for given in (matrices, matrices.mT):
        values = torch.linalg.svdvals(train.orthogonalize(given).float())
        assert 0.5 < float(values.min()) <= float(values.max()) < 1.5


def test_muon_without_gradient_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"needs a gradient; call backward first"):
        train.Muon([torch.zeros(2, 3, requires_grad=True)], 0.1).step()
