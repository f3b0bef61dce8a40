"""The known-answer model at 32K: retrieval is exact at a sixteenth of the pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import memcompile
from memcompile.models.networks import induction

LENGTH = 32 * 1024


@pytest.mark.long  # the demo asks the same of the same network, and is a test too
def test_retrieval_is_exact_at_a_sixteenth_of_the_pages(tmp_path: Path) -> None:
    folder = induction.save(tmp_path / "induction")
    engine = memcompile.compile(folder, "scout", budget=2048, dense_layers=0)
    tokens, answer = induction.prompt(LENGTH + 1, seed=3, depth=0.4, steps=3)
    engine.prefill(tokens[:, :-1])
    before = engine.stats().to_json()
    following, got = tokens[:, -1:], []
    for _ in range(answer.shape[1]):
        following = engine(following)[:, -1:].argmax(-1)
        got.append(following)
    after = engine.stats().to_json()
    assert torch.equal(torch.cat(got, 1), answer)
    assert after["tokens"]["policy"] == answer.shape[1]
    read, dense = (after[k] - before[k] for k in ("pages_read", "pages_dense"))
    assert 16 * read <= dense
    assert after["bytes_read"] - before["bytes_read"] < (
        after["bytes_dense"] - before["bytes_dense"]
    )
