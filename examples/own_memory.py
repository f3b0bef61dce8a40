"""A memory of your own, made of tiers and operations, and what it keeps, reads and answers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import memcompile
from memcompile.models.memory import Policy
from memcompile.models.memory.spec import (
    Index,
    Memory,
    Pages,
    Read,
    Score,
    Select,
    Sinks,
    Window,
)
from memcompile.models.networks import recall

BYTES_SMALL = Path(__file__).resolve().parents[1] / "models/networks/checkpoints/bytes-small"


@dataclass(frozen=True)
class Funnel(Policy):
    """Each layer reads half of what the layer below reads, down to `least` tokens.

    Pages are scored by the ball that holds their keys, and skipped ones enter as their mean.
    """

    preset: ClassVar[str] = "funnel"
    first: int = 256
    least: int = 64

    def memory(self, layer: int, window: int) -> Memory:
        """The memory of the attention at `layer`; `window`: its own sliding window, 0 = none."""
        if window:  # what such a layer sees is read whole
            return Memory("dense", Pages(8))
        return Memory(
            "funnel",
            pages=Pages(8),
            sinks=Sinks(8),
            window=Window(16),
            index=Index(("mean", "radius", "value_mean", "log_count")),
            score=Score("ball"),
            select=Select("top-k", max(self.least, self.first >> layer)),
            read=Read(compensate=True),
        )


def ask(engine: Any, count: int, read: str) -> None:
    """Ask for one fact in each of `count` pieces of Python source, 512 bytes with the question."""
    prompts = [
        recall.recall_prompt(512, recall.HELD_OUT_SEEDS + i, depth=i / (count - 1))
        for i in range(count)
    ]
    tokens, answers = recall.recall_batch(prompts)
    cut = len(recall.question(prompts[0].key))
    engine.reset()
    engine.prefill(tokens[:, :-cut])  # densely
    branch = engine.fork()  # counts from here on: the questions and the answers
    how = {"read": read, "read_prompt": read}
    written = branch.generate(tokens[:, -cut:], answers.shape[1], **how)[:, cut:]
    right, stats = int((written == answers).all(1).sum()), branch.stats()
    print(f"{read}: {right} of {count} right, {stats.pages_read} of {stats.pages_dense} pages read")
    if (stats.pages_read < stats.pages_dense) != (read == "policy"):
        raise SystemExit("dense reads every page, and a funnel does not")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    given = parser.parse_args()
    policy = Funnel(first=128, least=48)
    # A policy is data; memcompile.explain(BYTES_SMALL, policy=policy) says more of it.
    budgets = [policy.memory(layer, 0).budget_pages for layer in range(4)]
    print(f"{policy}: pages of 8 that a query reads, layer by layer: {budgets}")
    engine = memcompile.compile(BYTES_SMALL, policy=policy)
    for read in ("dense", "policy"):
        ask(engine, given.prompts, read)


if __name__ == "__main__":
    main()
